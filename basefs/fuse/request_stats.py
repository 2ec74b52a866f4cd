"""What the edge counts: how long each kind of request took, which are under way, and what they failed with."""

import errno
import time
from collections import Counter
from collections.abc import Callable

from basefs.core.histogram import DurationHistogram

HUNG_AFTER_S = 10.0
"""A read that waits longer is called hung: an operator should know before the guest's own time-out (SCSI: 30 s)."""


class RequestStats:
    """Owned by the trio loop. Reads that are answered at once do not pass here (`Operations.hits`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.durations: dict[str, DurationHistogram] = {}
        self.errors: Counter[tuple[str, str]] = Counter()
        """By operation and errno's name."""
        self.bugs = 0
        """Exceptions that no one foresaw; each answered EIO and left a traceback in the log."""
        self._clock = clock
        self._last_ticket = 0
        self._under_way: dict[int, tuple[str, float]] = {}  # oldest first

    def begin(self, operation: str) -> int:
        """A request begins; what to hand to `end`."""
        self._last_ticket += 1
        self._under_way[self._last_ticket] = (operation, self._clock())
        return self._last_ticket

    def end(self, ticket: int) -> None:
        """It was answered, or withdrawn."""
        operation, began_s = self._under_way.pop(ticket)
        histogram = self.durations.get(operation)
        if histogram is None:
            histogram = self.durations[operation] = DurationHistogram()
        histogram.add(self._clock() - began_s)

    def failed(self, operation: str, errno_value: int, *, is_bug: bool = False) -> None:
        """It was answered by an error."""
        self.errors[operation, errno.errorcode.get(errno_value, str(errno_value))] += 1
        self.bugs += is_bug

    def under_way(self) -> dict[str, int]:
        """Requests that wait for their answer, by operation."""
        return dict(Counter(operation for operation, _ in self._under_way.values()))

    def hung_reads(self) -> int:
        """Reads that have waited longer than HUNG_AFTER_S."""
        before_s = self._clock() - HUNG_AFTER_S
        hung = 0
        for operation, began_s in self._under_way.values():
            if began_s > before_s:
                break
            hung += operation == "read"
        return hung
