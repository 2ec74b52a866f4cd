"""The fetch thread's end of a transfer: takes pieces off the source, stores them, tells the loop.

Runs in the thread and shares nothing with the loop but its constructor's arguments, the chunk file's disk
methods, the accountant, and the `stop` flag (written by the loop, read here; an assignment is atomic).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.link_meter import TransferTiming
from basefs.cache.space import CacheSpace, Room
from basefs.core.byte_ranges import runs

Claims = Callable[[int, int], list[range] | None]
"""`claims(first, stop)`: those chunks of a piece that are the caller's to store; None: another body brings the rest."""


class Arrived(Protocol):
    """Called in the loop, in the order of the pieces, before the transfer's end is seen there."""

    def __call__(self, first: int, length: int, unstored: bytes | None, error: errors.CacheError | None) -> None:
        """`length` bytes from chunk `first` on are down: in the chunk file, or, if they are not there, `unstored`.

        `error` is why the disk did not take them; None where there was no room, or nobody tried.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Where a transfer's chunks go, and the room that was promised to it."""

    file: ChunkFile
    inode: int
    space: CacheSpace
    room: Room

    def put(self, offset: int, chunks: memoryview) -> bool:
        """Store whole chunks (thread); False where there is no room for them.

        Raises:
            CacheError: the disk did not take them.
        """
        if not self.space.reserve(len(chunks), self.room):
            return False
        try:
            self.file.write_piece(offset, chunks)
        finally:
            self.space.settle(self.inode, len(chunks), self.file.allocated_bytes)
        return True


class Receiver:
    """One transfer's receiver; `take` is the source's `Deliver`. `store` None: hand everything on in memory.

    `timing` is told of each piece; `claims` says which chunks of it are to be stored, where two bodies bring them.
    `not_stored` runs in the loop, while the thread waits, before chunks from the given one on are handed on in
    memory; True: try once more to store them.
    """

    def __init__(
        self,
        store: Store | None,
        chunk_bytes: int,
        arrived: Arrived,
        token: trio.lowlevel.TrioToken,
        *,
        timing: TransferTiming | None = None,
        claims: Claims | None = None,
        present: bytes = b"",
        not_stored: Callable[[int], Awaitable[bool]] | None = None,
    ) -> None:
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._arrived = arrived
        self._token = token
        self._present = present
        self._not_stored = not_stored
        self._timing = timing
        self._claims = claims
        self.stop = False
        self.is_same = True
        """Whether every chunk in `present` was, by its checksum, what was taken for it."""

    def take(self, offset: int, piece: memoryview) -> bool:
        """Store one piece of whole chunks and have the loop publish it; False when the transfer shall end.

        Chunks in `present` (here when a stream began) are passed over in silence: a stream proves right only at
        its end, so it must not overwrite bytes that are right, and a chunk that was lost since must not become
        ready by it.
        """
        if self.stop:
            return False
        if self._timing is not None:
            self._timing.came(len(piece))
        first = offset // self._chunk_bytes
        stop = first - (-len(piece) // self._chunk_bytes)
        if self._claims is None:
            absent_runs = list(runs(index for index in range(first, stop) if not self._is_present(index)))
        elif (claimed := self._claims(first, stop)) is not None:
            absent_runs = claimed
        else:
            return False
        for absent in absent_runs:
            begin = absent.start * self._chunk_bytes - offset
            self._take(absent.start, piece[begin : begin + len(absent) * self._chunk_bytes])
        for here in runs(index for index in range(first, stop) if self._is_present(index)):
            begin = here.start * self._chunk_bytes - offset
            self._compare(here, piece[begin : begin + len(here) * self._chunk_bytes])
        return not self.stop

    def _compare(self, chunks: range, data: memoryview) -> None:
        if self.is_same:
            self.is_same = self._store is not None and self._store.file.has(chunks, data)

    def _is_present(self, index: int) -> bool:
        return index < len(self._present) and self._present[index] != 0

    def _take(self, first: int, chunks: memoryview) -> None:
        is_stored, error = self._put(first, chunks)
        if not is_stored and self._not_stored is not None and trio.from_thread.run(self._not_stored, first):
            is_stored, error = self._put(first, chunks)
        try:
            # The piece is gone when the loop comes to it.
            unstored = None if is_stored else bytes(chunks)
            self._token.run_sync_soon(self._arrived, first, len(chunks), unstored, error)
        except trio.RunFinishedError:
            self.stop = True

    def _put(self, first: int, chunks: memoryview) -> tuple[bool, errors.CacheError | None]:
        if self._store is None:
            return False, None
        try:
            return self._store.put(first * self._chunk_bytes, chunks), None
        except errors.CacheError as exc:
            return False, exc
