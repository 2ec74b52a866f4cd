"""Whole images: hashed when all is here, fetched again when the hash is wrong, quarantined when it stays so."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, open_chunk_file
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.whole_image import digest_of
from basefs.catalog.records import ImageEntry
from basefs.core.chunk_map import ChunkMapHeader
from tests.cache.conftest import CHUNK, IMAGE_ID, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.records import record
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings

SECOND_FETCH = "nothing of it is served until all of it was fetched again"


def hashed_entry(image: bytes, **fields: str | None) -> ImageEntry:
    """With the image's own hash; a value of "(md5)" is replaced by that hash."""
    values = {"os_hash_algo": "sha512", "os_hash_value": "(sha512)", **fields}
    hashes = {f"({name})": hashlib.new(name, image).hexdigest() for name in ("md5", "sha256", "sha512")}
    return make_entry(len(image), **{key: hashes.get(value or "", value) for key, value in values.items()})


async def bring(fetcher: ImageFetcher) -> None:
    while not fetcher.is_complete:
        await fetcher.fetch_background(1 << 20)


async def read(fetcher: ImageFetcher, offset: int, length: int, *, patient: bool = False) -> bytes:
    hit = fetcher.hit(offset, length)
    return bytes(hit) if hit is not None else await fetcher.read(offset, length, deadline_s=15.0, patient=patient)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "verified"),
        ({"os_hash_algo": "sha256", "os_hash_value": "(sha256)"}, "verified"),
        ({"os_hash_algo": None, "os_hash_value": None, "checksum": "(md5)"}, "verified"),
        ({"os_hash_algo": "of another world", "checksum": "(md5)"}, "verified"),
        ({"os_hash_algo": "shake_128"}, "no_hash"),
        ({"os_hash_algo": None, "os_hash_value": None}, "no_hash"),
    ],
)
async def test_what_is_right_is_verified_by_the_hash_that_glance_tells(
    fetchers: Fetchers,
    source: MemorySource,
    image: bytes,
    fields: dict[str, str | None],
    outcome: str,
    is_streamed: bool,
) -> None:
    entry = hashed_entry(image, **fields)
    source.ranged = not is_streamed
    entry.local.source_kind, entry.looked_at = "streamed" if is_streamed else "ranged", trio.current_time()
    async with fetchers(source, entry=entry) as fetcher:
        assert await fetcher.whole.settle() == "unknown", "nothing is here"
        await bring(fetcher)
        assert await fetcher.whole.settle() == outcome == entry.local.whole
        assert source.received_bytes == len(image)
        assert fetcher.hit(0, 100) is not None


