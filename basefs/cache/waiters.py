"""Readers that wait for chunks, and how a chunk that came down wakes exactly those whose last one it was.

All of it is owned by the trio loop; nothing here awaits but the waiters themselves.
"""

from collections.abc import Iterable

import trio

from basefs import errors


class Waiter:
    """One reader's wait for some chunks.

    After `done`: `unstored` holds chunks that are not in the cache (empty bytes where it does not keep them),
    `error` is why the rest will not come by itself (None: look again).
    """

    __slots__ = ("_keeps", "done", "error", "missing", "unstored")

    def __init__(self, missing: Iterable[int], *, keeps: bool) -> None:
        self.missing = set(missing)
        self.unstored: dict[int, bytes] = {}
        self._keeps = keeps
        self.error: errors.BasefsError | None = None
        self.done = trio.Event()

    def put_unstored(self, index: int, chunk: bytes) -> None:
        """Chunk `index` is down and not in the cache."""
        self.unstored[index] = chunk if self._keeps else b""


class WaiterBoard:
    """All waiters of one image, by chunk. Invariant: a waiter is listed under exactly its `missing` chunks."""

    def __init__(self) -> None:
        self._by_chunk: dict[int, set[Waiter]] = {}
        self._added = trio.Event()

    def __len__(self) -> int:
        """Chunks somebody waits for."""
        return len(self._by_chunk)

    def add(self, chunks: Iterable[int], *, keeps: bool = True) -> Waiter:
        """A wait for all of `chunks`, which is not empty; `leave` must follow, whatever happens.

        `keeps`: whether it wants chunks that are not in the cache; who waits for a whole image does not.
        """
        waiter = Waiter(chunks, keeps=keeps)
        self._added.set()
        self._added = trio.Event()
        for index in waiter.missing:
            self._by_chunk.setdefault(index, set()).add(waiter)
        return waiter

    async def wait_wanted(self, first: int) -> None:
        """Return when somebody waits for a chunk from `first` on."""
        while not any(index >= first for index in self._by_chunk):
            await self._added.wait()

    def leave(self, waiter: Waiter) -> None:
        """Take a waiter off the board; does nothing for one that is off."""
        for index in waiter.missing:
            waiters = self._by_chunk.get(index)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._by_chunk[index]
        waiter.missing.clear()

    def arrived(self, index: int, unstored: bytes | None = None) -> None:
        """Chunk `index` is down: in the cache, or, if the disk did not take it, as `unstored`."""
        for waiter in self._by_chunk.pop(index, ()):
            waiter.missing.discard(index)
            if unstored is not None:
                waiter.put_unstored(index, unstored)
            if not waiter.missing:
                waiter.done.set()

    def failed(self, indexes: Iterable[int], error: errors.BasefsError | None) -> None:
        """These chunks will not come from the flight that had them; None says: look again at once."""
        for index in indexes:
            for waiter in list(self._by_chunk.get(index, ())):
                waiter.error = error
                self.leave(waiter)
                waiter.done.set()

    def all_failed(self, error: errors.BasefsError | None) -> None:
        """No chunk anybody waits for will come by itself."""
        self.failed(list(self._by_chunk), error)
