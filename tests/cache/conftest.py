"""An image in memory, and a fetcher over it with a chunk file in tmp_path."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from basefs.cache.chunk_file import open_chunk_file
from basefs.cache.fetch_services import FetchCounters
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import ImageEntry, ImageRecord
from basefs.core.chunk_map import ChunkMapHeader
from basefs.core.names import base_name_of
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services

CHUNK = 16 * 1024
IMAGE_ID = "11111111-2222-3333-4444-555555555555"


def make_entry(size: int, **fields: object) -> ImageEntry:
    values = {
        "image_id": IMAGE_ID, "name": "test", "size": size, "disk_format": "raw", "container_format": "bare",
        "status": "active", "visibility": "public", "os_hidden": False, "owner": "me", "created_at": "",
        "updated_at": "", "checksum": None, "os_hash_algo": None, "os_hash_value": None, "is_signed": False,
    }  # fmt: skip
    record = ImageRecord(**{**values, **fields})  # type: ignore[arg-type]
    return ImageEntry(number=7, base_name=base_name_of(record.image_id), record=record)


Fetchers = Callable[..., AbstractAsyncContextManager[ImageFetcher]]


@pytest.fixture
def image() -> bytes:
    """2 MiB and a bit, with chunks of zeros in it; its length fits no chunk."""
    rng = random.Random(7)
    parts = [rng.randbytes(CHUNK) if index % 5 else bytes(CHUNK) for index in range(130)]
    return b"".join(parts) + b"the end"


@pytest.fixture
def source(image: bytes) -> MemorySource:
    return MemorySource({IMAGE_ID: image})


@pytest.fixture
def counters() -> FetchCounters:
    return FetchCounters()


@pytest.fixture
def fetchers(tmp_path: Path, counters: FetchCounters) -> Fetchers:
    @asynccontextmanager
    async def make(source: MemorySource, *, entry: ImageEntry | None = None) -> AsyncIterator[ImageFetcher]:
        entry = entry or make_entry(len(source.images[IMAGE_ID]))
        async with trio.open_nursery() as nursery:
            services = make_services(nursery, source, tmp_path, counters=counters)
            wanted = ChunkMapHeader(image_id=entry.image_id, size=entry.size, chunk_bytes=CHUNK)
            file, states = open_chunk_file(tmp_path, 42, wanted)
            fetcher = ImageFetcher(entry, file, states, file.header.chunk_bytes, services)
            try:
                yield fetcher
            finally:
                with trio.CancelScope(shield=True):
                    await fetcher.close()
                nursery.cancel_scope.cancel()

    return make
