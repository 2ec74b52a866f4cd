"""Hydration: what is completed, in which order, how fast, and when it waits or stops."""

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.hydrator import LOOK_PAUSE_S, LOWER_AGAIN_S, HydrationSettings, Hydrator
from basefs.cache.pace import Pace
from basefs.cache.space import CacheLimits
from basefs.catalog.records import ImageEntry
from basefs.core.request_size import BYTES_FIRST
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.cache.test_eviction import Node, data_of

MIB = 1 << 20
DELAY_S = 60.0


@dataclass
class HydratedNode(Node):
    """A node of `test_eviction` with a hydrator: the images in `bases` have overlays."""

    hydrator: Hydrator = field(init=False)
    linked: set[int] = field(default_factory=set)
    lower: set[str] = field(default_factory=set)
    graduated: list[str] = field(default_factory=list)
    graduation_errors: list[errors.BasefsError] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def is_linked(self, entry: ImageEntry) -> bool:
        return entry.number in self.linked

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        return super().why_in_use(entry) + (["wanted"] if entry.local.is_wanted else [])

    def now_ns(self) -> int:
        return int(trio.current_time() * 1e9)

    async def check(self, entry: ImageEntry) -> None:
        await trio.lowlevel.checkpoint()

    async def is_lower(self, entry: ImageEntry) -> bool:
        await trio.lowlevel.checkpoint()
        return entry.image_id in self.lower

    async def graduate(self, entry: ImageEntry) -> None:
        await trio.lowlevel.checkpoint()
        assert entry.local.whole in ("verified", "no_hash")
        assert entry.local.cached_bytes == entry.size
        if self.graduation_errors:
            raise self.graduation_errors.pop(0)
        self.graduated.append(entry.image_id)

    def use(self, entry: ImageEntry, *, used_s_ago: float = DELAY_S) -> ImageEntry:
        """An overlay is on it, since so long."""
        self.bases.add(entry.image_id)
        entry.local.used_at_ns = self.now_ns() - int(used_s_ago * 1e9)
        self.hydrator.wake()
        return entry

    def unuse(self, entry: ImageEntry) -> None:
        self.bases.discard(entry.image_id)
        self.hydrator.wake()

    async def wait(self, condition: Callable[[], object], limit_s: float = 3600.0) -> None:
        """Until the condition holds, looked at whenever something of an image has changed."""
        with trio.fail_after(limit_s):
            while not condition():  # some of what is waited for changes nothing of an image
                with trio.move_on_after(LOOK_PAUSE_S):
                    await self.changed.wait()

    def note_change(self, _entry: ImageEntry) -> None:
        self.changed.set()
        self.changed = trio.Event()


@asynccontextmanager
async def hydrated_node(
    directory: Path,
    *,
    limits: CacheLimits | None = None,
    pace: Pace | None = None,
    is_on: bool = True,
    look_s: float = 0.0001,
) -> AsyncIterator[HydratedNode]:
    """`look_s`: what a look at all images takes."""
    source = MemorySource({})
    async with trio.open_nursery() as nursery:
        services = make_services(
            nursery, source, directory, limits=limits or CacheLimits(), pace=pace,
            changed=lambda entry: node.note_change(entry),
        )  # fmt: skip
        handler = DownloadingTemplateImageHandler(directory, CHUNK, services, Views("raw"))
        node = HydratedNode(handler, services, source, directory)
        node.hydrator = Hydrator(
            node, handler.warmer, node, HydrationSettings(is_on=is_on, delay_s=DELAY_S), services.outage,
            services.changed, now_ns=node.now_ns, timer=partial(next, itertools.count(0.0, look_s)),
        )  # fmt: skip
        handler.uses_changed = node.hydrator.wake
        if limits is not None:
            nursery.start_soon(services.evictor.run, node)
        nursery.start_soon(node.hydrator.run)
        yield node
        await handler.close()
        nursery.cancel_scope.cancel()


def is_done(entry: ImageEntry) -> bool:
    return entry.local.cached_bytes == entry.size and entry.local.whole in ("verified", "no_hash")


