"""Boot traces of one image: what is recorded, what is fetched ahead and in which order, and when that stops."""

import dataclasses
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.image_trace import RECORD_S
from basefs.cache.space import CacheLimits
from basefs.cache.trace_sharing import TraceSharing
from basefs.cache.trace_store import TRACES_MAX, TraceStore, traced_image
from basefs.catalog.records import ImageEntry
from basefs.core.boot_trace import UNIT_BYTES, BootTrace, TracedImage, TraceRecording
from basefs.core.names import base_name_of
from basefs.core.trace_file import FILE_BYTES_MAX, parse_trace, trace_bytes
from basefs.core.trace_plan import STRAYED_MAX
from basefs.core.trace_property import property_of
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.views.choice import Views
from tests.cache.conftest import IMAGE_ID, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings

MIB = 1 << 20
SIZE = 24 * MIB + 777
IMAGE = random.Random(3).randbytes(SIZE)
PLACES = [20 * MIB, 3 * MIB, 21 * MIB + 4096, 2 * MIB, 9 * MIB, 8 * MIB, SIZE - 1]
"""Where a boot reads 256 KiB each, the last one is the last byte: 25 units beyond the header, far apart."""
BOOT = [(place, min(256 * 1024, SIZE - place)) for place in PLACES]


class Node:
    """A handler over IMAGE; each `boot` opens it as the face does."""

    def __init__(self, handler: DownloadingTemplateImageHandler, entry: ImageEntry, source: MemorySource) -> None:
        self.handler = handler
        self.entry = entry
        self.source = source
        self.services = handler._services

    async def fetcher(self) -> ImageFetcher:
        return (await self.handler.downloaded_image(self.entry)).fetcher

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[ImageFetcher]:
        image = await self.handler.fetch_image(self.entry)
        self.handler.opened(self.entry, image)
        try:
            yield await self.fetcher()
        finally:
            await self.handler.released(self.entry)

    async def read(self, fetcher: ImageFetcher, offset: int, length: int, *, is_guest: bool = True) -> None:
        hit = fetcher.hit(offset, length)
        data = hit if hit is not None else await fetcher.read(offset, length, deadline_s=60, patient=is_guest)
        assert data == IMAGE[offset : offset + length]

    async def boot(self, reads: list[tuple[int, int]] = BOOT, *, is_guest: bool = True) -> None:
        """Open, read, close; returns when the trace was kept."""
        async with self.opened() as fetcher:
            for offset, length in reads:
                await self.read(fetcher, offset, length, is_guest=is_guest)
        await fetcher.trace.close()
        await fetcher._flights.wait_idle()

    async def trace(self) -> BootTrace | None:
        return await self.services.traces.read(self.entry)

    async def evict(self) -> None:
        await self.handler.remove_image(self.entry)
        self.source.calls.clear()
        self.source.received_bytes = 0

    async def replayed(self) -> ImageFetcher:
        """Open, wait for the replay, close."""
        async with self.opened() as fetcher:
            await fetcher.trace.wait_replayed()
        await fetcher._flights.wait_idle()
        return fetcher


@asynccontextmanager
async def a_node(
    directory: Path, *, chunk_bytes: int = 64 * 1024, limits: CacheLimits | None = None
) -> AsyncIterator[Node]:
    source = MemorySource({IMAGE_ID: IMAGE})
    async with trio.open_nursery() as nursery:
        services = make_services(nursery, source, directory, limits=limits or CacheLimits())
        handler = DownloadingTemplateImageHandler(directory, chunk_bytes, services, Views("raw"))
        await services.traces.load()
        yield Node(handler, make_entry(SIZE), source)
        await handler.close()
        nursery.cancel_scope.cancel()


