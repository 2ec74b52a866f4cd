"""Chunks that came down and are not in the cache, kept in memory for a while.

When nothing can be stored (a full cache, a disk that fails), a reader still gets more than it asked for with each
request; without this a reader of 4 KiB at a time would fetch every chunk sixteen times.
"""

from collections import OrderedDict

UNSTORED_BYTES_MAX = 32 << 20


class UnstoredChunks:
    """The last chunks that were not stored, `bytes_max` of all images together. Owned by the trio loop."""

    def __init__(self, bytes_max: int = UNSTORED_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def put(self, number: int, index: int, chunk: bytes) -> None:
        """Keep chunk `index` of image `number`; the least recently used go."""
        self._drop((number, index))
        self._chunks[number, index] = chunk
        self._bytes += len(chunk)
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._chunks)))

    def get(self, number: int, index: int) -> bytes | None:
        """The chunk, if it is kept."""
        chunk = self._chunks.get((number, index))
        if chunk is not None:
            self._chunks.move_to_end((number, index))
        return chunk

    def forget(self, number: int) -> None:
        """Keep nothing of this image."""
        for key in [key for key in self._chunks if key[0] == number]:
            self._drop(key)

    def clear(self) -> None:
        """Keep nothing."""
        self._chunks.clear()
        self._bytes = 0

    def __len__(self) -> int:
        """Chunks that are kept."""
        return len(self._chunks)

    def _drop(self, key: tuple[int, int]) -> None:
        chunk = self._chunks.pop(key, None)
        if chunk is not None:
            self._bytes -= len(chunk)
