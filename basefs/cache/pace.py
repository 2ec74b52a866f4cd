"""The pace of hydration: so many requests at a time and so many bytes a second, for all images together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from basefs.core.token_bucket import TokenBucket

REQUEST_BYTES = 4 << 20
"""One request of background work: large enough for what a Glance gives (517 MiB/s with 2-4 of them in flight, rig.md
2.6), and done within 40 ms on a 1 Gbit/s link when a reader comes."""


@dataclass(slots=True)
class Turn:
    """One piece of work's turn; `moved_bytes` is set by it."""

    moved_bytes: int = 0


class Pace:
    """Turns are given first come, first served, so images share them alike. Owned by the trio loop."""

    def __init__(self, *, concurrency_max: int = 2, bytes_s: int = 0) -> None:
        """`concurrency_max` > 0; `bytes_s` 0: no limit."""
        self.concurrency_max = concurrency_max
        self.request_bytes = min(REQUEST_BYTES, bytes_s or REQUEST_BYTES)
        """What one turn is for; a second's worth at most, or a slow pace would be long bursts and long pauses."""
        self._limiter = trio.CapacityLimiter(concurrency_max)
        self._bucket = TokenBucket(bytes_s) if bytes_s else None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """A turn for one request. Cancellation: at any time; what was not moved is not charged."""
        turn = Turn()
        async with self._limiter:
            if self._bucket is None:
                yield turn
                return
            begin = self._bucket.take(self.request_bytes, trio.current_time())
            try:
                await trio.sleep_until(begin)
                yield turn
            finally:
                self._bucket.correct(turn.moved_bytes - self.request_bytes)
