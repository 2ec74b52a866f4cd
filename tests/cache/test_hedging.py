"""A demand read that is late is made a second time: the quicker one wins, chunks are stored once, few are made."""

import math
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from basefs import errors
from basefs.cache.chunk_race import ChunkRace
from basefs.cache.image_fetcher import ImageFetcher
from basefs.core.hedging import SAMPLES_MIN
from basefs.sources.base import Deliver
from basefs.sources.glance import GlanceSource
from tests.cache.conftest import CHUNK, IMAGE_ID, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.conftest import ExpectedWarnings
from tests.fakes.answers import hang
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to

WINDOW = 16 * CHUNK
"""What a miss brings, in bytes."""


@dataclass
class StallingSource(MemorySource):
    """Requests wait before their first byte for the event of their number, if they have one, and fail if told so."""

    stalls: dict[int, trio.Event] = field(default_factory=dict)
    failing: dict[int, errors.BasefsError] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        number = len(self.calls)
        self.calls.append(("range", offset, length))
        self.requests += 1
        if number in self.stalls:
            try:
                await self.stalls[number].wait()
            except trio.Cancelled:
                self.cancelled.append(number)
                raise
        if number in self.failing:
            raise self.failing[number]
        data = self.images[image_id][offset : offset + length]
        await trio.to_thread.run_sync(self._deliver, data, offset, piece_bytes, None, deliver)


@pytest.fixture
def source(image: bytes) -> StallingSource:
    return StallingSource({IMAGE_ID: image}, stalls={0: trio.Event()})


def learn(fetcher: ImageFetcher, *lengths: int) -> None:
    """A hundred requests of these lengths were quick."""
    for length in lengths or (WINDOW,):
        for _ in range(SAMPLES_MIN):
            fetcher._services.hedges.came(length, 0.01)


async def until(seconds: float) -> None:
    """So much time passes, and whatever it makes happen has happened."""
    await trio.sleep(seconds)
    await trio.testing.wait_all_tasks_blocked()


async def read(fetcher: ImageFetcher, offset: int, length: int) -> bytes:
    """Without a deadline: on a busy machine the clock would jump to it while a thread is at work."""
    return bytes(await fetcher.read(offset, length, deadline_s=math.inf, patient=True))


async def test_a_late_read_gets_its_bytes_by_a_second_request(
    fetchers: Fetchers, source: StallingSource, image: bytes, clock: trio.testing.MockClock
) -> None:
    async with fetchers(source) as fetcher:
        learn(fetcher)
        assert await read(fetcher, 5 * CHUNK, 100) == image[5 * CHUNK :][:100]
        await fetcher._flights.wait_idle()
        assert source.calls == [("range", 5 * CHUNK, WINDOW)] * 2
        assert source.cancelled == [0], "the late one is ended"
        assert (fetcher._services.hedges.hedged, fetcher._services.hedges.won) == (1, 1)
        assert fetcher.entry.local.fetched_bytes == fetcher.cached_bytes == WINDOW


async def test_who_was_first_after_all_wins_and_the_second_ends_at_its_next_piece(
    fetchers: Fetchers, source: StallingSource, image: bytes, clock: trio.testing.MockClock
) -> None:
    source.stalls[1] = trio.Event()
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        learn(fetcher)
        nursery.start_soon(read, fetcher, 0, WINDOW)
        await until(1.0)
        assert len(source.calls) == 2
        source.stalls[0].set()
        assert await read(fetcher, 0, WINDOW) == image[:WINDOW]
        source.stalls[1].set()
        await fetcher._flights.wait_idle()
        assert (fetcher._services.hedges.hedged, fetcher._services.hedges.won) == (1, 0)
        assert source.received_bytes <= WINDOW + 2 * CHUNK
        assert fetcher.cached_bytes == WINDOW


async def test_a_body_that_stops_halfway_goes_on_by_a_second_request_for_the_rest(
    fetchers: Fetchers, source: StallingSource, image: bytes, clock: trio.testing.MockClock
) -> None:
    del source.stalls[0]
    stopped = trio.Event()
    half = WINDOW // 2

    def stop_once(offset: int) -> None:
        if offset == half and not stopped.is_set():
            trio.from_thread.run_sync(stopped.set)
            trio.from_thread.run(trio.sleep_forever)

    source.before_piece = stop_once
    async with fetchers(source) as fetcher:
        learn(fetcher)
        assert await read(fetcher, 0, WINDOW) == image[:WINDOW]
        await fetcher._flights.wait_idle()
        assert source.calls == [("range", 0, WINDOW), ("range", half, half)]
        assert fetcher._services.hedges.won == 1
        assert source.received_bytes == fetcher.entry.local.fetched_bytes == WINDOW


