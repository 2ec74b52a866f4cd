"""What the evictor drops, in which order, and that no reader ever sees a hole."""

import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from basefs import errors
from basefs.cache import disk_health
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.eviction_order import PINNED, EvictableImage, rank_of
from basefs.cache.fetch_services import FetchServices
from basefs.cache.ledger import ChunkLedger
from basefs.cache.space import CacheLimits
from basefs.catalog.records import ImageEntry
from basefs.core.inodes import image_inode
from basefs.core.names import base_name_of
from basefs.core.readahead import Window
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings

MIB = 1 << 20
PATIENCE = Patience(deadline_s=30, is_guest=False)
LIMIT = 16 * MIB
IMAGE_BYTES = 6 * MIB + 7


@dataclass
class Node:
    """A handler over memory with a limited cache; `bases` are images with an overlay."""

    handler: DownloadingTemplateImageHandler
    services: FetchServices
    source: MemorySource
    directory: Path
    entries_by_id: dict[str, ImageEntry] = field(default_factory=dict)
    bases: set[str] = field(default_factory=set)
    highest_bytes: int = 0

    def add(self, image_id: str, data: bytes, **fields: object) -> ImageEntry:
        self.source.images[image_id] = data
        entry = make_entry(len(data), image_id=image_id, **fields)
        entry.number = len(self.entries_by_id) + 1
        entry.base_name = base_name_of(image_id)
        self.entries_by_id[image_id] = entry
        return entry

    async def read(self, entry: ImageEntry, offset: int, length: int) -> bytes:
        """Through an open and a close, as the face does it: a hit or a read; checked against the source."""
        image = await self.handler.fetch_image(entry)
        self.handler.opened(entry, image)
        try:
            hit = image.hit(offset, length)
            data = bytes(hit) if hit is not None else await image.read(offset, length, PATIENCE)
        finally:
            await self.handler.released(entry)
        assert data == self.source.images[entry.image_id][offset : offset + length]
        return data

    async def read_whole(self, entry: ImageEntry, step: int = 256 * 1024) -> None:
        for offset in range(0, entry.size, step):
            await self.read(entry, offset, min(step, entry.size - offset))
            self.highest_bytes = max(self.highest_bytes, self.files_bytes())
        await (await self.handler.fetch_image(entry)).fetcher._flights.wait_idle()  # sizes are told at the end
        await self.rest()

    async def rest(self) -> None:
        """Return when the evictor has done what was due: a late sweep gives what came before and after it one age."""
        is_at_work = True
        while is_at_work:
            await trio.testing.wait_all_threads_completed()
            await trio.testing.wait_all_tasks_blocked()
            is_at_work = trio.testing.active_thread_count() > 0

    def files_bytes(self) -> int:
        """What the files hold of the disk, as du counts it."""
        return sum(512 * path.stat().st_blocks for path in self.directory.iterdir())

    def cached(self, entry: ImageEntry) -> int:
        return entry.local.cached_bytes

    # CacheContents

    def prepared(self) -> list[EvictableImage]:
        return [fetcher.eviction for fetcher in self.handler.fetchers()]

    def entries(self) -> list[ImageEntry]:
        return list(self.entries_by_id.values())

    def allocated(self, entry: ImageEntry) -> int:
        return self.services.space.allocated(image_inode(entry.number))

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        found = ["open"] if self.handler.open_handles(entry) else []
        found += ["pinned"] if entry.local.pinned else []
        return found + (["base of x"] if entry.image_id in self.bases else [])

    async def learn_uses(self) -> None:
        await trio.lowlevel.checkpoint()

    async def prepare(self, entry: ImageEntry) -> EvictableImage:
        return (await self.handler.fetch_image(entry)).fetcher.eviction

    async def drop(self, entry: ImageEntry) -> int:
        return await self.handler.remove_image(entry)


@asynccontextmanager
async def a_node(directory: Path, *, limits: CacheLimits | None = None) -> AsyncIterator[Node]:
    source = MemorySource({})
    async with trio.open_nursery() as nursery:
        services = make_services(nursery, source, directory, limits=limits or CacheLimits(max_bytes=LIMIT))
        handler = DownloadingTemplateImageHandler(directory, CHUNK, services, Views("raw"))
        node = Node(handler, services, source, directory)
        nursery.start_soon(services.evictor.run, node)
        yield node
        await handler.close()
        nursery.cancel_scope.cancel()


def data_of(seed: int, size: int = IMAGE_BYTES) -> bytes:
    return random.Random(seed).randbytes(size)


