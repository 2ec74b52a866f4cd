"""A histogram of durations: plain numbers that whoever shows them may read at any time."""

from bisect import bisect_left

DURATION_BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""Upper ends of the buckets, inclusive: from an answer out of memory to a guest that waited an outage out."""


class DurationHistogram:
    """How often something took how long. `counts[i]`: longer than bound i - 1, at most bound i; the last: longer."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(DURATION_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        """Count one."""
        self.counts[bisect_left(DURATION_BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def copy(self) -> "DurationHistogram":
        """As it is now."""
        copied = DurationHistogram()
        copied.counts, copied.sum_s = list(self.counts), self.sum_s
        return copied