async def test_an_image_in_use_is_completed_and_one_that_nobody_uses_is_not(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path) as node:
        used, unused = node.add("used", data_of(1)), node.add("unused", data_of(2))
        node.use(used)
        await node.wait(lambda: is_done(used))
        assert node.source.received_bytes == used.size
        assert unused.local.cached_bytes == 0
        assert node.services.counters.hydrated_bytes == used.size
        await node.wait(lambda: node.graduated == ["used"])


async def test_open_pinned_and_wanted_images_are_completed(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path) as node:
        opened, pinned, wanted = (node.add(name, data_of(n, MIB)) for n, name in enumerate(("open", "pin", "want")))
        opened.local.used_at_ns = node.now_ns() - int(DELAY_S * 1e9)
        node.handler.opened(opened, await node.handler.fetch_image(opened))
        pinned.local.pinned = True
        wanted.local.used_at_ns = node.now_ns()
        node.handler.warm(wanted)
        assert wanted.local.is_wanted
        await node.wait(lambda: all(map(is_done, (opened, pinned, wanted))))
        await node.wait(lambda: len(node.graduated) == 3)
        assert not wanted.local.is_wanted, "it was had"
        await node.handler.released(opened)


async def test_an_image_that_is_wanted_just_after_a_look_is_begun_at_once(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path) as node:
        await trio.testing.wait_all_tasks_blocked()
        node.hydrator.wake()
        await trio.sleep(0.001)
        begun_at = trio.current_time()
        node.handler.warm(node.add("wanted", data_of(1)))
        await node.wait(lambda: node.source.calls)
        assert trio.current_time() - begun_at < 0.01


@pytest.mark.parametrize(("look_s", "pause_s"), [(0.001, 0.05), (0.02, 1.0), (3.0, LOOK_PAUSE_S)])
async def test_looks_at_many_images_take_a_fiftieth_of_the_time(
    tmp_path: Path, clock: trio.testing.MockClock, look_s: float, pause_s: float
) -> None:
    async with hydrated_node(tmp_path, look_s=look_s) as node:
        await trio.testing.wait_all_tasks_blocked()
        looked_at = trio.current_time()  # the first look, just now
        node.handler.warm(node.add("wanted", data_of(1)))
        await node.wait(lambda: node.source.calls)
        assert trio.current_time() - looked_at == pytest.approx(pause_s)


async def test_nothing_begins_before_the_delay_after_the_first_use_is_over(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path) as node:
        entry = node.use(node.add("new", data_of(1)), used_s_ago=0)
        begun_at = trio.current_time()
        await node.wait(lambda: node.source.calls)
        assert trio.current_time() - begun_at >= DELAY_S
        await node.wait(lambda: is_done(entry))


async def test_the_biggest_hole_is_filled_first(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(concurrency_max=1)) as node:
        entry = node.add("holes", data_of(1, 40 * MIB))
        await node.read(entry, 3 * MIB, CHUNK)
        await node.read(entry, 30 * MIB, CHUNK)
        await (await node.handler.fetch_image(entry)).fetcher._flights.wait_idle()
        here = len(node.source.calls)
        node.use(entry)
        await node.wait(lambda: is_done(entry))
        calls = [(offset, length) for _, offset, length in node.source.calls[here:]]
        assert 3 * MIB < calls[0][0] < 5 * MIB, "between the two that were read"
        assert calls[0][1] == BYTES_FIRST
        in_middle = [offset for offset, _ in calls if 3 * MIB < offset < 30 * MIB]
        assert [offset for offset, _ in calls[: len(in_middle)]] == sorted(in_middle)
        assert calls[len(in_middle)][0] > 30 * MIB
        assert calls[-1][0] == 0
        assert node.source.received_bytes == entry.size, "no byte twice"


async def test_the_rate_is_kept_over_all_images(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(concurrency_max=4, bytes_s=MIB)) as node:
        entries = [node.use(node.add(f"image {n}", data_of(n, 8 * MIB))) for n in range(3)]
        begun_at = trio.current_time()
        await node.wait(lambda: node.source.received_bytes >= 12 * MIB)
        assert trio.current_time() - begun_at >= 10
        shares = sorted(entry.local.cached_bytes for entry in entries)
        assert shares[2] - shares[0] <= 2 * MIB, "alike"
        await node.wait(lambda: all(map(is_done, entries)))
        assert trio.current_time() - begun_at >= 22


