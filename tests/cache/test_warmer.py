"""Warming: who it goes on for, and when it stops."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from basefs import errors
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.warmer import Warmer
from tests.cache.conftest import Fetchers
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
