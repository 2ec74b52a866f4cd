"""Checks all local bytes of an image against their checksums, as they are on the disk; for verify and the scrub.

Not checked: whether the image as a whole has the hash that Glance tells; a chunk's checksum was made of the bytes
that Glance sent over its connection.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from basefs import errors
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import ImageEntry
from basefs.core.byte_ranges import runs

log = logging.getLogger(__name__)

STEP_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class CheckProgress:
    """How far the check of one image is; `next_chunk` is where it goes on."""

    image_id: str
    size: int
    cached_bytes: int
    """In the chunk file when the check began."""
    next_chunk: int = 0
    checked_bytes: int = 0
    damaged_chunks: int = 0
    refetched_chunks: int = 0
    error: str | None = None
    """Why damaged chunks were not fetched again, or why it ended early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedImages:
    """How a check comes by an image, and gives it back."""

    open: Callable[[ImageEntry], AbstractAsyncContextManager[ImageFetcher]]
    is_used: Callable[[ImageEntry], bool]
    refetch_deadline_s: float


async def check_image(
    entry: ImageEntry, images: CheckedImages, *, from_chunk: int = 0
) -> AsyncGenerator[CheckProgress, None]:
    """Check chunk after chunk, and yield after about each MiB; what is yielded is the same object every time.

    Damaged chunks are dropped, and fetched again where the image is in use or was complete. An image that is
    evicted meanwhile ends the check.

    Raises:
        CacheError: its files cannot be read.
    """
    async with images.open(entry) as fetcher:
        progress = CheckProgress(image_id=entry.image_id, size=entry.size, cached_bytes=fetcher.cached_bytes)
        was_complete = fetcher.is_complete
        step = max(1, STEP_BYTES // fetcher.chunk_bytes)
        chunks = -(-fetcher.size // fetcher.chunk_bytes)
        for start in range(from_chunk, chunks, step):
            found = await fetcher.check_disk(range(start, min(start + step, chunks)))
            if found is None:
                break
            progress.next_chunk = min(start + step, chunks)
            progress.checked_bytes += found.checked_bytes
            progress.damaged_chunks += len(found.damaged)
            if found.damaged and (was_complete or images.is_used(entry)):
                await _refetch(fetcher, found.damaged, progress, images.refetch_deadline_s)
            if found.checked_bytes:
                yield progress
        yield progress


async def _refetch(fetcher: ImageFetcher, damaged: list[int], progress: CheckProgress, deadline_s: float) -> None:
    for run in runs(damaged):
        offset = run.start * fetcher.chunk_bytes
        length = min(run.stop * fetcher.chunk_bytes, fetcher.size) - offset
        try:
            await fetcher.read(offset, length, deadline_s=deadline_s, patient=False)
        except errors.BasefsError as exc:
            progress.error = str(exc)
            log.info("image %s: damaged chunks are missing until they are read: %s", progress.image_id, exc)
        else:
            progress.refetched_chunks += len(run)
