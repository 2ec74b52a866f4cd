"""The view that shows the stored bytes as they are: raw, iso, ami, aki, ari, and every format with `view = stored`."""

from collections.abc import Callable
from typing import Protocol


class ByteSource(Protocol):
    """Stored bytes, such as `cache.image_fetcher.ImageFetcher`."""

    size: int
    hit: Callable[[int, int], memoryview | bytes | None]
    """See `ChunkFile.hit`."""
    hit_into: Callable[[int, memoryview], bool]
    """See `ChunkFile.hit_into`."""

    async def read(self, offset: int, length: int, *, deadline_s: float, patient: bool) -> bytes | memoryview:
        """See `ImageFetcher.read`: valid until the next await."""
        ...


class StoredView:
    """Shows `stored` byte for byte. `hit` is the stored bytes' own, so that a hit costs one call."""

    def __init__(self, stored: ByteSource) -> None:
        self._stored = stored
        self.size = stored.size
        self.hit = stored.hit

    async def read(self, offset: int, size: int, *, deadline_s: float, patient: bool) -> bytes | memoryview:
        """What is shown of `[offset, offset + size)`, clipped at the end; see `ImageFetcher.read` for errors."""
        length = min(size, self.size - offset)
        if length <= 0:
            return b""
        return await self._stored.read(offset, length, deadline_s=deadline_s, patient=patient)
