"""The fetch thread's end of a transfer: takes pieces off the source, stores them, tells the loop.

Runs in the thread and shares nothing with the loop but its constructor's arguments, the chunk file's disk
methods, and the `stop` flag (written by the loop, read here; an assignment is atomic).
"""

from typing import Protocol

import trio

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.core.byte_ranges import runs


class Arrived(Protocol):
    """Called in the loop, in the order of the pieces, before the transfer's end is seen there."""

    def __call__(self, first: int, length: int, unstored: bytes | None, error: errors.CacheError | None) -> None:
        """`length` bytes from chunk `first` on are down: in the chunk file, or, if it did not take them, `unstored`."""


class Receiver:
    """One transfer's receiver; `take` is the source's `Deliver`. `file` None: hand everything on in memory."""

    def __init__(
        self,
        file: ChunkFile | None,
        chunk_bytes: int,
        arrived: Arrived,
        token: trio.lowlevel.TrioToken,
        *,
        present: bytes = b"",
    ) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._arrived = arrived
        self._token = token
        self._present = present
        self.stop = False

    def take(self, offset: int, piece: bytes) -> bool:
        """Store one piece of whole chunks and have the loop publish it; False when the transfer shall end.

        Chunks in `present` (here when a stream began) are passed over in silence: a stream proves right only at
        its end, so it must not overwrite bytes that are right, and a chunk that was lost since must not become
        ready by it.
        """
        if self.stop:
            return False
        first = offset // self._chunk_bytes
        stop = first - (-len(piece) // self._chunk_bytes)
        for absent in runs(index for index in range(first, stop) if not self._is_present(index)):
            begin = absent.start * self._chunk_bytes - offset
            self._take(absent.start, piece[begin : begin + len(absent) * self._chunk_bytes])
        return not self.stop

    def _is_present(self, index: int) -> bool:
        return index < len(self._present) and self._present[index] != 0

    def _take(self, first: int, chunks: bytes) -> None:
        unstored: bytes | None = None
        error: errors.CacheError | None = None
        if self._file is None:
            unstored = chunks
        else:
            try:
                self._file.write_piece(first * self._chunk_bytes, chunks)
            except errors.CacheError as exc:
                unstored, error = chunks, exc
        try:
            self._token.run_sync_soon(self._arrived, first, len(chunks), unstored, error)
        except trio.RunFinishedError:
            self.stop = True
