"""Whether an endpoint is there: closed (it is), suspected (a request failed, a probe decides), open (it is away).

Pure: time and chance are handed in. Only probes open it, so an image that its store does not deliver (503 to each
of its requests) never does: an ordinary failure makes a probe due, and the probe's answer clears the suspicion.
"""

import math
from collections.abc import Callable
from typing import Literal

from basefs.core.retry import backoff_s

BreakerState = Literal["closed", "suspected", "open"]

PROBES_TO_OPEN = 2
"""Failed probes in a row, after the failed request that made them due: a front's reload is no outage."""
PROBE_BASE_S = 0.25
PROBE_CAP_S = 2.0
"""Longest pause between probes. With the time one may take (2.5 s) an endpoint that is back is found within 4.5 s."""
RETRY_AFTER_MAX_S = 10.0
"""An endpoint that says when to come back is believed up to here."""
PROBE_PAUSE_MIN_S = 0.5
"""Between a probe that was answered, or could not be made, and the next one."""


class Breaker:
    """One endpoint's state machine. Times are seconds of one clock that never goes back.

    Invariants: `probe_at` is finite exactly while the breaker is not closed; it opens only by a failed probe; any
    answer closes it.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.state: BreakerState = "closed"
        self.since = -math.inf
        """When the state began; an open one counts from its suspicion."""
        self.probe_at = math.inf
        """When the next probe is due."""
        self.probes_failed = 0
        self._cleared_at = -math.inf

    def failed(self, now: float) -> None:
        """An ordinary request failed as if the endpoint were away."""
        if self.state == "closed":
            self.state, self.since, self.probes_failed = "suspected", now, 0
            self.probe_at = max(now, self._cleared_at + PROBE_PAUSE_MIN_S)

    def answered(self, now: float) -> None:
        """The endpoint answered something: a probe, or an ordinary request."""
        if self.state != "closed":
            self.state, self.since, self.probe_at = "closed", now, math.inf
            self._cleared_at = now

    def probe_failed(self, now: float, *, retry_after_s: float | None = None) -> None:
        """A probe failed as if the endpoint were away."""
        if self.state == "closed":
            return  # something was answered meanwhile
        self.probes_failed += 1
        if self.state == "suspected" and self.probes_failed >= PROBES_TO_OPEN:
            self.state = "open"
        pause_s = backoff_s(self.probes_failed, base_s=PROBE_BASE_S, cap_s=PROBE_CAP_S, jitter=self._jitter())
        if retry_after_s is not None:
            pause_s = max(pause_s, min(retry_after_s, RETRY_AFTER_MAX_S))
        self.probe_at = now + pause_s

    def put_off(self, now: float) -> None:
        """The probe that was due could not be made."""
        if self.state != "closed":
            self.probe_at = now + PROBE_PAUSE_MIN_S