async def test_the_limit_holds_and_every_byte_is_right_whatever_is_read(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        images = [node.add(f"image {n}", data_of(n)) for n in range(6)]
        for image in images * 2:
            await node.read_whole(image)
        assert node.highest_bytes <= LIMIT
        assert node.highest_bytes > LIMIT * 3 // 4, "the cache is used"
        assert node.services.evictor.counters.unstored_bytes == 0, "room is made before bytes come"


async def test_the_least_recently_used_image_goes_first(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        first, second, third = (node.add(f"image {n}", data_of(n)) for n in range(3))
        await node.read_whole(first)
        await node.read_whole(second)
        await node.read_whole(first)
        before = node.source.received_bytes
        await node.read_whole(third)
        assert node.cached(second) < node.cached(first)
        assert node.source.received_bytes - before == third.size


async def test_images_in_use_go_last(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        used = node.add("used", data_of(1))
        base = node.add("base", data_of(2, 4 * MIB))
        node.bases.add("base")
        await node.read_whole(used)
        await node.read_whole(base)
        image = await node.handler.fetch_image(used)
        node.handler.opened(used, image)
        for n in range(10, 14):
            await node.read_whole(node.add(f"other {n}", data_of(n, 3 * MIB)))
            assert node.cached(used) == used.size
            assert node.cached(base) == base.size
        await node.handler.released(used)


async def test_images_in_use_lose_nothing_for_room_that_is_made_ahead(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        base = node.add("base", data_of(1, 10 * MIB))
        node.bases.add("base")
        await node.read_whole(base)
        unused = node.add("unused", data_of(2, 2 * MIB))
        await node.read_whole(unused)
        # What is not in use makes the room that is asked for, but not the batch beyond it.
        async with node.services.evictor.room(5 * MIB) as room:
            assert room.left_bytes
        assert node.cached(unused) == 0
        assert node.cached(base) == base.size


async def test_an_image_larger_than_the_cache_is_read_whole_and_no_byte_twice(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        large = node.add("large", data_of(1, 40 * MIB + 5))
        await node.read_whole(large, step=128 * 1024)
        assert node.source.received_bytes == large.size
        assert node.highest_bytes <= LIMIT


async def test_nothing_is_fetched_twice_by_a_reader_in_order_when_nothing_may_be_stored(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("the cache is full and nothing more may go")
    async with a_node(tmp_path) as node:
        stays = node.add("stays", data_of(1, 15 * MIB), status="deactivated")
        node.bases.add("stays")
        await node.read_whole(stays)
        other = node.add("other", data_of(2))
        before = node.source.received_bytes
        await node.read_whole(other, step=4096 * 3)
        assert node.source.received_bytes - before == other.size
        assert node.services.evictor.is_full
        assert node.cached(stays) == stays.size, "what could not be fetched again is never evicted"


def test_the_order_of_ranks() -> None:
    plain, streamed, pinned, gone = (make_entry(1) for _ in range(4))
    streamed.local.source_kind = "streamed"
    pinned.local.pinned = True
    gone.is_gone = True
    in_order = [
        rank_of(plain, is_in_use=False),
        rank_of(streamed, is_in_use=False),
        rank_of(plain, is_in_use=True),
        rank_of(pinned, is_in_use=True),
    ]
    assert in_order == sorted(in_order) == [0, 1, 2, PINNED]  # type: ignore[type-var]
    assert rank_of(gone, is_in_use=False) == 0
    assert rank_of(gone, is_in_use=True) is None
    assert rank_of(streamed, is_in_use=True) is None


@pytest.mark.parametrize("seed", range(5))
async def test_readers_at_once_over_a_cache_that_thrashes_never_see_a_wrong_byte(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with a_node(tmp_path) as node:
        images = [node.add(f"image {n}", data_of(n)) for n in range(5)]

        async def reader() -> None:
            for _ in range(60):
                image = rng.choice(images)
                offset = rng.randrange(image.size)
                await node.read(image, offset, min(rng.choice((1, 4096, 200_000, MIB)), image.size - offset))
                node.highest_bytes = max(node.highest_bytes, node.files_bytes())

        async with trio.open_nursery() as readers:
            for _ in range(8):
                readers.start_soon(reader)
        assert node.highest_bytes <= LIMIT
        assert node.services.evictor.counters.chunks > 0


@given(seed=st.integers(0, 2**32), sweeps=st.integers(1, 8), evict=st.integers(1, 40))
def test_what_is_evicted_was_used_at_most_one_epoch_after_what_is_kept(seed: int, sweeps: int, evict: int) -> None:
    """The reference is LRU by the exact order of uses; an epoch is the time between two sweeps."""
    rng = random.Random(seed)
    chunks = 64
    ledger = ChunkLedger(bytearray(chunks), None, size=chunks * CHUNK, chunk_bytes=CHUNK)
    epoch_of = dict.fromkeys(range(chunks), 0)
    for index in range(chunks):
        ledger.claim(Window(range(index, index + 1), None))
        ledger.stored(index)
    for epoch in range(1, sweeps + 1):
        ledger.sweep()
        for _ in range(rng.randrange(chunks)):
            index = rng.randrange(chunks)
            ledger.touch(range(index, index + 1))
            epoch_of[index] = epoch
    gone: set[int] = set()
    for age, _ in ledger.ages():
        gone.update(ledger.claim_eviction(age, evict - len(gone)))
        if len(gone) == evict:
            break
    assert len(gone) == evict
    kept = set(range(chunks)) - gone
    assert max(epoch_of[index] for index in gone) <= min(epoch_of[index] for index in kept)


def test_chunks_that_a_reader_has_in_hand_are_not_evicted() -> None:
    ledger = ChunkLedger(bytearray([1]) * 10, None, size=10 * CHUNK, chunk_bytes=CHUNK)
    ledger.hold(range(2, 5))
    ledger.hold(range(2, 5))
    ledger.release(range(2, 5))
    assert ledger.claim_eviction(0, 10) == [0, 1, 5, 6, 7, 8, 9]
    assert ledger.absent(range(10)) == [0, 1, 5, 6, 7, 8, 9]
    ledger.evicted([0, 1, 5, 6, 7, 8, 9])
    ledger.release(range(2, 5))
    assert ledger.claim_eviction(0, 10) == [2, 3, 4]


async def test_a_chunk_that_is_going_is_waited_for_and_fetched_again(tmp_path: Path) -> None:
    """The drop is held back in its thread while a reader asks for the chunk: its hole must not meet the refetch."""
    async with a_node(tmp_path) as node:
        image = node.add("image", data_of(1))
        await node.read_whole(image)
        fetcher = (await node.handler.fetch_image(image)).fetcher
        file = fetcher._ledger.file
        assert file is not None
        dropping, go_on = threading.Event(), threading.Event()
        drop = file.drop

        def held_back(indexes: Sequence[int]) -> None:
            dropping.set()
            go_on.wait(10)
            drop(indexes)

        file.drop = held_back  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.eviction.evict, 0, CHUNK)
            await trio.to_thread.run_sync(dropping.wait, 10)
            assert fetcher.hit(0, 100) is None
            nursery.start_soon(node.read, image, 0, CHUNK)
            await trio.testing.wait_all_tasks_blocked(0.02)
            go_on.set()
        await node.read_whole(image)


async def test_a_stream_over_a_full_cache_comes_once_for_a_reader_in_order(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("one stream")
    expected_warnings("the cache is full and nothing more may go")
    async with a_node(tmp_path) as node:
        stays = node.add("stays", data_of(1, 14 * MIB), status="deactivated")
        node.bases.add("stays")
        await node.read_whole(stays)
        node.source.ranged = False
        streamed = node.add("streamed", data_of(2, 40 * MIB))
        await node.read_whole(streamed)
        streams = [call for call in node.source.calls if call[0] == "stream"]
        assert len(streams) == 1, "it goes no further than its reader"
        assert node.files_bytes() <= LIMIT


async def test_warming_what_does_not_fit_ends_with_the_reason_and_evicts_nothing_in_use(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    async with a_node(tmp_path) as node:
        base = node.add("base", data_of(1))
        node.bases.add("base")
        await node.read_whole(base)
        large = node.add("large", data_of(2, 40 * MIB))
        async with node.handler.warmer.hold(large) as warming:
            with trio.fail_after(60):
                await warming.done.wait()
        assert "no room" in str(warming.error)
        assert node.cached(base) == base.size
        assert node.source.received_bytes < 40 * MIB, "it is not fetched to be thrown away"


async def test_a_disk_that_fails_is_told_once_and_heals_by_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("serving round the cache: .*Input/output error")
    caplog.set_level("INFO", logger="basefs.cache.disk_health")
    is_broken = True

    def written(self: ChunkFile, offset: int, piece: bytes) -> None:
        if is_broken:
            raise errors.CacheError("cache file: Input/output error")
        write_piece(self, offset, piece)

    def probe(path: Path) -> None:
        if is_broken:
            raise OSError(5, "Input/output error")

    write_piece = ChunkFile.write_piece
    monkeypatch.setattr(ChunkFile, "write_piece", written)
    monkeypatch.setattr(disk_health, "_probe", probe)
    async with a_node(tmp_path) as node:
        images = [node.add(f"image {n}", data_of(n)) for n in range(3)]
        for image in images:
            await node.read_whole(image)
        assert not node.services.health.is_usable
        assert node.cached(images[2]) == 0
        is_broken = False
        await trio.sleep(3 * disk_health.DISK_RETRY_S)
        assert node.services.health.is_usable
        await node.read_whole(images[2])
        assert node.cached(images[2]) == images[2].size
    levels = [record.levelname for record in caplog.records if record.name == "basefs.cache.disk_health"]
    assert levels == ["WARNING", "INFO"]