async def test_so_many_requests_are_in_flight_and_no_more(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(concurrency_max=2)) as node:
        node.source.hold = trio.Event()
        entries = [node.use(node.add(f"image {n}", data_of(n, 9 * MIB))) for n in range(3)]
        await trio.sleep(100)
        assert node.source.requests == 2
        node.source.hold.set()
        await node.wait(lambda: all(map(is_done, entries)))


async def test_nothing_begins_while_a_reader_waits(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path) as node, trio.open_nursery() as readers:
        other, entry = node.add("other", data_of(1)), node.add("used", data_of(2, 20 * MIB))
        node.source.hold = trio.Event()
        readers.start_soon(node.read, other, 0, CHUNK)
        await node.wait(lambda: node.services.readers.count == 1)
        node.use(entry)
        await trio.sleep(20)
        assert node.source.requests == 1, "the reader's own"
        node.source.hold.set()
        await node.wait(lambda: is_done(entry))
        assert node.services.readers.count == 0


async def test_it_stops_when_the_use_ends_and_goes_on_when_it_begins_again(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path, pace=Pace(bytes_s=MIB)) as node:
        entry = node.use(node.add("used", data_of(1, 20 * MIB)))
        await node.wait(lambda: entry.local.cached_bytes > 4 * MIB)
        assert node.handler.is_hydrating(entry)
        node.unuse(entry)
        await node.wait(lambda: not node.handler.is_hydrating(entry))
        stopped_at = node.source.received_bytes
        await trio.sleep(1000)
        assert node.source.received_bytes == stopped_at
        node.use(entry)
        await node.wait(lambda: is_done(entry))
        assert node.source.received_bytes == entry.size, "no byte twice"


async def test_removing_an_image_stops_its_hydration(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(bytes_s=MIB)) as node:
        entry = node.use(node.add("used", data_of(1, 20 * MIB)))
        await node.wait(lambda: entry.local.cached_bytes > 4 * MIB)
        node.unuse(entry)
        with trio.fail_after(3600):
            await node.handler.remove_image(entry)
        await trio.sleep(100)
        assert entry.local.cached_bytes == 0
        assert not node.handler.fetchers()


async def test_a_request_to_warm_goes_past_delay_and_rate(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(bytes_s=64 * 1024)) as node:
        entry = node.use(node.add("used", data_of(1, 20 * MIB)))
        await node.wait(lambda: node.handler.is_hydrating(entry))
        with trio.fail_after(3600):
            await node.hydrator.complete(entry)
        assert is_done(entry)
        other = node.use(node.add("other", data_of(2, 20 * MIB)), used_s_ago=0)
        with trio.fail_after(3600):
            await node.hydrator.complete(other)
        assert is_done(other)


async def test_it_goes_on_at_the_pace_when_who_asked_leaves(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, pace=Pace(bytes_s=4 * MIB)) as node:
        entry = node.use(node.add("used", data_of(1, 40 * MIB)))
        await node.wait(lambda: node.handler.is_hydrating(entry))
        async with node.handler.warmer.hold(entry):
            await trio.lowlevel.checkpoint()
        await node.wait(lambda: is_done(entry))


async def test_what_the_lower_directory_has_is_left_alone(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path) as node:
        entry = node.add("lower", data_of(1))
        node.lower.add("lower")
        node.use(entry)
        await trio.sleep(10 * LOWER_AGAIN_S)
        assert node.source.requests == 0
        node.lower.clear()
        node.hydrator.wake()
        await node.wait(lambda: is_done(entry))


async def test_a_full_cache_is_told_once_and_nothing_is_evicted_for_what_is_in_use(
    tmp_path: Path, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="basefs.cache.hydrator")
    async with hydrated_node(tmp_path, limits=CacheLimits(max_bytes=16 * MIB)) as node:
        entries = [node.use(node.add(f"image {n}", data_of(n, 12 * MIB))) for n in range(2)]
        await trio.sleep(900)
        cached = [entry.local.cached_bytes for entry in entries]
        assert 10 * MIB < sum(cached) <= 16 * MIB
        assert node.source.received_bytes == sum(cached), "nothing is fetched to be evicted"
        told = [record.getMessage() for record in caplog.records if "not completed" in record.getMessage()]
        assert len(told) <= len(entries) * 2
        assert all("no room" in text for text in told)
        node.unuse(entries[1])
        await node.wait(lambda: is_done(entries[0]))


