"""When a request is late enough for a second one, and how many of those there may be. Pure: times are handed in.

A request that a reader waits for is late when no piece of it has come for longer than at 99 of 100 of the last ones of
its size: lost packets and a busy worker of Glance look like that, a slow link does not, for there all are slow.
"""

import math
from collections import deque

SAMPLES_MAX = 256
SAMPLES_MIN = 100
"""Fewer have no hundredth."""
LATE_MIN_S = 0.05
"""No guest notices less, and on a busy node a thread may get no processor for so long."""
LATE_FACTOR_MIN = 2.0
"""Times the median: where all requests take the same time the hundredth is no late one."""
REQUESTS_SHARE, BYTES_SHARE = 0.02, 0.04
"""Of demand: so many second requests at the most, and bytes in them."""
REQUESTS_BURST, BYTES_BURST = 3.0, 8 << 20
"""What was not used is saved up to here. The first hundred requests, which hedge nothing, save the first two."""


class Hedges:
    """What demand of all images has shown, and what of it may be asked for twice."""

    def __init__(self) -> None:
        self.hedged = 0
        """Second requests so far."""
        self.won = 0
        """Those that were quicker than the first."""
        self._silences: dict[int, deque[float]] = {}
        self._requests, self._bytes = 0.0, 0.0

    def came(self, length: int, silence_s: float) -> None:
        """A request that a reader waited for, of `length` > 0 bytes, had to wait so long for a piece at the most.

        One that was given up counts, too, with what it had waited by then.
        """
        size_class = length.bit_length()
        self._silences.setdefault(size_class, deque(maxlen=SAMPLES_MAX)).append(silence_s)
        self._requests = min(self._requests + REQUESTS_SHARE, REQUESTS_BURST)
        self._bytes = min(self._bytes + BYTES_SHARE * length, BYTES_BURST)

    def late_after_s(self, length: int) -> float | None:
        """How long a request of `length` bytes may be silent; None: there were too few like it."""
        silences = self._silences.get(length.bit_length(), ())
        if len(silences) < SAMPLES_MIN:
            return None
        ordered = sorted(silences)
        median, hundredth = ordered[len(ordered) // 2], ordered[math.ceil(0.99 * len(ordered)) - 1]
        return max(hundredth, LATE_FACTOR_MIN * median, LATE_MIN_S)

    def may_spend(self, length: int) -> bool:
        """Whether a second request for `length` bytes may be made; it is charged at once if so."""
        if self._requests < 1 or self._bytes < length:
            return False
        self._requests -= 1
        self._bytes -= length
        self.hedged += 1
        return True