@pytest.mark.parametrize("failing", [0, 1])
async def test_one_that_fails_leaves_it_to_the_other(
    fetchers: Fetchers, source: StallingSource, image: bytes, clock: trio.testing.MockClock, failing: int
) -> None:
    source.stalls[1] = trio.Event()
    source.failing[failing] = errors.SourceUnavailableError("cut")
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        learn(fetcher)
        nursery.start_soon(read, fetcher, 0, WINDOW)
        await until(1.0)
        source.stalls[failing].set()
        await trio.testing.wait_all_tasks_blocked()
        source.stalls[1 - failing].set()
        await fetcher._flights.wait_idle()
        assert len(source.calls) == 2
        assert fetcher.cached_bytes == WINDOW
        assert fetcher._deliveries.gate.error is None


async def test_two_that_fail_are_one_failure(
    fetchers: Fetchers,
    source: StallingSource,
    image: bytes,
    clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("cut 0")
    source.stalls[1] = trio.Event()
    source.failing = {number: errors.SourceUnavailableError(f"cut {number}") for number in (0, 1)}
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        learn(fetcher)
        nursery.start_soon(read, fetcher, 0, WINDOW)
        await until(1.0)
        for number in (1, 0):
            source.stalls[number].set()
            await trio.testing.wait_all_tasks_blocked()
        await until(10.0)
        assert len(source.calls) == 3, "the reader's next try, after the pause"
        assert fetcher.cached_bytes == WINDOW


async def test_nothing_is_asked_for_twice_that_may_not_be(
    fetchers: Fetchers, source: StallingSource, clock: trio.testing.MockClock
) -> None:
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        services = fetcher._services
        nursery.start_soon(read, fetcher, 0, WINDOW)
        await until(20.0)
        assert len(source.calls) == 1, "nothing is known of others like it"
        fetcher.stop_unwanted()
        source.stalls[0].set()
        await fetcher._flights.wait_idle()

        learn(fetcher)
        source.stalls = {number: trio.Event() for number in range(1, 9)}
        async with trio.open_nursery() as background:
            background.start_soon(fetcher.fetch_background, WINDOW)
            await until(20.0)
            assert len(source.calls) == 2, "nobody waits for it"
            source.stalls[1].set()

        services.outage.suspect(is_suspected=True)
        nursery.start_soon(read, fetcher, 40 * CHUNK, WINDOW)
        await until(20.0)
        assert len(source.calls) == 3, "there may be an outage"
        services.outage.suspect(is_suspected=False)
        source.stalls[2].set()
        await fetcher._flights.wait_idle()

        async with services.slots.take(background=False), services.slots.take(background=False):
            nursery.start_soon(read, fetcher, 60 * CHUNK, WINDOW)
            await until(20.0)
            assert len(source.calls) == 4, "slots are short"
            source.stalls[3].set()
            await fetcher._flights.wait_idle()

        while services.hedges.may_spend(1):
            pass
        nursery.start_soon(read, fetcher, 80 * CHUNK, WINDOW)
        await until(20.0)
        assert len(source.calls) == 5, "there were enough of them"
        source.stalls[4].set()


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 4), st.booleans()), max_size=40),
    st.integers(0, 20),
)
def test_a_chunk_is_given_out_once_and_a_loser_gets_no_more(
    chunks: int, steps: list[tuple[int, int, bool]], second_at: int
) -> None:
    race = ChunkRace(range(3, 3 + chunks))
    given_out: list[int] = []
    at = {0: 3, 1: 3}
    ended: set[int] = set()
    for number, (runner, length, fails) in enumerate(steps):
        if number == second_at:
            race.begin_second()
            at[1] = at[0]
        if runner in ended or at[runner] >= 3 + chunks or (runner == 1 and number < second_at):
            continue
        if fails:
            race.failed(runner)
            ended.add(runner)
            continue
        stop = min(at[runner] + length, 3 + chunks)
        mine = race.take(runner, at[runner], stop)
        if mine is None:
            assert race.winner == 1 - runner
            assert runner in race.beaten
            ended.add(runner)
            continue
        given_out += [chunk for run in mine for chunk in run]
        at[runner] = stop
    assert len(given_out) == len(set(given_out))
    done = max((at[runner] for runner in at), default=3)
    assert set(given_out) == set(range(3, done)), "what one has passed was stored by it or by the other"


async def test_a_request_that_hangs_in_a_real_connection_is_ended_by_the_second_one(
    fetchers: Fetchers, image: bytes, tmp_path: Path
) -> None:
    release = threading.Event()
    with MisbehavingFront() as front:
        image_id = front.glance.add(image, name="disk")
        access = access_to(tmp_path, front.conf_lines())
        front.on("/file", "GET").respond(hang(release), times=1)
        entry = make_entry(len(image), image_id=image_id)
        async with fetchers(GlanceSource(access, threads_max=4), entry=entry) as fetcher:
            learn(fetcher)
            with trio.fail_after(60):
                assert await read(fetcher, 0, WINDOW) == image[:WINDOW]
                await fetcher._flights.wait_idle()
            assert fetcher._services.hedges.won == 1
            assert front.count("/file") == 2
            assert access.endpoints.report()["glance"]["state"] == "answers", "no failure: nobody suspects an outage"
            assert await read(fetcher, 40 * CHUNK, CHUNK) == image[40 * CHUNK : 41 * CHUNK]
        release.set()
        access.close()
