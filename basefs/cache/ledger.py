"""What is known of each chunk of one image. Owned by the trio loop; every method is one synchronous step.

One byte a chunk: MISSING; STORED (a checksum from an earlier life, not yet verified); READY; CLAIMED (one
ranged flight fetches it). `ready` in the chunk file is set for exactly the READY chunks.
"""

from collections.abc import Iterable

from basefs.cache.chunk_file import ChunkFile
from basefs.core.readahead import MISSING, Window

STORED, READY, CLAIMED = 1, 2, 3
_IN_FILE = bytes([STORED, READY])


class ChunkLedger:
    """The states of an image's chunks, in step with the chunk file's `ready` bytes."""

    def __init__(self, states: bytearray, file: ChunkFile | None, *, size: int, chunk_bytes: int) -> None:
        self.states = states
        self.file = file
        self.size = size
        self.chunk_bytes = chunk_bytes
        self._markers: dict[int, int] = {}  # to the length of their window, in chunks

    @property
    def cached_bytes(self) -> int:
        """Image bytes in the chunk file, exactly (the last chunk may be short)."""
        chunks = self.states.count(READY) + self.states.count(STORED)
        short = len(self.states) * self.chunk_bytes - self.size
        return chunks * self.chunk_bytes - (short if self.states and self.states[-1] in (STORED, READY) else 0)

    def absent(self, span: Iterable[int]) -> list[int]:
        """Those of `span` that are not here, whether on their way or not."""
        return [index for index in span if self.states[index] in (MISSING, CLAIMED)]

    def here(self, span: range) -> list[int]:
        """Those of `span` that are in the chunk file, verified or not."""
        return [index for index in span if self.states[index] in (STORED, READY)]

    def may_check_at_once(self, span: range) -> bool:
        """Whether all of `span` is in the chunk file, some of it not verified, and no marker is to be told."""
        states = self.states[span.start : span.stop]
        if STORED not in states or states.strip(_IN_FILE):
            return False
        return not self._markers or not any(index in span for index in self._markers)

    def unverified(self, span: range) -> list[int]:
        """Those of `span` that must be verified before they are served."""
        if STORED not in self.states[span.start : span.stop]:
            return []
        return [index for index in span if self.states[index] == STORED]

    def claim(self, window: Window) -> None:
        """Give the window's chunks, all MISSING, to one flight."""
        chunks = window.chunks
        self.states[chunks.start : chunks.stop] = bytes([CLAIMED]) * len(chunks)
        if window.marker is not None:
            self._markers[window.marker] = len(chunks)

    def unclaim(self, chunks: range) -> list[int]:
        """A flight is over: its chunks that did not become READY are MISSING again, and returned."""
        lost = [index for index in chunks if self.states[index] == CLAIMED]
        for index in lost:
            self.states[index] = MISSING
            self._markers.pop(index, None)
        return lost

    def stored(self, index: int) -> None:
        """The chunk was written in this life, or its checksum was verified: serve it."""
        if self.states[index] != READY:
            self.states[index] = READY
            if self.file is not None:
                self.file.mark_ready(index, marker=index in self._markers)

    def not_stored(self, index: int) -> None:
        """The chunk came down and the disk did not take it."""
        if self.states[index] == CLAIMED:
            self.states[index] = MISSING

    def lose(self, index: int) -> None:
        """The chunk's local bytes are damaged or gone: do not serve them."""
        if self.states[index] in (STORED, READY):
            self.states[index] = MISSING
            if self.file is not None:
                self.file.mark_not_ready(index)

    def touch_markers(self, span: range) -> list[tuple[int, int]]:
        """The read-ahead markers in `span` and the lengths of their windows; they are then unset."""
        touched = [index for index in self._markers if index in span] if self._markers else []
        for index in touched:
            if self.states[index] == READY and self.file is not None:
                self.file.mark_ready(index)
        return [(index, self._markers.pop(index)) for index in touched]
