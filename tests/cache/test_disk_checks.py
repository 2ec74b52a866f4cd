"""Checks of what is on the disk: verify and the scrub, over a source in memory and real chunk files."""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.fetch_services import FetchCounters
from basefs.cache.image_check import CheckedImages, CheckProgress, check_image
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.scrub import START_AFTER_S, Scrubber, ScrubSettings
from basefs.catalog.records import ImageEntry
from tests.cache.conftest import CHUNK, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.conftest import ExpectedWarnings


class Prepared:
    """`CheckedImages.open` over one fetcher that stays open, as a handler gives it."""

    def __init__(self, fetcher: ImageFetcher) -> None:
        self.fetcher = fetcher
        self.opened = 0

    def images(self, *, is_used: bool = False) -> CheckedImages:
        return CheckedImages(open=self._open, is_used=lambda _entry: is_used, refetch_deadline_s=60)

    def _open(self, _entry: ImageEntry) -> AbstractAsyncContextManager[ImageFetcher]:
        @asynccontextmanager
        async def give() -> AsyncIterator[ImageFetcher]:
            self.opened += 1
            yield self.fetcher

        return give()


async def checked(fetcher: ImageFetcher, *, is_used: bool = False) -> CheckProgress:
    async with aclosing(check_image(fetcher.entry, Prepared(fetcher).images(is_used=is_used))) as steps:
        return [step async for step in steps][-1]


