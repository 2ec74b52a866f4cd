"""Stored bytes in memory, in chunks that are here or not; counts the waits that a reader would have had."""

from collections.abc import Callable

import trio

CHUNK = 4096


class MemoryStored:
    """A `ByteSource`. Chunks are cold until they were read, as in the cache; `rounds` counts reads that had to wait."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.warm: set[int] = set()
        self.reads: list[tuple[int, int]] = []
        self.rounds = 0
        self.fetched_bytes = 0
        self.hold: trio.Event | None = None
        self.holding = trio.Event()
        self.error: Exception | None = None
        self._round: trio.Event | None = None
        self.hit: Callable[[int, int], memoryview | bytes | None] = self._hit
        self.hit_into: Callable[[int, memoryview], bool] = self._hit_into

    def warm_up(self, length: int | None = None) -> None:
        """The first `length` bytes are here; all without."""
        self.warm |= set(range(-(-(self.size if length is None else length) // CHUNK)))

    def _is_warm(self, offset: int, size: int) -> bool:
        return self.warm.issuperset(range(offset // CHUNK, -(-(offset + size) // CHUNK)))

    def _hit(self, offset: int, size: int) -> memoryview | bytes | None:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        return memoryview(self.data)[offset : offset + size] if self._is_warm(offset, size) else None

    def _hit_into(self, offset: int, target: memoryview) -> bool:
        assert offset + len(target) <= self.size
        if not self._is_warm(offset, len(target)):
            return False
        target[:] = self.data[offset : offset + len(target)]
        return True

    async def read(self, offset: int, length: int, *, deadline_s: float, patient: bool) -> bytes:
        assert offset >= 0
        assert length > 0
        assert offset + length <= self.size
        assert deadline_s >= 0
        self.reads.append((offset, length))
        if not self._is_warm(offset, length):
            # All that wait at the same time come with one round trip.
            if self._round is None:
                self.rounds += 1
                self._round = trio.Event()
            event = self._round
            self.holding.set()
            if self.hold is not None:
                await self.hold.wait()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            event.set()
            self._round = None
            for chunk in range(offset // CHUNK, -(-(offset + length) // CHUNK)):
                if chunk not in self.warm:
                    self.warm.add(chunk)
                    self.fetched_bytes += CHUNK
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.data[offset : offset + length]