async def test_a_stream_that_was_right_needs_no_hashing(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    entry = hashed_entry(image)
    source.ranged = False
    entry.local.source_kind, entry.looked_at = "streamed", trio.current_time()
    async with fetchers(source, entry=entry) as fetcher:
        await fetcher.store_header(image[: 4 * CHUNK])  # as the checks leave it; the stream passes over it
        await bring(fetcher)
        assert entry.local.whole == "verified"


async def test_a_stream_proves_nothing_of_chunks_that_were_here_and_are_others(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    entry = hashed_entry(image)
    source.ranged = False
    entry.local.source_kind, entry.looked_at = "streamed", trio.current_time()
    async with fetchers(source, entry=entry) as fetcher:
        await fetcher.store_header(b"other bytes than the image's".ljust(CHUNK))
        await bring(fetcher)
        assert entry.local.whole == "unknown"
        assert await fetcher.whole.settle() == "verified", "after all of it was fetched again"
        assert await read(fetcher, 0, len(image)) == image


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_bytes_that_are_wrong_once_are_fetched_again(
    fetchers: Fetchers, source: MemorySource, image: bytes, is_streamed: bool, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    entry = hashed_entry(image)
    source.ranged = not is_streamed
    entry.local.source_kind, entry.looked_at = "streamed" if is_streamed else "ranged", trio.current_time()
    source.lie_at, source.lies = len(image) // 2, 1
    async with fetchers(source, entry=entry) as fetcher:
        if is_streamed:
            with pytest.raises(errors.SourceHashError):
                await bring(fetcher)
        else:
            await bring(fetcher)
        assert await fetcher.whole.settle() == "verified"
        assert source.received_bytes == 2 * len(image)
        assert await read(fetcher, 0, len(image)) == image
        assert fetcher.hit(0, 100) is not None


@pytest.mark.parametrize("is_patient", [False, True])
async def test_no_byte_is_served_while_an_image_is_fetched_again(
    fetchers: Fetchers, source: MemorySource, image: bytes, is_patient: bool, clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings(SECOND_FETCH)
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 1
    async with fetchers(source, entry=entry) as fetcher, trio.open_nursery() as tasks:
        await bring(fetcher)
        assert fetcher.hit(0, 100) is not None
        source.hold = trio.Event()
        tasks.start_soon(fetcher.whole.settle)
        await fetcher.whole._changed.wait()
        assert entry.local.whole == "refetching"
        assert fetcher.hit(0, 100) is None
        with pytest.raises(errors.ImageQuarantinedError, match="fetched again"):
            await fetcher.read(0, 100, deadline_s=15.0, patient=is_patient)
        source.hold.set()
        assert await fetcher.read(0, len(image), deadline_s=math.inf, patient=is_patient) == image
        assert entry.local.whole == "verified"


async def test_a_reader_that_was_inside_gets_right_bytes(
    fetchers: Fetchers, source: MemorySource, image: bytes, monkeypatch: pytest.MonkeyPatch,
    expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    """One whose bytes were read from the disk before the seal, and were not answered yet."""
    expected_warnings(SECOND_FETCH)
    entry = hashed_entry(image)
    wrong_at = len(image) // 2
    source.lie_at, source.lies = wrong_at, 1
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        run, is_first = fetcher._services.disk.run, [True]

        async def slow_run(fn: Callable, *args: object) -> object:
            result = await run(fn, *args)
            if fn.__name__ == "read" and is_first.pop():
                is_first.append(False)
                assert result[wrong_at] != image[wrong_at]
                await fetcher.whole.settle()
            return result

        monkeypatch.setattr(type(fetcher._services.disk), "run", lambda _self, fn, *args: slow_run(fn, *args))
        monkeypatch.setattr(fetcher, "hit", lambda *_arguments: None)
        assert await fetcher.read(0, len(image), deadline_s=15.0, patient=False) == image


async def test_bytes_that_are_wrong_twice_are_quarantined_over_restarts_until_it_is_lifted(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    expected_warnings("quarantined: its bytes, fetched twice, do not have the sha512")
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 2
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        with pytest.raises(errors.ImageQuarantinedError, match="nothing of it is served"):
            await fetcher.whole.settle()
        assert source.received_bytes == 2 * len(image)
    for _restart in range(2):
        async with fetchers(source, entry=entry) as fetcher:
            assert entry.local.cached_bytes == 0
            assert fetcher.hit(0, 100) is None
            for is_patient in (False, True):
                with pytest.raises(errors.ImageQuarantinedError):
                    await fetcher.read(0, 100, deadline_s=15.0, patient=is_patient)
            with pytest.raises(errors.ImageQuarantinedError):
                await fetcher.fetch_background(1 << 20)
    assert source.received_bytes == 2 * len(image), "nothing more is fetched of it"
    async with fetchers(source, entry=entry) as fetcher:
        await fetcher.whole.lift()
        assert await read(fetcher, 0, len(image)) == image
        assert await fetcher.whole.settle() == "verified"


async def test_another_hash_in_glance_ends_a_quarantine(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    expected_warnings("quarantined")
    entry = hashed_entry(image, os_hash_value=hashlib.sha512(b"").hexdigest())
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        with pytest.raises(errors.ImageQuarantinedError):
            await fetcher.whole.settle()
        entry.record, entry.local.whole = hashed_entry(image).record, "unknown"  # as the refresher does it
        async with trio.open_nursery() as readers:
            for _ in range(5):
                readers.start_soon(read, fetcher, 0, len(image))
        assert await read(fetcher, 0, len(image)) == image
        assert await fetcher.whole.settle() == "verified"


async def test_a_refetch_that_a_kill_cut_short_begins_anew(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 1
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        source.hold = trio.Event()
        with trio.move_on_after(0.5):
            await fetcher.whole.settle()
    assert entry.local.whole == "refetching"
    source.hold = None
    before = source.received_bytes
    async with fetchers(source, entry=entry) as fetcher:
        assert fetcher.hit(0, 100) is None
        assert await fetcher.read(0, len(image), deadline_s=15.0, patient=False) == image
        assert entry.local.whole == "verified"
        assert source.received_bytes - before == len(image)


async def test_a_refetch_of_an_image_that_glance_has_no_more_tells_so(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(SECOND_FETCH)
    expected_warnings("no image")
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 1
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        source.images.clear()
        for _ in range(2):
            with pytest.raises(errors.ImageNotFoundError):
                await fetcher.read(0, 100, deadline_s=15.0, patient=True) if fetcher.whole.is_sealed else (
                    await fetcher.whole.settle()
                )
        source.images[IMAGE_ID] = image
        assert await fetcher.read(0, len(image), deadline_s=15.0, patient=True) == image


async def test_a_refetch_waits_through_failures_and_so_do_its_readers(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings(SECOND_FETCH)
    expected_warnings("503")
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 1
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        source.faults = [errors.SourceUnavailableError("503")] * 8 + [errors.SourceForbiddenError("403")]
        async with trio.open_nursery() as tasks:
            tasks.start_soon(fetcher.whole.settle)
            await fetcher.whole._changed.wait()
            assert entry.local.whole == "refetching"
            assert await fetcher.read(0, len(image), deadline_s=math.inf, patient=True) == image


async def test_a_refetch_waits_for_a_cache_disk_that_fails(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected_warnings(SECOND_FETCH)
    expected_warnings("serving round the cache")
    entry = hashed_entry(image)
    source.lie_at, source.lies = len(image) // 2, 1
    write_piece, failures = ChunkFile.write_piece, [True]

    def failing(file: ChunkFile, offset: int, piece: bytes) -> None:
        if entry.local.whole == "refetching" and failures:
            failures.pop()
            raise errors.CacheError("Input/output error")
        write_piece(file, offset, piece)

    monkeypatch.setattr(ChunkFile, "write_piece", failing)
    async with fetchers(source, entry=entry) as fetcher, trio.open_nursery() as tasks:
        await bring(fetcher)
        tasks.start_soon(fetcher.whole.settle)
        await fetcher.whole._changed.wait()
        assert await fetcher.read(0, len(image), deadline_s=math.inf, patient=True) == image


async def test_a_chunk_that_is_lost_makes_the_image_unknown_also_once_it_is_back(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("1 cached chunks from byte")
    entry = hashed_entry(image)
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        assert await fetcher.whole.settle() == "verified"
        assert await fetcher.eviction.evict(0, CHUNK)
        assert entry.local.whole == "unknown"
        await bring(fetcher)
        assert entry.local.whole == "unknown", "what came back was not hashed"
        assert await fetcher.whole.settle() == "verified"
    assert entry.local.whole == "verified", "over a restart"
    with (tmp_path / "42.data").open("r+b") as data:
        data.seek(7 * CHUNK)
        data.write(b"damaged")
    async with fetchers(source, entry=entry) as fetcher:
        assert entry.local.whole == "verified"
        assert await read(fetcher, 7 * CHUNK, 10) == image[7 * CHUNK :][:10]
        assert entry.local.whole == "unknown"
        assert await fetcher.whole.settle() == "verified"


async def test_a_damage_on_the_disk_is_no_mismatch(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("1 cached chunks from byte")
    entry = hashed_entry(image)
    async with fetchers(source, entry=entry) as fetcher:
        await bring(fetcher)
        with (tmp_path / "42.data").open("r+b") as data:
            data.seek(7 * CHUNK)
            data.write(b"damaged")
        assert await fetcher.whole.settle() == "unknown"
        assert not fetcher.is_complete
        await bring(fetcher)
        assert await fetcher.whole.settle() == "verified"
        assert source.received_bytes == len(image) + CHUNK


async def test_hashing_lets_readers_go_first(
    fetchers: Fetchers, source: MemorySource, image: bytes, clock: trio.testing.MockClock
) -> None:
    entry = hashed_entry(image)
    async with fetchers(source, entry=entry) as fetcher, trio.open_nursery() as tasks:
        await bring(fetcher)
        with fetcher._services.readers.waiting():
            tasks.start_soon(fetcher.whole.settle)
            await trio.sleep(100)
            assert entry.local.whole == "unknown"
        assert await fetcher.whole.settle() == "verified"


def test_the_strongest_hash_that_is_known_counts() -> None:
    assert digest_of(record("i", os_hash_algo="sha512", os_hash_value="aa", checksum="bb")).algorithm == "sha512"  # type: ignore[union-attr]
    assert digest_of(record("i", os_hash_algo="?", os_hash_value="aa", checksum="bb")).algorithm == "md5"  # type: ignore[union-attr]
    assert digest_of(record("i", os_hash_algo="sha512", os_hash_value="", checksum=None)) is None
    assert digest_of(record("i", os_hash_algo=None, os_hash_value="aa", checksum="")) is None


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lie_at=st.integers(0, 130 * CHUNK), lies=st.integers(0, 3),
    reads=st.lists(st.tuples(st.integers(0, 130 * CHUNK), st.integers(1, 3 * CHUNK)), max_size=6),
)  # fmt: skip
@example(lie_at=5, lies=2, reads=[])
def test_a_source_that_lies_once_is_found_out_and_one_that_lies_twice_is_believed_nothing(
    tmp_path_factory: pytest.TempPathFactory, image: bytes, expected_warnings: ExpectedWarnings,
    lie_at: int, lies: int, reads: list[tuple[int, int]],
) -> None:  # fmt: skip
    expected_warnings(SECOND_FETCH)
    expected_warnings("quarantined")

    async def run(directory: Path) -> None:
        source, entry = MemorySource({IMAGE_ID: image}, lie_at=lie_at, lies=lies), hashed_entry(image)
        async with trio.open_nursery() as nursery:
            wanted = ChunkMapHeader(image_id=IMAGE_ID, size=len(image), chunk_bytes=CHUNK)
            file, states = open_chunk_file(directory, 42, wanted)
            fetcher = ImageFetcher(entry, file, states, CHUNK, make_services(nursery, source, directory))
            for offset, length in reads:
                await fetcher.read(offset, min(length, len(image) - offset), deadline_s=60, patient=False)
            await bring(fetcher)
            try:
                assert await fetcher.whole.settle() == "verified"
                assert await fetcher.read(0, len(image), deadline_s=60, patient=False) == image
                assert lies - source.lies < 2
            except errors.ImageQuarantinedError:
                assert lies - source.lies == 2
                assert fetcher.hit(0, 10) is None
            await fetcher.close()
            nursery.cancel_scope.cancel()

    trio.run(run, tmp_path_factory.mktemp("lies"))