async def test_wanted_images_that_do_not_fit_together_are_not_fetched_again_and_again(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path, limits=CacheLimits(max_bytes=16 * MIB), is_on=False) as node:
        entries = [node.add(f"image {n}", data_of(n, 7 * MIB)) for n in range(3)]
        for entry in entries:
            node.handler.warm(entry)
        await node.wait(lambda: not any(entry.local.is_wanted for entry in entries))
        await trio.sleep(900)
        assert node.source.received_bytes == sum(entry.size for entry in entries)


async def test_without_hydration_only_wanted_images_are_brought(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path, is_on=False) as node:
        used, wanted = node.use(node.add("used", data_of(1))), node.add("wanted", data_of(2))
        node.handler.warm(wanted)
        await node.wait(lambda: is_done(wanted))
        await trio.sleep(1000)
        assert used.local.cached_bytes == 0


async def test_what_fails_is_tried_again_in_silence(
    tmp_path: Path, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with hydrated_node(tmp_path) as node:
        entry = node.add("used", data_of(1, 20 * MIB))
        node.source.faults = [errors.SourceUnavailableError("down", may_be_away=True)]
        node.services.outage.begin(errors.SourceUnavailableError("away", is_outage=True))
        node.use(entry)
        await trio.sleep(1000)
        assert node.source.requests == 0, "it waits for the end of the outage"
        node.services.outage.end()
        await node.wait(lambda: is_done(entry))
        assert not [record for record in caplog.records if record.levelname != "INFO" and "basefs" in record.name]


async def test_a_graduation_that_fails_is_tried_again_later(
    tmp_path: Path, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="basefs.cache.hydrator")
    async with hydrated_node(tmp_path) as node:
        node.graduation_errors = [errors.CacheError("the lower disk is full") for _ in range(4)]
        entry = node.use(node.add("used", data_of(1)))
        begun_at = trio.current_time()
        await node.wait(lambda: node.graduated == ["used"])
        assert trio.current_time() - begun_at > 10
        assert node.source.received_bytes == entry.size
        assert sum("the lower disk is full" in record.getMessage() for record in caplog.records) == 1
        await trio.sleep(1000)
        assert node.graduated == ["used"], "once"


async def test_a_restart_goes_on_with_what_was_here_and_begins_no_delay(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with hydrated_node(tmp_path, pace=Pace(bytes_s=MIB)) as node:
        entry = node.use(node.add("used", data_of(1, 20 * MIB)))
        await node.wait(lambda: entry.local.cached_bytes > 8 * MIB)
    fetched = node.source.received_bytes
    assert fetched < entry.size
    async with hydrated_node(tmp_path) as node:
        again = node.add("used", data_of(1, 20 * MIB))
        again.local = entry.local
        again.local.used_at_ns = node.now_ns() - int(DELAY_S * 1e9)
        node.bases.add("used")
        node.hydrator.wake()
        begun_at = trio.current_time()
        await node.wait(lambda: is_done(again))
        assert trio.current_time() - begun_at < DELAY_S / 2
        assert fetched + node.source.received_bytes <= again.size + MIB


async def test_a_streamed_image_is_brought_by_one_stream(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path) as node:
        node.source.ranged = False
        entry = node.add("streamed", data_of(1))
        entry.local.source_kind = "streamed"
        entry.looked_at = trio.current_time()
        node.use(entry)
        await node.wait(lambda: is_done(entry))
        assert [call[0] for call in node.source.calls] == ["stream"]


async def test_what_is_linked_is_not_brought_until_it_is_not(tmp_path: Path, clock: trio.testing.MockClock) -> None:
    async with hydrated_node(tmp_path) as node:
        linked, other = (node.use(node.add(name, data_of(n))) for n, name in enumerate(("linked", "other")))
        node.linked.add(linked.number)
        await node.wait(lambda: is_done(other))
        assert linked.local.cached_bytes == 0
        node.linked.clear()
        node.hydrator.wake()
        await node.wait(lambda: is_done(linked))
