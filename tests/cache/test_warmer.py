"""Warming: who it goes on for, and when it stops."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.pace import Pace
from basefs.cache.warmer import Warmer
from basefs.sources.base import Hasher
from tests.cache.conftest import CHUNK, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.conftest import ExpectedWarnings


def warmer_of(fetcher: ImageFetcher) -> Warmer:
    @asynccontextmanager
    async def open_image(_entry: object) -> AsyncIterator[ImageFetcher]:
        yield fetcher

    return Warmer(fetcher._services, open_image)


async def test_a_kept_warming_brings_the_whole_image(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await warming.done.wait()
        assert warming.error is None
        assert fetcher.is_complete
        assert source.received_bytes == len(image)


async def test_a_warming_stops_when_its_last_holder_leaves(fetchers: Fetchers, source: MemorySource) -> None:
    source.hold = trio.Event()
    async with fetchers(source) as fetcher:
        warmer = warmer_of(fetcher)
        async with warmer.hold(fetcher.entry) as warming:
            async with warmer.hold(fetcher.entry) as same:
                assert same is warming
                await trio.testing.wait_all_tasks_blocked()
            assert not warming.done.is_set()
        await warming.done.wait()
        assert warming.error is not None
        assert not warmer.is_warming(fetcher.entry)
        assert not fetcher.is_complete


async def test_a_kept_warming_outlives_its_holders(fetchers: Fetchers, source: MemorySource) -> None:
    source.hold = trio.Event()
    async with fetchers(source) as fetcher:
        warmer = warmer_of(fetcher)
        async with warmer.hold(fetcher.entry) as warming:
            warmer.keep(fetcher.entry)
        source.hold.set()
        await warming.done.wait()
        assert fetcher.is_complete


async def test_a_warming_waits_through_an_outage(
    fetchers: Fetchers, source: MemorySource, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    source.faults = [errors.SourceUnavailableError("503")] * 12
    async with fetchers(source) as fetcher:
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await warming.done.wait()
        assert warming.error is None
        assert fetcher.is_complete


async def test_a_warming_of_a_deleted_image_fails(
    fetchers: Fetchers, source: MemorySource, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("no image")
    async with fetchers(source) as fetcher:
        source.images.clear()
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await warming.done.wait()
        assert isinstance(warming.error, errors.ImageNotFoundError)


async def test_a_streamed_image_is_warmed_by_one_stream(fetchers: Fetchers, source: MemorySource) -> None:
    source.ranged = False
    async with fetchers(source) as fetcher:
        fetcher.entry.local.source_kind = "streamed"
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await warming.done.wait()
        assert warming.error is None
        assert fetcher.is_complete
        assert [call[0] for call in source.calls] == ["stream"]


async def test_readers_go_before_a_warming(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    source.hold = trio.Event()
    async with fetchers(source) as fetcher:
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await trio.testing.wait_all_tasks_blocked()
        # The image is claimed whole by one background request here; a second image's reader must find a slot.
        assert source.requests <= 2, "background work leaves slots to readers"
        source.hold.set()
        await warming.done.wait()


async def test_a_cancelled_warming_ends(fetchers: Fetchers, source: MemorySource) -> None:
    source.hold = trio.Event()
    async with fetchers(source) as fetcher:
        warmer = warmer_of(fetcher)
        warming = warmer.keep(fetcher.entry)
        await trio.testing.wait_all_tasks_blocked()
        warmer.cancel(fetcher.entry)
        await warming.done.wait()
        assert warming.error is not None


@pytest.mark.parametrize("is_beside", [True, False])
async def test_what_came_is_hashed_while_more_comes_unless_that_takes_from_it(
    fetchers: Fetchers, source: MemorySource, image: bytes, monkeypatch: pytest.MonkeyPatch, is_beside: bool
) -> None:
    monkeypatch.setattr("basefs.cache.warmer.HASHES_BESIDE", is_beside)
    monkeypatch.setattr("basefs.cache.prefix_hash.HASH_BYTES", 4 * CHUNK)
    entry = make_entry(len(image), os_hash_algo="sha256", os_hash_value=hashlib.sha256(image).hexdigest())
    hashed_to = 0
    async with fetchers(source, entry=entry) as fetcher:
        for _ in range(8):
            fetcher._services.pace.request_size.came(1 << 30, 0.1)  # as fast as it can be
        hash_really = fetcher._verifier.hash

        async def noted(span: range, hasher: Hasher) -> bool:
            nonlocal hashed_to
            if not fetcher.is_complete:
                hashed_to = span.stop
            return await hash_really(span, hasher)

        monkeypatch.setattr(fetcher._verifier, "hash", noted)
        await fetcher.fetch_background(8 * CHUNK)
        source.hold = trio.Event()
        warming = warmer_of(fetcher).keep(fetcher.entry)
        await trio.testing.wait_all_tasks_blocked()
        warming.came.set()
        await trio.testing.wait_all_tasks_blocked()
        async with fetcher.whole._checking:  # the follower's turn, if it has one, is over
            hashed_at_hold = hashed_to
        source.hold.set()
        await warming.done.wait()
        assert hashed_at_hold == (8 if is_beside else 0)
        assert entry.local.whole == "verified"


def test_what_a_limit_keeps_slow_is_not_fast() -> None:
    for bytes_s, is_fast in ((0, True), (100 << 20, False), (500 << 20, True)):
        pace = Pace(bytes_s=bytes_s)
        for _ in range(20):
            pace.request_size.came(170 << 20, 1.0)
        assert pace.is_fast == is_fast
