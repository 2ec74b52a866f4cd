"""Times transfers where their bytes come, for `core/link_estimate`: in threads, with one lock for all of them."""

import threading
import time
from collections.abc import Callable

from basefs.core.link_estimate import FetchParameters, LinkEstimate


class TransferTiming:
    """One transfer's times. `came` is called in its thread; the rest is read in the loop when that is done."""

    __slots__ = (
        "_last_at",
        "_meter",
        "_total_at_first",
        "_total_at_last",
        "began_at",
        "first_at",
        "first_bytes",
        "rest_bytes",
        "silence_s",
        "was_alone",
    )

    def __init__(self, meter: "LinkMeter", *, began_at: float, was_alone: bool) -> None:
        self._meter = meter
        self.began_at = began_at
        self.was_alone = was_alone
        self.first_at: float | None = None
        self.first_bytes = 0
        self.rest_bytes = 0
        """What came after the first piece."""
        self.silence_s = 0.0
        """The longest wait for a piece."""
        self._last_at = began_at
        self._total_at_first = self._total_at_last = 0

    @property
    def rest_s(self) -> float:
        """Within how many seconds that came: the pace of the body without its latency."""
        return 0.0 if self.first_at is None else self._last_at - self.first_at

    @property
    def bytes_s(self) -> float | None:
        """How fast the bytes of all transfers came meanwhile; None where that cannot be told."""
        came = self._total_at_last - self._total_at_first
        return came / self.rest_s if came and self.rest_s > 0 else None

    def gave_up(self, now: float) -> None:
        """Nothing comes any more, and something might have."""
        self.silence_s = max(self.silence_s, now - self._last_at)

    def came(self, length: int) -> None:
        """A piece of so many bytes came."""
        now, total = self._meter.count(length)
        self.silence_s = max(self.silence_s, now - self._last_at)
        self._last_at = now
        if self.first_at is None:
            self.first_at, self.first_bytes, self._total_at_first = now, length, total
        else:
            self.rest_bytes += length
            self._total_at_last = total


class LinkMeter:
    """The way to the source of all images, as its transfers show it. One of a service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.estimate = LinkEstimate()
        self._clock = clock
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._under_way = 0

    @property
    def parameters(self) -> FetchParameters:
        """How requests are to be made now."""
        return self.estimate.parameters

    def count(self, length: int) -> tuple[float, int]:
        """The time, and how many bytes came so far, with `length` that came now. For threads."""
        with self._lock:
            self._total_bytes += length
            return self._clock(), self._total_bytes

    def begin(self) -> TransferTiming:
        """A transfer begins; `end` must follow."""
        self._under_way += 1
        return TransferTiming(self, began_at=self._clock(), was_alone=self._under_way == 1)

    def end(self, timing: TransferTiming, *, is_whole: bool) -> None:
        """It is over; of the link only one tells that brought all that it was asked for."""
        self._under_way -= 1
        if not is_whole:
            timing.gave_up(self._clock())
        if not is_whole or timing.first_at is None:
            return
        self.estimate.began(
            timing.first_at - timing.began_at, piece_bytes=timing.first_bytes, was_alone=timing.was_alone
        )
        if timing.bytes_s is not None:
            self.estimate.came(timing.rest_bytes, timing.bytes_s)
