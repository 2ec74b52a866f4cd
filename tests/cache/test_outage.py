"""When tries are made again, and what a stream that turns out wrong may not spoil."""

import hashlib
import math

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.deliveries import LOOK_AGAIN_S
from basefs.cache.outage import RETRY_AFTER_MAX_S, RETRY_BASE_S, RETRY_CAP_S, RetryGate
from basefs.concurrency.outage import Outage
from tests.cache.conftest import CHUNK, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.conftest import ExpectedWarnings

AWAY = errors.SourceUnavailableError("Glance answered 503")


async def test_tries_that_failed_together_count_as_one(
    autojump_clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    gate = RetryGate("a", lambda: 0.999, Outage())
    for _ in range(8):
        gate.failed(AWAY)
    assert gate.retry_at - trio.current_time() <= RETRY_BASE_S
    waits = []
    for _ in range(10):
        await gate.wait()
        gate.failed(AWAY)
        waits.append(gate.retry_at - trio.current_time())
    assert waits[:4] == sorted(waits[:4]), "longer each time"
    assert max(waits) <= RETRY_CAP_S


async def test_a_server_that_says_when_is_asked_then_within_a_bound(
    autojump_clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    for asked_s, expected_s in ((3.0, 3.0), (3600.0, RETRY_AFTER_MAX_S)):
        gate = RetryGate("a", lambda: 0.0, Outage())
        gate.failed(errors.SourceUnavailableError("Glance answered 503", retry_after_s=asked_s))
        assert gate.retry_at - trio.current_time() == expected_s


async def test_an_outage_is_told_when_it_begins_and_when_it_ends(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    caplog.set_level("INFO", logger="basefs")
    gate = RetryGate("a", lambda: 0.5, Outage())
    for _ in range(5):
        gate.failed(AWAY)
        await gate.wait()
    gate.succeeded()
    gate.succeeded()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert gate.is_open


async def test_readers_of_many_places_make_few_requests_while_glance_is_away(
    fetchers: Fetchers, source: MemorySource, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    """Four slots: of a hundred flights that wait for one, those that come to it after a failure are not sent."""
    expected_warnings("503")
    source.faults = [AWAY] * 1000
    failed = []
    async with fetchers(source) as fetcher, trio.open_nursery() as readers:

        async def reader(offset: int) -> None:
            with pytest.raises(errors.SourceUnavailableError, match="503"):
                await fetcher.read(offset, 10, deadline_s=15.0, patient=False)
            failed.append(offset)

        for index in range(100):
            readers.start_soon(reader, index * CHUNK)
    assert len(failed) == 100
    assert source.requests < 20 * 4


async def test_a_stream_that_turns_out_wrong_spoils_nothing_that_was_here(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings("one stream")
    expected_warnings("nothing of it is served until")
    entry = make_entry(len(image), os_hash_algo="sha256", os_hash_value=hashlib.sha256(image).hexdigest())
    async with fetchers(source, entry=entry) as fetcher:
        here = 5 * CHUNK
        assert await fetcher.read(here, 100, deadline_s=15.0, patient=False) == image[here : here + 100]
        source.ranged = False
        source.lie_at, source.lies = len(image) // 2, 1
        await fetcher.read(len(image) - 10, 10, deadline_s=5.0, patient=False)
        await fetcher._flights.wait_idle()
        assert await fetcher.read(0, len(image), deadline_s=15.0, patient=False) == image
        assert entry.local.whole == "verified", "by the second stream"
    async with fetchers(source, entry=entry) as fetcher:
        assert await fetcher.read(0, len(image), deadline_s=15.0, patient=False) == image


async def test_a_streamed_image_is_asked_for_by_range_once_in_a_while(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock,
) -> None:  # fmt: skip
    entry = make_entry(len(image))
    entry.local.source_kind = "streamed"
    entry.looked_at = trio.current_time()
    source.hold = trio.Event()
    async with fetchers(source, entry=entry) as fetcher, trio.open_nursery() as readers:
        readers.start_soon(lambda: fetcher.read(0, 10, deadline_s=1e6, patient=True))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert [call[0] for call in source.calls] == ["stream"], "looked at a moment ago"
        await trio.sleep(LOOK_AGAIN_S)
        readers.start_soon(lambda: fetcher.read(90 * CHUNK, 10, deadline_s=1e6, patient=True))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not fetcher.is_streamed
        assert "range" in [call[0] for call in source.calls], "readers do not wait for the stream"
        source.hold.set()
    assert entry.local.source_kind == "ranged"


async def test_an_outage_closes_every_gate_and_its_end_opens_them_in_the_same_moment(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="basefs")
    outage = Outage()
    gates = [RetryGate(str(n), lambda: 0.999, outage) for n in range(50)]
    woken = []

    async def reader(gate: RetryGate) -> None:
        await gate.wait()
        woken.append(trio.current_time())

    away = errors.SourceUnavailableError("refused", may_be_away=True)
    outage.suspect(is_suspected=True)
    for gate in gates[:25]:
        gate.failed(away)
    assert [gate.is_open for gate in gates] == [False] * 25 + [True] * 25, "a probe decides for those that failed"
    async with trio.open_nursery() as readers:
        outage.begin(errors.SourceUnavailableError("Glance is away", may_be_away=True, is_outage=True))
        outage.suspect(is_suspected=False)
        for gate in gates * 20:
            readers.start_soon(reader, gate)
        await trio.sleep(600.0)
        assert woken == []
        ended_at = trio.current_time()
        outage.end()
    assert woken == [ended_at] * 1000
    assert outage.waited == 1000
    assert caplog.records == []


async def test_an_outage_stops_no_image_that_a_store_has(autojump_clock: trio.testing.MockClock) -> None:
    outage, good_at = Outage(), {"in a store": -math.inf, "resting": 7.0, "nowhere else": math.inf}
    start = trio.current_time()
    good_at["resting"] += start
    gates = {image: RetryGate(image, lambda: 0.999, outage, good_at.__getitem__) for image in good_at}
    outage.begin(errors.SourceUnavailableError("Glance is away", may_be_away=True, is_outage=True))
    assert {image: gate.is_open for image, gate in gates.items()} == {
        "in a store": True, "resting": False, "nowhere else": False,
    }  # fmt: skip
    await gates["resting"].wait()
    assert trio.current_time() - start == 7.0
    with trio.move_on_after(1000) as waited:
        await gates["nowhere else"].wait()
    assert waited.cancelled_caught
    gates["in a store"].failed(outage.error)  # the store failed, too
    assert not gates["in a store"].is_open
    before = trio.current_time()
    await gates["in a store"].wait()
    assert 0 < trio.current_time() - before <= RETRY_BASE_S
    good_at["in a store"] = math.inf
    gates["in a store"].failed(outage.error)
    outage.end()
    assert all(gate.is_open for gate in gates.values())