def damage(path: Path, *offsets: int) -> None:
    """Changes bytes on the disk below the page cache's back, as far as a test can: written through and synced."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0xFF]))
        file.flush()
        os.fsync(file.fileno())


def contents(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "42.data"


async def test_a_whole_image_is_right_and_all_of_it_was_checked(
    fetchers: Fetchers, source: MemorySource, image: bytes
) -> None:
    async with fetchers(source) as fetcher:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        found = await checked(fetcher)
    assert (found.checked_bytes, found.cached_bytes, found.damaged_chunks, found.error) == (
        len(image), len(image), 0, None,
    )  # fmt: skip


async def test_damaged_chunks_of_a_complete_image_are_fetched_again(
    fetchers: Fetchers, source: MemorySource, image: bytes, data: Path,
    counters: FetchCounters, expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings("cached chunks from byte .* are damaged")
    async with fetchers(source) as fetcher:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        damage(data, 3 * CHUNK, 100 * CHUNK, len(image) - 1)
        found = await checked(fetcher)
        assert (found.damaged_chunks, found.refetched_chunks, counters.damaged_chunks) == (3, 3, 3)
        assert contents(data) == image
        assert fetcher.is_complete
        assert (await checked(fetcher)).damaged_chunks == 0


async def test_damaged_chunks_of_a_part_are_dropped_and_fetched_when_they_are_read(
    fetchers: Fetchers, source: MemorySource, image: bytes, data: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("cached chunks from byte .* are damaged")
    async with fetchers(source) as fetcher:
        await fetcher.read(0, 8 * CHUNK, deadline_s=60, patient=False)
        damage(data, 2 * CHUNK)
        asked = source.requests
        found = await checked(fetcher)
        assert (found.damaged_chunks, found.refetched_chunks, source.requests) == (1, 0, asked)
        assert fetcher.hit(2 * CHUNK, 10) is None
        assert await fetcher.read(0, 8 * CHUNK, deadline_s=60, patient=False) == image[: 8 * CHUNK]
    async with fetchers(source) as fetcher:
        assert await fetcher.read(0, 8 * CHUNK, deadline_s=60, patient=False) == image[: 8 * CHUNK]


async def test_an_image_in_use_has_its_damaged_chunks_fetched_again_though_it_is_not_complete(
    fetchers: Fetchers, source: MemorySource, image: bytes, data: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("cached chunks from byte .* are damaged")
    async with fetchers(source) as fetcher:
        await fetcher.read(0, 8 * CHUNK, deadline_s=60, patient=False)
        damage(data, 2 * CHUNK)
        assert (await checked(fetcher, is_used=True)).refetched_chunks == 1
        assert bytes(fetcher.hit(2 * CHUNK, 10) or b"") == image[2 * CHUNK :][:10]


async def test_what_cannot_be_fetched_again_is_told_and_is_no_wrong_byte(
    fetchers: Fetchers, source: MemorySource, image: bytes, data: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("cached chunks from byte .* are damaged")
    expected_warnings("is gone")
    async with fetchers(source) as fetcher:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        damage(data, 2 * CHUNK)
        source.faults = [errors.ImageNotFoundError("is gone")]
        found = await checked(fetcher)
        assert (found.damaged_chunks, found.refetched_chunks, found.error) == (1, 0, "is gone")
        assert fetcher.hit(2 * CHUNK, 10) is None


async def test_a_check_of_an_image_that_was_closed_meanwhile_ends(fetchers: Fetchers, source: MemorySource) -> None:
    async with fetchers(source) as fetcher:
        await fetcher.read(0, 8 * CHUNK, deadline_s=60, patient=False)
    assert (await checked(fetcher)).checked_bytes == 0


class MemoryValues:
    """The part of a CatalogStore that the scrub uses."""

    def __init__(self, **values: str) -> None:
        self.stored = dict(values)
        self.noted = trio.Event()

    async def values(self) -> dict[str, str]:
        return self.stored

    async def upsert(self, _records: object, values: dict[str, str]) -> dict[str, int]:
        self.stored.update(values)
        self.noted.set()
        return {}


def scrubber(prepared: Prepared, store: MemoryValues, *, bytes_s: int = 1 << 30, interval_s: float = 100) -> Scrubber:
    async def stored() -> list[ImageEntry]:
        return [prepared.fetcher.entry]

    return Scrubber(
        prepared.images(),
        store,
        stored,
        lambda: False,
        ScrubSettings(bytes_s=bytes_s, interval_s=interval_s),  # type: ignore[arg-type]
    )


async def test_the_scrub_goes_round_at_its_rate_and_notes_its_rounds(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock
) -> None:
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        store = MemoryValues()
        scrub = scrubber(Prepared(fetcher), store, bytes_s=len(image) // 20)
        begun = trio.current_time()
        nursery.start_soon(scrub.run)
        await store.noted.wait()
        assert 20 <= trio.current_time() - begun - START_AFTER_S <= 22
        assert (scrub.counters.bytes, scrub.counters.damaged_chunks) == (len(image), 0)
        noted = json.loads(store.stored["scrub"])
        assert (noted["number"], noted["last_round_at"]) == (0, scrub.counters.last_round_at)
        nursery.cancel_scope.cancel()


async def test_the_scrub_goes_on_where_it_was(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock
) -> None:
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        place = {"number": make_entry(1).number, "chunk": 100, "round_began_at": time.time(), "last_round_at": None}
        store = MemoryValues(scrub=json.dumps(place))
        scrub = scrubber(Prepared(fetcher), store)
        nursery.start_soon(scrub.run)
        await store.noted.wait()
        assert scrub.counters.bytes == len(image) - 100 * CHUNK
        nursery.cancel_scope.cancel()


async def test_the_scrub_finds_damage_and_outlives_a_note_that_is_none(
    fetchers: Fetchers, source: MemorySource, image: bytes, data: Path,
    clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings("cached chunks from byte .* are damaged")
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        await fetcher.read(0, len(image), deadline_s=60, patient=False)
        damage(data, 7 * CHUNK)
        store = MemoryValues(scrub='{"nothing": 1}')
        scrub = scrubber(Prepared(fetcher), store)
        nursery.start_soon(scrub.run)
        await store.noted.wait()
        assert scrub.counters.damaged_chunks == 1
        assert contents(data) == image
        nursery.cancel_scope.cancel()
