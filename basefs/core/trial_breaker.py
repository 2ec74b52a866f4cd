"""Whether something that has a substitute is to be used: it is, or it is left alone until a trial succeeds.

Pure: time and chance are handed in. Unlike `core/breaker`, one failure is enough: nobody waits for what there is a
substitute for, and a trial a second later says whether it was a moment's.
"""

import math
from collections.abc import Callable

from basefs.core.retry import backoff_s

TRIAL_BASE_S = 1.0
TRIAL_CAP_S = 30.0
"""Longest pause between trials: what is back is used again within that; 1,000 nodes try it 33 to 66 times a second."""
FAILURES_TO_TELL = 2
"""The failure and one trial, before it is worth a record."""


class TrialBreaker:
    """Times are seconds of one clock that never goes back.

    Invariants: a trial is due only while it is away; one at most is under way.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.failures = 0
        """In a row; 0: it is used."""
        self.since = -math.inf
        """When it began to be away, or to be used again."""
        self._trial_at = math.inf

    @property
    def is_away(self) -> bool:
        """Whether it is left alone."""
        return self.failures > 0

    def failed(self, began: float, now: float) -> bool:
        """A use that began at `began` has failed; whether it is left alone for that from now on.

        False where it is away already, or was found to be back after that use began.
        """
        if self.is_away or began < self.since:
            return False
        self.failures, self.since = 1, now
        self._plan(now)
        return True

    def take_trial(self, now: float) -> bool:
        """Whether a trial is due: the caller makes it, and says `trial_ended`."""
        if now < self._trial_at:
            return False
        self._trial_at = math.inf
        return True

    def trial_ended(self, now: float, *, is_back: bool) -> None:
        """What came of the trial that was taken."""
        if is_back:
            self.failures, self.since, self._trial_at = 0, now, math.inf
        else:
            self.failures += 1
            self._plan(now)

    def _plan(self, now: float) -> None:
        self._trial_at = now + backoff_s(self.failures, base_s=TRIAL_BASE_S, cap_s=TRIAL_CAP_S, jitter=self._jitter())
