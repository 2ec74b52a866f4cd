"""Which server does what: the one that serves, the one that waits in its place, the one of an upgrade. Stdlib only.

Invariants:
- One server at a time has the session. The next one gets it when the last one has ended.
- While a server serves, another one that has imported everything waits (the standby); what becomes of it is no
  event for the mount.
- An upgrade ends the old server only when the new one is loaded; the old version's standby stays until the new
  server was steady.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

from basefs.errors import BasefsError, MountError
from basefs.keeper_handover import Handover, Reason
from basefs.keeper_held import HeldFds
from basefs.keeper_restarts import STEADY_S, Restarts
from basefs.keeper_servers import Happening, ServerFailedError, Servers
from basefs.keeper_spec import KeeperSpec
from basefs.keeper_upgrade import Answer, Upgrade, options_of
from basefs.keeper_watchdog import Watchdog
from basefs.kernel_session import KernelSession
from basefs.server_process import END_LIMIT_S, ServerProcess
from basefs.service_manager import tell_systemd

log = logging.getLogger("basefs.keeper")

CONFIG_KEY = "config"
"""Under which a server that serves gives us the text of its configuration."""
STANDBY_AFTER_S = 1.0
"""Readers that waited for the server come first."""
STANDBY_BACKOFF_S = (1.0, 5.0, 30.0, 60.0)
STANDBY_NICE = 10
FAILURES_WITH_FILES_MAX = 3
"""So many servers in a row that did not come to serve make the configuration files the suspects."""
TAKE_OVER_LIMIT_S = 10.0
"""What a new version has from its `begin` to `ready`, while readers wait and the old version could serve them."""


class SessionEndedError(BasefsError):
    """The FUSE session is over, so there is nothing left to serve."""


class Lock(Protocol):
    """What of the cache directory's lock the servers need."""

    fd: int

    def note_server(self, server_pid: int) -> None:
        """Say which server holds the lock now."""


