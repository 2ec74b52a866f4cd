"""The pace of hydration: so many requests at a time and so many bytes a second, for all images together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from basefs.core.request_size import BYTES_FIRST, FAST_BYTES_S, RequestSize
from basefs.core.token_bucket import TokenBucket


@dataclass(slots=True)
class Turn:
    """One piece of work's turn, for `bytes_max` bytes; `moved_bytes` is set by it."""

    bytes_max: int
    moved_bytes: int = 0


class Pace:
    """Turns are given first come, first served, so images share them alike. Owned by the trio loop."""

    def __init__(self, *, concurrency_max: int = 2, bytes_s: int = 0) -> None:
        """`concurrency_max` > 0; `bytes_s` 0: no limit."""
        self.concurrency_max = concurrency_max
        self.request_size = RequestSize()
        """Of all background work, also of that which takes no turns."""
        self._bytes_s = bytes_s
        self._limiter = trio.CapacityLimiter(concurrency_max)
        self._bucket = TokenBucket(bytes_s) if bytes_s else None

    @property
    def is_fast(self) -> bool:
        """Whether bytes come as fast as a processor takes them."""
        return self.request_size.is_fast and not 0 < self._bytes_s < FAST_BYTES_S

    def _bytes_max(self) -> int:
        """A quarter of a second's worth, or a slow pace would be long bursts and long pauses; the least, a second's."""
        if self._bucket is None:
            return self.request_size.bytes
        return min(self.request_size.bytes, max(self._bytes_s // 4, min(BYTES_FIRST, self._bytes_s)))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """A turn for one request. Cancellation: at any time; what was not moved is not charged."""
        async with self._limiter:
            turn = Turn(self._bytes_max())
            if self._bucket is None:
                yield turn
                return
            begin = self._bucket.take(turn.bytes_max, trio.current_time())
            try:
                await trio.sleep_until(begin)
                yield turn
            finally:
                self._bucket.correct(turn.moved_bytes - turn.bytes_max)
