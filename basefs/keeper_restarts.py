"""When the next server is started, and what it gets of what the dead ones had: requests, files. Pure: no clock."""

import logging

log = logging.getLogger("basefs.keeper")

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
QUICK_S = 1.0
"""A server that served less long counts as one that cannot be started. One that served longer and dies is replaced at
once, however often: a guest waits for it, and another start costs less than its patience."""
STEADY_S = 10.0
"""A server that served that long has nothing to do with the deaths before it."""
KILLED_QUICK_S = 0.5
"""SIGKILL from outside (an operator, the OOM killer) speaks against the requests only if it comes at once."""
DEATHS_WITH_RESEND_MAX = 3
FAILURES_WITH_FILES_MAX = 3
"""So many servers in a row that did not come to serve make the configuration files the suspects."""
RESEND_WAIT_MAX_S = 640.0


class Restarts:
    """The back-off, and the guard against a request that kills every server that takes it.

    Times are time.monotonic(). `deaths` counts all since the keeper began, `last_death` says why the last one was.
    """

    def __init__(self) -> None:
        self.deaths = 0
        self.last_death = ""
        self.resend_due_s: float | None = None
        """When what dead servers had taken is handed out after all; None when nothing is held back."""
        self._backoff_s = 0.0
        self._suspicious = 0
        self._ready_at_s: float | None = None
        self._resent_at_s: float | None = None
        self._resend_wait_s = STEADY_S

    @property
    def may_resend(self) -> bool:
        """Whether the next server gets the requests that dead ones had taken."""
        return self._suspicious < DEATHS_WITH_RESEND_MAX

    def became_ready(self, now_s: float) -> None:
        """A server serves."""
        self._ready_at_s = now_s
        self._resent_at_s = now_s if self.may_resend else None
        self.resend_due_s = None if self.may_resend else now_s + self._resend_wait_s

    def resent(self, now_s: float) -> None:
        """What was held back has been handed out."""
        log.warning("the requests that dead servers had taken are handed out again")
        self._resent_at_s, self.resend_due_s = now_s, None

    def died(self, why: str, now_s: float, *, was_killed: bool) -> float:
        """The seconds to wait before the next server; `was_killed`: by a SIGKILL that was not ours, as far as known."""
        self.deaths += 1
        self.last_death = why
        served_s = None if self._ready_at_s is None else now_s - self._ready_at_s
        self._suspect(served_s, now_s, was_killed=was_killed)
        self._ready_at_s = self._resent_at_s = self.resend_due_s = None
        if served_s is not None and served_s >= QUICK_S:
            if served_s >= STEADY_S:
                self._backoff_s = 0.0
            return 0.0
        delay_s = self._backoff_s
        self._backoff_s = min(max(2 * delay_s, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        return delay_s

    def _suspect(self, served_s: float | None, now_s: float, *, was_killed: bool) -> None:
        """Count deaths soon after a resend; they end the resending for a while, each time for longer."""
        if served_s is None:
            return  # It took no request.
        limit_s = KILLED_QUICK_S if was_killed else STEADY_S
        if self._resent_at_s is None:
            # It had not been given what is suspected, and died all the same: something else kills, too. The next one
            # gets them, for guests wait for them, and would for ever while no server lives for `_resend_wait_s` (seen
            # in tools/soak: reads hung at a kill every 5 to 15 s). If it is them as well, every other server goes on.
            self._suspicious = min(self._suspicious, DEATHS_WITH_RESEND_MAX - 1)
            return
        if now_s - self._resent_at_s >= limit_s:
            if now_s - self._resent_at_s >= STEADY_S:
                self._suspicious, self._resend_wait_s = 0, STEADY_S
            return
        was_held_back = self._suspicious >= DEATHS_WITH_RESEND_MAX
        self._suspicious += 1
        if was_held_back:
            self._resend_wait_s = min(2 * self._resend_wait_s, RESEND_WAIT_MAX_S)
        if not self.may_resend:
            log.warning(
                "%d servers died soon after they were handed what dead ones had taken: the next one is not, until it "
                "has served for %g s",
                self._suspicious,
                self._resend_wait_s,
            )


class StartFailures:
    """Servers that did not come to serve since one did, and what they said of the configuration; each is told once."""

    def __init__(self) -> None:
        self.config_error = ""
        """Why the configuration is not used that was read last; empty: it is."""
        self._in_a_row = 0
        self._last = ""

    @property
    def suspicion(self) -> str:
        """Why the next server is not to use the configuration files; empty: it is."""
        return self._last if self._in_a_row >= FAILURES_WITH_FILES_MAX else ""

    def not_started(self, why: str) -> None:
        """A server could not be started at all, whatever it would have read."""
        if why != self._last:
            log.error("%s; trying again", why)
            self._last = why

    def not_served(self, why: str) -> None:
        """A server ended before it served."""
        self._in_a_row += 1
        self.not_started(why)

    def served(self) -> None:
        """One serves: the next failure is a new one."""
        self._in_a_row, self._last = 0, ""

    def loaded_with(self, config_error: str) -> None:
        """A server has read the configuration; `config_error` says why it uses the last one that worked instead."""
        if config_error and config_error != self.config_error:
            log.warning("the configuration is not usable, the last one that worked goes on: %s", config_error)
        self.config_error = config_error
