"""When a source that failed is read from again: not before its rest is over, and not before a try of ours went well.

Pure: time and chance are handed in. One for each endpoint of a store, and one for each image at each of its locations.
"""

import math

from basefs.core.retry import backoff_s


class SourceRest:
    """Good until a failure; then it rests, longer after each failed try, until a try goes well.

    Times are seconds of one clock that never goes back. A rest that is over makes a try due (`may_try`), not the
    source good: no reader waits for what may fail again.
    """

    def __init__(self, *, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self.failures = 0
        """Rests since it was good last."""
        self.until = -math.inf
        """When the rest is over; of no meaning while it is good."""

    @property
    def is_good(self) -> bool:
        """Whether it may be read from."""
        return self.failures == 0

    def may_try(self, now: float) -> bool:
        """Whether it is to be found out if it is good again."""
        return self.failures > 0 and now >= self.until

    def failed(self, now: float, *, jitter: float, rest_s_min: float = 0.0) -> None:
        """It failed, and is to rest for `rest_s_min` at least. Requests that were under way together count as one."""
        if self.failures and now < self.until:
            return
        self.failures += 1
        rest_s = backoff_s(self.failures, base_s=self._base_s, cap_s=self._cap_s, jitter=jitter)
        self.until = now + max(rest_s, rest_s_min)

    def answered(self) -> None:
        """A try went well, or an ordinary request."""
        self.failures = 0