class Crew:
    """The servers of one session. `ready` is called with each server that comes to serve, and if it is the first."""

    def __init__(
        self,
        spec: KeeperSpec,
        session: KernelSession,
        held: HeldFds,
        lock: Lock,
        *,
        lower_fd: int,
        oom_score: int,
        ready: Callable[[ServerProcess, bool], None],
    ) -> None:
        self._spec = spec
        self._session = session
        self._held = held
        self._lock = lock
        self._ready = ready
        self._handover = Handover(session, held)
        self.servers = Servers(spec, self._handover, lower_fd=lower_fd, lock_fd=lock.fd, oom_score=oom_score)
        self.active: ServerProcess | None = None
        self.standby: ServerProcess | None = None
        self.is_serving = False
        """Whether a server ever served: from then on none of their failures is the mount's end."""
        self.restarts = Restarts()
        self.next_active_s: float | None = None
        self._next_standby_s: float | None = None
        self._standby_ends_s: float | None = None
        self._standby_failures = 0
        self._reason: Reason = "first"
        self._watchdog = Watchdog()
        self._upgrade: Upgrade | None = None
        self._last_failure = ""
        self._failures = 0
        """Servers in a row that did not come to serve."""
        self._config_error = ""

    # --- the next server --------------------------------------------------------------------------------

    def start(self, reason: Reason) -> None:
        """Have a server take the session: the standby if there is one.

        Raises:
            MountError: The first one cannot be started.
        """
        self.next_active_s = None
        self._reason = reason
        if self.standby is not None and self.standby.stage != "ending":
            if self._standby_ends_s is not None:
                why = self.restarts.last_death
                log.error("upgrade: the new server failed (%s); the old version takes over", why)
            server, self.standby, self._standby_ends_s = self.standby, None, None
        else:
            try:
                server = self._start_server(limit_s=self._spec.start_deadline_s, is_standby=False)
            except ServerFailedError as exc:
                self._not_started(str(exc))
                return
        self._take_over(server, limit_s=self._spec.start_deadline_s)

    def _start_server(self, *, limit_s: float, is_standby: bool, may_fall_back: bool = True) -> ServerProcess:
        distrusts_files = self._failures >= FAILURES_WITH_FILES_MAX
        return self.servers.start(
            nice=STANDBY_NICE if is_standby and may_fall_back else 0,
            limit_s=limit_s,
            is_standby=is_standby,
            config_fd=self._held.fd_of(CONFIG_KEY) if may_fall_back else None,
            config_failure=self._last_failure if distrusts_files else "",
        )

    def _take_over(self, server: ServerProcess, *, limit_s: float) -> None:
        self.active = server
        # A full disk must not keep a mount without a server.
        with contextlib.suppress(OSError):
            self._lock.note_server(server.pid)
        server.set_nice(0)
        if server.stage == "loaded":
            self._begin(server, limit_s)

    def _begin(self, server: ServerProcess, limit_s: float) -> None:
        self._handover.may_resend = self.restarts.may_resend
        begin = {
            "restarts": self.restarts.deaths,
            "reason": self._reason,
            "last_death": self.restarts.last_death,
        }
        self._handover.begin(server, begin, limit_s=limit_s)

    def _not_started(self, why: str) -> None:
        if not self.is_serving:
            raise MountError(why)
        if why != self._last_failure:
            log.error("%s; trying again", why)
            self._last_failure = why
        now_s = time.monotonic()
        self.next_active_s = now_s + self.restarts.died(why, now_s, was_killed=False)

    # --- what servers do --------------------------------------------------------------------------------

    def on(self, happening: Happening) -> None:
        """Go on after what a server did.

        Raises:
            MountError: The first server failed.
            SessionEndedError: Nothing is left to serve.
        """
        server = happening.server
        if happening.kind == "pong":
            if server is self.active:
                self._watchdog.pong(happening.message.get("n"))
        elif happening.kind == "loaded":
            self._on_loaded(server)
        elif happening.kind == "ready":
            self._on_ready(server)
        elif server is self.active:
            self._active_ended(server)
        elif server is self.standby:
            self._standby_ended(server)
        elif self._upgrade is not None and server is self._upgrade.candidate:
            self._candidate_ended(server)

    def _on_loaded(self, server: ServerProcess) -> None:
        self._note_config_error(str(server.loaded.get("config_error", "")))
        if server is self.active:
            self._begin(server, self._spec.start_deadline_s)
        elif server is self.standby:
            self._standby_failures = 0
        self._go_on_with_upgrade()

    def _note_config_error(self, text: str) -> None:
        if text and text != self._config_error:
            log.warning("the configuration is not usable, the last one that worked goes on: %s", text)
        self._config_error = text

    def _on_ready(self, server: ServerProcess) -> None:
        now_s = time.monotonic()
        is_first, self.is_serving = not self.is_serving, True
        self.restarts.became_ready(now_s)
        self._last_failure, self._failures = "", 0
        self._watchdog.begin(now_s, self.option("watchdog_s", self._spec.watchdog_s))
        if self.standby is None:
            self._next_standby_s = now_s + STANDBY_AFTER_S
        self._ready(server, is_first)
        if self._upgrade is None:
            return
        if self._upgrade.stage == "loading":
            self._go_on_with_upgrade()
            return
        if server is self._upgrade.candidate:
            self._upgrade.succeeded(server)
            self._standby_ends_s = now_s + STEADY_S
        else:
            self._upgrade.failed(self._upgrade.failure, server)
        self._upgrade = None

    def _active_ended(self, server: ServerProcess) -> None:
        self.active = None
        self._watchdog.end()
        if not self.is_serving:
            raise MountError(server.failure)
        self.check_session()
        if self._upgrade is None or self._upgrade.stage == "loading" or not self._goes_on_after(server, self._upgrade):
            self._died(server)

    def _died(self, server: ServerProcess) -> None:
        now_s = time.monotonic()
        was_killed = server.exit_code == -signal.SIGKILL and not server.is_killed
        last_answer_s = now_s - self._watchdog.limit_s if server.is_hung else now_s
        delay_s = self.restarts.died(server.failure, last_answer_s, was_killed=was_killed)
        if not server.has_served:
            self._failures += 1
            if server.failure != self._last_failure:
                log.error("%s; trying again", server.failure)
                self._last_failure = server.failure
        else:
            log.error("server %d died (%s); starting another", server.pid, server.failure)
        tell_systemd(f"STATUS=server died ({server.failure}), starting another")
        self._reason = "hung" if server.is_hung else "died"
        if delay_s:
            self.next_active_s = now_s + delay_s
        else:
            self.start(self._reason)

    def _standby_ended(self, server: ServerProcess) -> None:
        self.standby = self._standby_ends_s = None
        wait_s = STANDBY_BACKOFF_S[min(self._standby_failures, len(STANDBY_BACKOFF_S) - 1)]
        if self._standby_failures == 1:
            log.warning("no server can wait in place of the one that serves: %s", server.failure)
        self._standby_failures += 1
        self._next_standby_s = time.monotonic() + wait_s
        self._go_on_with_upgrade()

    # --- upgrades ---------------------------------------------------------------------------------------

    def upgrade(self, answer: Answer) -> None:
        """Replace the server by one of what is installed now; `answer` is called once, when that is decided."""
        if self._upgrade is not None or not self.is_serving:
            answer({"upgraded": False, "error": "not now: a server is being started or replaced already"})
            return
        limit_s = self.option("upgrade_deadline_s", self._spec.upgrade_deadline_s)
        try:
            candidate = self._start_server(limit_s=limit_s, is_standby=True, may_fall_back=False)
        except ServerFailedError as exc:
            answer({"upgraded": False, "error": f"{exc}; the old version serves on"})
            return
        log.info("upgrade: server %d is being loaded", candidate.pid)
        self._upgrade = Upgrade(candidate, self.active, answer)

    def _go_on_with_upgrade(self) -> None:
        """Stop the old server once the new one is loaded, and the way back, too, if there is one."""
        upgrade = self._upgrade
        if upgrade is None or upgrade.stage != "loading" or upgrade.candidate.stage != "loaded":
            return
        if self.standby is None and self._next_standby_s is not None and not self._standby_failures:
            self._start_standby()
        if self.active is not None and self.active.stage != "ready":
            return  # It has just been started in place of one that died; its `ready` brings us back.
        if self.standby is not None and self.standby.stage == "loading":
            return
        upgrade.stops_old()
        if self.active is None:
            self._goes_on_after(None, upgrade)
            return
        self._watchdog.end()
        self.active.send({"type": "stop"})
        self.active.expect("stopping", "its end")
        self.active.set_limit(END_LIMIT_S)

    def _goes_on_after(self, ended: ServerProcess | None, upgrade: Upgrade) -> bool:
        """Give the session to whose turn it is in an upgrade; False when there is nobody."""
        self._reason = "upgrade"
        self.next_active_s = None
        if upgrade.stage == "stopping" and not upgrade.failure:
            upgrade.stage = "taking over"
            limit_s = min(TAKE_OVER_LIMIT_S, self._spec.start_deadline_s)
            self._take_over(upgrade.candidate, limit_s=limit_s)
            return True
        if upgrade.stage != "falling back" and self.standby is not None:
            upgrade.stage = "falling back"
            upgrade.failure = upgrade.failure or (ended.failure if ended is not None else "")
            log.error("upgrade: the new server failed (%s); the old version takes over", upgrade.failure)
            self.start("upgrade")
            return True
        why = upgrade.failure or (ended.failure if ended is not None else "it ended")
        self._upgrade = None
        upgrade.failed(why, None)
        return False

    def _candidate_ended(self, server: ServerProcess) -> None:
        upgrade = self._upgrade
        assert upgrade is not None
        if upgrade.stage == "stopping":
            upgrade.failure = server.failure  # The old server is on its way out; the standby is next.
            return
        self._upgrade = None
        log.error("upgrade: the new server failed: %s; the old one serves on", server.failure)
        upgrade.failed(server.failure, self.active)

    # --- time -------------------------------------------------------------------------------------------

    def due_s(self) -> float | None:
        """When `on_time` has something to do (time.monotonic()), None: never."""
        times = (
            self.next_active_s,
            self._next_standby_s,
            self._standby_ends_s,
            self._watchdog.due_s,
            self.restarts.resend_due_s,
            self.servers.due_s(),
        )
        return min((time_s for time_s in times if time_s is not None), default=None)

    def on_time(self) -> None:
        """Do what its time has come for."""
        now_s = time.monotonic()
        if _has_come(self.next_active_s, now_s):
            self.start(self._reason)
        if _has_come(self._standby_ends_s, now_s) and self.standby is not None:
            log.info("the old version's standby ends; one of the new version takes its place")
            self._standby_ends_s = None
            self.standby.kill("replaced")
            self._standby_failures = 0
        if _has_come(self._next_standby_s, now_s):
            self._start_standby()
        if _has_come(self._watchdog.due_s, now_s):
            self._watch(now_s)
        if _has_come(self.restarts.resend_due_s, now_s):
            with contextlib.suppress(OSError):  # The session is ending, which is found out elsewhere.
                self._session.resend()
            self.restarts.resent(now_s)

    def _start_standby(self) -> None:
        self._next_standby_s = None
        if self.standby is not None:
            return
        try:
            self.standby = self._start_server(limit_s=self._spec.start_deadline_s, is_standby=True)
        except ServerFailedError:
            self._next_standby_s = time.monotonic() + STANDBY_BACKOFF_S[-1]

    def _watch(self, now_s: float) -> None:
        assert self.active is not None
        number = self._watchdog.tick(now_s)
        if number is not None:
            self.active.send({"type": "ping", "n": number})
            return
        self._watchdog.end()
        log.error("server %d hangs: it answers nothing for %g s; killing it", self.active.pid, self._watchdog.limit_s)
        self.active.is_hung = True
        self.active.kill(f"hung for {self._watchdog.limit_s:g} s")

    # --- for the keeper ---------------------------------------------------------------------------------

    @property
    def candidate(self) -> ServerProcess | None:
        """The server of an upgrade, while it has no session."""
        upgrade = self._upgrade
        return None if upgrade is None or upgrade.candidate is self.active else upgrade.candidate

    def stop(self) -> None:
        """End all servers, the one that serves by asking it: the session waits for the next keeper's."""
        if self.active is not None and self.active.stage == "ready":
            self.active.send({"type": "stop"})
        self.end()

    def end(self) -> None:
        """Wait for the end of the server that has the session, which is over for it; kill the others."""
        for server in (self.standby, self.candidate):
            if server is not None:
                server.kill("it is not needed any more")
        self.servers.end_all(grace_s=END_LIMIT_S)

    def check_session(self) -> None:
        """Raise SessionEndedError once the session is over."""
        if self._session.has_ended():
            raise SessionEndedError

    def option(self, name: str, otherwise: float) -> float:
        """An option of the server that serves, as a number."""
        text = options_of(self.active).get(name) if self.active is not None else None
        try:
            return float(text) if text is not None else otherwise
        except ValueError:
            return otherwise

    def status(self) -> dict[str, Any]:
        """What there is to tell of the servers, also while none answers."""
        active, standby = self.active, self.standby
        wait_s = None if self.next_active_s is None else max(0.0, round(self.next_active_s - time.monotonic(), 1))
        return {
            "state": self._state(),
            "server_pid": None if active is None else active.pid,
            "server_version": "" if active is None else active.version,
            "standby_pid": None if standby is None else standby.pid,
            "standby_state": "" if standby is None else standby.stage,
            "standby_version": "" if standby is None else standby.version,
            "deaths": self.restarts.deaths,
            "last_death": self.restarts.last_death,
            "next_try_s": wait_s,
            "resend": self.restarts.may_resend,
            "held_fds": len(self._held),
            "config_error": self._config_error,
        }

    def _state(self) -> str:
        if not self.is_serving:
            return "starting"
        if self._upgrade is not None:
            return "upgrading"
        return "serving" if self.active is not None and self.active.stage == "ready" else "restarting"


def _has_come(time_s: float | None, now_s: float) -> bool:
    return time_s is not None and now_s >= time_s