def units_of(reads: list[tuple[int, int]]) -> list[int]:
    found: dict[int, None] = {}
    for offset, length in reads:
        found |= dict.fromkeys(range(offset // UNIT_BYTES, (offset + length - 1) // UNIT_BYTES + 1))
    return list(found)


HEAD = range(4)
REPLAYED = {0, *(place // UNIT_BYTES for place in PLACES)}
"""The unit at which each request of a replay begins."""
REPLAYED_BYTES = len(HEAD) * UNIT_BYTES + sum(min(UNIT_BYTES, SIZE - unit * UNIT_BYTES) for unit in units_of(BOOT))


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds: a thread brings it about, which `wait_all_tasks_blocked` does not wait for."""
    with trio.fail_after(30):
        while not condition():
            await trio.lowlevel.checkpoint()


# --- recording


@pytest.mark.parametrize("chunk_bytes", [16 * 1024, 64 * 1024])
async def test_what_a_boot_reads_is_recorded_in_order_and_once(tmp_path: Path, chunk_bytes: int) -> None:
    async with a_node(tmp_path, chunk_bytes=chunk_bytes) as node:
        await node.boot([*BOOT, *BOOT[:2]])
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == units_of(BOOT)
        assert (trace.boots, trace.by_guest) == (1, True)


async def test_chunks_that_were_fetched_and_not_read_are_not_in_the_trace(tmp_path: Path) -> None:
    async with a_node(tmp_path, chunk_bytes=16 * 1024) as node:
        reads = [(place, 4096) for place in range(2 * MIB, 10 * MIB, 256 * 1024)]
        await node.boot(reads)
        assert node.source.received_bytes > 2 * len(reads) * UNIT_BYTES
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == units_of(reads)


async def test_with_large_chunks_the_trace_has_whole_chunks(tmp_path: Path) -> None:
    async with a_node(tmp_path, chunk_bytes=MIB) as node:
        await node.boot([(5 * MIB + 5, 10), (2 * MIB, 1)])
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == [*range(80, 96), *range(32, 48)]


async def test_what_a_guest_did_not_read_itself_is_no_part_of_its_trace(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        async with node.opened() as fetcher:
            await node.read(fetcher, 15 * MIB, 4096, is_guest=False)
            await node.read(fetcher, BOOT[0][0], 4096, is_guest=False)
            for offset, length in BOOT:
                await node.read(fetcher, offset, length)
        await fetcher.trace.close()
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == units_of(BOOT)


@pytest.mark.parametrize("reads", [[(0, 512 * 1024)], [(3 * MIB, 128 * 1024)]], ids=["the header", "too little"])
async def test_a_few_reads_leave_no_trace(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    async with a_node(tmp_path) as node:
        await node.boot(reads)
        assert await node.trace() is None


async def test_a_copy_of_the_image_leaves_no_trace(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot([(offset, min(MIB, SIZE - offset)) for offset in range(0, SIZE, MIB)])
        assert await node.trace() is None


async def test_a_cached_image_is_not_watched(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.handler.warmer.keep(node.entry).done.wait()
        async with node.opened() as fetcher:
            assert all(fetcher.hit(offset, length) is not None for offset, length in BOOT)


async def test_a_recording_ends_after_a_while_and_the_image_stays_open(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with a_node(tmp_path) as node, node.opened() as fetcher:
        for offset, length in BOOT:
            await node.read(fetcher, offset, length)
        await trio.sleep(RECORD_S + 1)
        await node.read(fetcher, 12 * MIB, 4096)
        await trio.testing.wait_all_tasks_blocked()
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == units_of(BOOT)


async def test_boots_are_merged(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        await node.boot([*BOOT[1:], (12 * MIB, 1)])
        trace = await node.trace()
        assert trace is not None
        assert trace.boots == 2
        assert set(trace.units()) == {*units_of(BOOT), 12 * 16}
        assert {part.unread for part in trace.ranges if part.first in units_of(BOOT[:1])} == {1}, "fetched is not read"


# --- replay


async def test_a_replay_brings_what_was_read_in_order_and_little_else(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        fetcher = await node.replayed()
        states = fetcher._ledger.states
        assert {index for index, state in enumerate(states) if state} == {*HEAD, *units_of(BOOT)}
        assert node.source.received_bytes == REPLAYED_BYTES
        assert {offset // UNIT_BYTES for _, offset, _ in node.source.calls} == REPLAYED
        assert node.services.counters.replayed_bytes == node.source.received_bytes
        before = len(node.source.calls)
        await node.boot()
        assert len(node.source.calls) == before


async def test_requests_are_made_in_the_order_of_the_trace(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened():
            await until(lambda: len(node.source.calls) >= 3)
            await trio.testing.wait_all_tasks_blocked()
            # Of the four slots one is left for demand.
            assert [offset // UNIT_BYTES for _, offset, _ in node.source.calls] == [
                0,
                *(place // UNIT_BYTES for place in PLACES[:2]),
            ]
            node.source.hold.set()


async def test_a_reader_who_is_ahead_of_the_replay_has_the_planned_request_made_at_once(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher, trio.open_nursery() as nursery:
            await until(lambda: len(node.source.calls) >= 3)
            nursery.start_soon(node.read, fetcher, 9 * MIB + 128 * 1024, 4096)
            await trio.testing.wait_all_tasks_blocked()
            assert node.source.calls[3:] == [("range", 9 * MIB, 256 * 1024)]
            nursery.start_soon(node.read, fetcher, 9 * MIB, 4096)
            node.source.hold.set()
        await fetcher._flights.wait_idle()
        offsets = [offset for _, offset, _ in node.source.calls]
        assert len(offsets) == len(set(offsets)), "nothing is asked for twice"


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_read_during_a_replay_every_byte_is_right_and_comes_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with a_node(tmp_path, chunk_bytes=16 * 1024) as node:
        await node.boot()
        await node.evict()

        async def guest() -> None:
            for _ in range(30):
                place = (
                    rng.choice(PLACES[:-1]) + rng.randrange(256 * 1024) if rng.random() < 0.7 else rng.randrange(SIZE)
                )
                await node.read(fetcher, place, min(rng.choice([512, 4096, 200_000]), SIZE - place))

        async with node.opened() as fetcher, trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(guest)
        await fetcher._flights.wait_idle()
        assert node.source.received_bytes == fetcher.cached_bytes


async def test_readers_who_leave_the_trace_end_the_replay(tmp_path: Path) -> None:
    async with a_node(tmp_path, chunk_bytes=16 * 1024) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher:
            await until(lambda: len(node.source.calls) >= 3)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.read, fetcher, 14 * MIB, (STRAYED_MAX - 1) * 16 * 1024)
                await trio.testing.wait_all_tasks_blocked()
                assert len(fetcher._transfers.plan) > 0
                nursery.start_soon(node.read, fetcher, 13 * MIB, 4096)
                await trio.testing.wait_all_tasks_blocked()
                assert len(fetcher._transfers.plan) == 0
                node.source.hold.set()
        await fetcher._flights.wait_idle()
        assert 9 * MIB not in [offset for _, offset, _ in node.source.calls]


async def test_misses_outside_the_trace_end_the_replay_of_an_image_that_is_partly_here(tmp_path: Path) -> None:
    async with a_node(tmp_path, chunk_bytes=16 * 1024) as node:
        await node.boot()
        await node.evict()
        known, node.services.traces._names = node.services.traces._names, set()
        await node.boot([(10 * MIB, 3 * MIB), (15 * MIB, 3 * MIB)])  # and no replay meanwhile
        node.services.traces._names = known
        node.source.hold = trio.Event()
        node.source.calls.clear()
        async with node.opened() as fetcher, trio.open_nursery() as nursery:
            assert not fetcher._ledger.is_watched
            await until(lambda: len(node.source.calls) >= 3)
            nursery.start_soon(node.read, fetcher, 13 * MIB, STRAYED_MAX * 16 * 1024)
            await until(lambda: len(fetcher._transfers.plan) == 0)
            node.source.hold.set()


async def test_a_close_ends_the_replay_and_the_next_open_goes_on(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher:
            await until(lambda: len(node.source.calls) >= 3)
        assert len(fetcher._transfers.plan) == 0
        async with node.opened() as fetcher:
            await until(lambda: len(fetcher._transfers.plan) > 0)
            node.source.hold.set()
            await fetcher.trace.wait_replayed()
        await fetcher._flights.wait_idle()
        assert len(node.source.calls) == len(REPLAYED)
        assert node.source.received_bytes == REPLAYED_BYTES


async def test_a_warming_replays_the_trace_before_all_else(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        warming = node.handler.warmer.keep(node.entry)
        await warming.done.wait()
        assert warming.error is None
        first = {offset // UNIT_BYTES for _, offset, _ in node.source.calls[: len(REPLAYED)]}
        assert first == REPLAYED
        assert node.source.received_bytes == SIZE


async def test_a_request_that_fails_is_left_to_demand_and_the_rest_goes_on(
    tmp_path: Path, expected_warnings: ExpectedWarnings, clock: trio.testing.MockClock
) -> None:
    expected_warnings("503")
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.faults = [errors.SourceUnavailableError("503")]
        await node.replayed()
        assert len(node.source.calls) == len(REPLAYED)
        await node.boot()


async def test_a_refusal_ends_the_replay(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings("403")
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher:
            await until(lambda: len(node.source.calls) >= 3)
            node.source.faults = [errors.SourceForbiddenError("403")] * 3
            node.source.hold.set()
            await fetcher.trace.wait_replayed()
        assert len(node.source.calls) == 3


async def test_a_cache_that_has_no_room_is_not_filled_by_a_replay(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
    async with a_node(tmp_path, limits=CacheLimits(max_bytes=64 * 1024)) as node:
        await node.handler.remove_image(node.entry)
        await node.replayed()
        assert node.source.calls == []


def put_in_the_way_of_maps(directory: Path) -> None:
    for path in directory.glob("*.map"):
        path.unlink()
        path.mkdir()


async def test_an_image_without_a_chunk_file_is_not_replayed(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("serving it round the cache")
    async with a_node(tmp_path) as node:
        await node.boot()
    put_in_the_way_of_maps(tmp_path)
    async with a_node(tmp_path) as node:
        await node.replayed()
        assert node.source.calls == []
        await node.boot(BOOT[:1])


async def test_a_streamed_image_is_not_replayed(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.entry.local.source_kind = "streamed"
        await node.replayed()
        assert node.source.calls == []


async def test_an_image_that_is_sealed_is_not_replayed(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.entry.local.whole = "quarantined"
        await node.replayed()
        assert node.source.calls == []


# --- the store


def trace_of(entry: ImageEntry, units: list[int], image: TracedImage | None = None) -> BootTrace:
    recording = TraceRecording()
    recording.note(units, 0)
    return recording.trace(image or traced_image(entry), by_guest=True)


async def test_a_trace_outlives_the_bytes_and_the_server(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        trace = await node.trace()
    async with a_node(tmp_path) as node:
        assert node.services.traces.may_have(node.entry)
        assert await node.trace() == trace
        await node.evict()
        assert await node.trace() == trace


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "byte 0: not JSON"),
        (b"x" * (FILE_BYTES_MAX + 100), "it has 65537 bytes"),
        (trace_bytes(trace_of(make_entry(SIZE + 1), [5])), "size: 25166602, the image has 25166601"),
    ],
)
async def test_a_file_that_is_no_trace_of_the_image_is_told_once_and_replaced_by_the_next_boot(
    tmp_path: Path, expected_warnings: ExpectedWarnings, data: bytes, said: str
) -> None:
    expected_warnings(f"image {IMAGE_ID}: its boot trace .* is not used: {said}")
    path = tmp_path / "traces" / (base_name_of(IMAGE_ID) + ".json")
    path.parent.mkdir()
    path.write_bytes(data)
    async with a_node(tmp_path) as node:
        await node.boot()
        trace = await node.trace()
        assert trace is not None
        assert list(trace.units()) == units_of(BOOT)
        assert parse_trace(path.read_bytes()) == trace


async def test_only_the_newest_traces_stay(tmp_path: Path) -> None:
    directory = tmp_path / "traces"
    directory.mkdir()
    names = [base_name_of(str(n)) for n in range(TRACES_MAX + 3)]
    for age, name in enumerate(names):
        (directory / f"{name}.json").write_bytes(b"")
        os.utime(directory / f"{name}.json", (1e9 - age, 1e9 - age))
    (directory / "README").write_bytes(b"an operator's")
    async with trio.open_nursery() as nursery:
        store: TraceStore = make_services(nursery, MemorySource({}), tmp_path).traces
        await store.load()
    assert {path.stem for path in directory.iterdir()} == {*names[:TRACES_MAX], "README"}


async def test_a_disk_that_takes_no_trace_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "traces").write_bytes(b"in the way")
    async with a_node(tmp_path) as node:
        await node.boot()
        assert await node.trace() is None
        await node.evict()
        await node.boot()


# --- from other nodes


async def test_a_node_that_never_booted_the_image_replays_what_another_has_shared(tmp_path: Path) -> None:
    async def nothing(_image_id: str, _text: str) -> None:
        raise AssertionError("a boot that is in Glance already is not given again")

    for name in ("other", "new"):
        (tmp_path / name).mkdir()
    async with a_node(tmp_path / "other") as node:
        await node.boot()
        known = await node.trace()
        assert known is not None
    async with a_node(tmp_path / "new") as node:
        node.services.traces._sharing = TraceSharing(nothing, node.services.nursery, lambda: 0.0, spread_s=0.0)
        node.entry.record = dataclasses.replace(node.entry.record, boot_trace=property_of(known))
        await node.replayed()
        assert {offset // UNIT_BYTES for _, offset, _ in node.source.calls} == REPLAYED
        await node.evict()
        await node.boot()
        own = await node.trace()
        assert own is not None
        assert own.boots == 2


# --- servers that follow, and volumes


async def test_a_server_that_follows_goes_on_with_a_replay(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        assert not node.entry.local.is_replaying
        node.source.hold = trio.Event()
        image = await node.handler.fetch_image(node.entry)
        node.handler.opened(node.entry, image)
        await until(lambda: len(node.source.calls) >= 3)
        assert node.entry.local.is_replaying, "which is kept with the state of images"
        entry = node.entry
    async with a_node(tmp_path) as node:
        node.entry = entry
        node.handler.restore_opens({entry.number: 1})
        fetcher = (await node.handler.downloaded_image(entry)).fetcher
        assert not fetcher.trace.is_replaying, "nobody reads"
        await node.handler.fetch_image(entry)
        await fetcher.trace.wait_replayed()
        await fetcher._flights.wait_idle()
        assert {offset // UNIT_BYTES for _, offset, _ in node.source.calls} == REPLAYED
        assert not entry.local.is_replaying
        await node.handler.released(entry)


async def test_a_replay_that_ended_is_no_other_servers(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher:
            await until(lambda: len(node.source.calls) >= 3)
            node.source.hold.set()
        assert not node.entry.local.is_replaying
        await fetcher._flights.wait_idle()
        await node.evict()
        node.handler.restore_opens({node.entry.number: 1})
        await node.handler.fetch_image(node.entry)
        await trio.testing.wait_all_tasks_blocked()
        assert not node.source.calls
        await node.handler.released(node.entry)


@pytest.mark.parametrize("is_linked", [True, False])
async def test_an_image_that_will_be_linked_is_replayed_only_if_it_is_not(tmp_path: Path, is_linked: bool) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.handler.expects_volume = lambda entry: entry is node.entry
        async with node.opened() as fetcher:
            await trio.testing.wait_all_tasks_blocked()
            assert not fetcher.trace.is_replaying
            node.handler.note_link(node.entry, is_linked=is_linked)
            assert fetcher.trace.is_replaying is not is_linked
            await fetcher.trace.wait_replayed()
            node.handler.note_link(node.entry, is_linked=False)
            assert not fetcher.trace.is_replaying, "one that failed to be linked again was replayed before"


async def test_a_replay_ends_when_the_image_is_linked(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.boot()
        await node.evict()
        node.source.hold = trio.Event()
        async with node.opened() as fetcher:
            await until(lambda: len(node.source.calls) >= 3)
            node.handler.note_link(node.entry, is_linked=True)
            assert len(fetcher._transfers.plan) == 0
            node.source.hold.set()
        await fetcher._flights.wait_idle()
        assert 9 * MIB not in [offset for _, offset, _ in node.source.calls]
