"""What readers of one image get, over a source in memory and a real chunk file."""

import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.fetch_services import FetchCounters
from basefs.cache.hit_buffer import HIT_BYTES_MAX, in_whole_pages
from basefs.cache.image_fetcher import ImageFetcher
from basefs.core.chunk_map import ChunkMapHeader
from tests.cache.conftest import CHUNK, Fetchers, make_entry
from tests.cache.memory_source import MemorySource
from tests.conftest import ExpectedWarnings


async def read(fetcher: ImageFetcher, offset: int, length: int, **patience: object) -> bytes:
    return await fetcher.read(offset, length, **{"deadline_s": 15.0, "patient": False, **patience})  # type: ignore[arg-type]


async def test_every_byte_is_the_images(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        for offset, length in [(0, 1), (CHUNK - 1, 2), (len(image) - 5, 5), (3 * CHUNK, 7 * CHUNK), (0, len(image))]:
            assert await read(fetcher, offset, length) == image[offset : offset + length]
        assert fetcher.cached_bytes == len(image)
        assert fetcher.is_complete


async def test_a_hit_needs_no_source(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, 100)
        before = source.requests
        hit = fetcher.hit(10, 50)
        assert hit is not None
        assert bytes(hit) == image[10:60]
        assert source.requests == before


async def test_a_hit_at_the_end_is_clipped(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, len(image) - 10, 10)
        assert bytes(fetcher.hit(len(image) - 10, 4096) or b"") == image[-10:]
        assert fetcher.hit(len(image), 4096) == b""


async def test_two_hundred_readers_of_one_cold_chunk_make_one_request(
    fetchers: Fetchers, source: MemorySource, image: bytes
) -> None:
    source.hold = trio.Event()
    got = []
    async with fetchers(source) as fetcher, trio.open_nursery() as readers:

        async def reader() -> None:
            got.append(await read(fetcher, 5 * CHUNK + 1, 100))

        for _ in range(200):
            readers.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        source.hold.set()
    assert source.requests == 1
    assert got == [image[5 * CHUNK + 1 :][:100]] * 200


async def test_a_reader_may_leave_and_the_flight_goes_on(
    fetchers: Fetchers, source: MemorySource, image: bytes
) -> None:
    source.hold = trio.Event()
    async with fetchers(source) as fetcher:
        with trio.move_on_after(0) as scope:
            await read(fetcher, 0, 10)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, fetcher, 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            source.hold.set()
        assert source.requests == 1


async def test_a_waiter_wakes_when_its_bytes_are_down_not_the_whole_request(
    fetchers: Fetchers, source: MemorySource, image: bytes
) -> None:
    import threading

    go_on = threading.Event()
    source.before_piece = lambda offset: go_on.wait(90) if offset >= 8 * CHUNK else None  # type: ignore[assignment,return-value]
    async with fetchers(source) as fetcher:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, fetcher, 0, 16 * CHUNK)
                await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(60):
                    assert await read(fetcher, 0, CHUNK) == image[:CHUNK]
                go_on.set()
        finally:
            go_on.set()
        assert source.requests == 1


async def test_a_failed_fetch_is_not_taken_for_data(
    fetchers: Fetchers,
    source: MemorySource,
    image: bytes,
    clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("503")
    source.faults = [errors.SourceUnavailableError("503"), None]
    source.fault_after_pieces = 3  # of two chunks each
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 0, 16 * CHUNK) == image[: 16 * CHUNK]
        assert source.requests == 2
        assert source.calls[1][1] == source.calls[0][1] + 6 * CHUNK, "what came before the fault is kept"


async def test_a_reader_gets_the_last_error_when_its_deadline_comes(
    fetchers: Fetchers, source: MemorySource, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    source.faults = [errors.SourceUnavailableError("503")] * 1000
    async with fetchers(source) as fetcher:
        started = trio.current_time()
        with pytest.raises(errors.SourceUnavailableError, match="503"):
            await read(fetcher, 0, 10, deadline_s=15.0)
        assert trio.current_time() - started == pytest.approx(15.0, abs=0.5)
        assert source.requests < 20, "the retries back off"


async def test_a_hundred_waiting_readers_make_one_request_per_back_off(
    fetchers: Fetchers, source: MemorySource, clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("503")
    source.faults = [errors.SourceUnavailableError("503")] * 1000
    failed = []
    async with fetchers(source) as fetcher, trio.open_nursery() as readers:

        async def reader() -> None:
            with pytest.raises(errors.SourceUnavailableError):
                await read(fetcher, 0, 10, deadline_s=15.0)
            failed.append(1)

        for _ in range(100):
            readers.start_soon(reader)
    assert len(failed) == 100
    assert source.requests < 20


async def test_a_refusal_is_told_at_once_to_others_and_waited_through_by_guests(
    fetchers: Fetchers,
    source: MemorySource,
    image: bytes,
    clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("403")
    source.faults = [errors.SourceForbiddenError("403"), errors.SourceForbiddenError("403"), None]
    async with fetchers(source) as fetcher:
        with pytest.raises(errors.SourceForbiddenError):
            await read(fetcher, 0, 10)
        assert await read(fetcher, 0, 10, deadline_s=300.0, patient=True) == image[:10]


async def test_a_deleted_image_fails_at_once_and_what_is_here_stays_readable(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("no image")
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, CHUNK)
        source.images.clear()
        with pytest.raises(errors.ImageNotFoundError):
            await read(fetcher, 100 * CHUNK, 10, deadline_s=300.0, patient=True)
        assert fetcher.entry.is_gone
        assert await read(fetcher, 0, CHUNK) == image[:CHUNK]


async def test_a_store_without_ranges_is_read_as_one_stream(
    fetchers: Fetchers, source: MemorySource, image: bytes, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("one stream")
    source.ranged = False
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 100 * CHUNK, 10) == image[100 * CHUNK :][:10]
        assert fetcher.is_streamed
        assert await read(fetcher, 0, len(image)) == image
        assert [call[0] for call in source.calls] == ["range", "stream"]


async def test_a_stream_with_a_wrong_hash_leaves_nothing_behind(
    fetchers: Fetchers,
    source: MemorySource,
    image: bytes,
    clock: trio.testing.MockClock,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("nothing of it is served until")
    expected_warnings("quarantined")
    entry = make_entry(len(image), os_hash_algo="sha512", os_hash_value=hashlib.sha512(b"other").hexdigest())
    entry.local.source_kind = "streamed"
    source.ranged = False
    async with fetchers(source, entry=entry) as fetcher:
        with suppress(errors.ImageQuarantinedError):  # whoever waits for the last bytes may have them before the end
            await read(fetcher, len(image) - 10, 10)
        await fetcher._flights.wait_idle()
        with pytest.raises(errors.ImageQuarantinedError):
            await fetcher.whole.settle()
        await fetcher.close()
        assert fetcher.cached_bytes == 0
        assert fetcher.hit(0, 10) is None
        assert [call[0] for call in source.calls] == ["stream", "stream"]


async def test_after_a_restart_no_byte_is_fetched_twice(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, 40 * CHUNK)
    before = source.received_bytes
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 0, 40 * CHUNK) == image[: 40 * CHUNK]
        assert source.received_bytes == before
        assert fetcher.hit(0, 10) is not None


async def test_a_damaged_chunk_is_fetched_again_and_counted(
    fetchers: Fetchers,
    source: MemorySource,
    image: bytes,
    tmp_path: Path,
    counters: FetchCounters,
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings("damaged")
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, 8 * CHUNK)
    with (tmp_path / "42.data").open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        file.write(b"damage")
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 0, 8 * CHUNK) == image[: 8 * CHUNK]
        assert counters.damaged_chunks == 1


async def test_a_map_of_another_image_is_begun_anew(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path
) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, 8 * CHUNK)
    other = ChunkMapHeader(image_id="other", size=len(image), chunk_bytes=CHUNK)
    with (tmp_path / "42.map").open("r+b") as file:
        file.write(other.pack())
    async with fetchers(source) as fetcher:
        assert fetcher.cached_bytes == 0
        assert await read(fetcher, 0, 10) == image[:10]


async def test_chunks_of_zeros_become_holes(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path
) -> None:
    source.images = {key: bytes(len(image)) for key in source.images}
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 0, len(image)) == bytes(len(image))
        assert fetcher.is_complete
    assert os.stat(tmp_path / "42.data").st_blocks * 512 < 2 * CHUNK


async def test_a_sequential_reader_gets_growing_windows(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        for offset in range(0, len(image), CHUNK):
            length = min(CHUNK, len(image) - offset)
            assert await read(fetcher, offset, length) == image[offset : offset + length]
        lengths = [length for _, _, length in source.calls]
        assert max(lengths) == 1 << 20 or max(lengths) > 32 * CHUNK
        assert source.requests <= 8
        assert sum(lengths) == len(image), "no byte twice"


async def test_background_work_fills_what_is_missing(fetchers: Fetchers, source: MemorySource, image: bytes) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, 50 * CHUNK, 10)
        while await fetcher.fetch_background(20 * CHUNK):
            pass
        assert fetcher.is_complete
        assert source.received_bytes == len(image)


async def test_the_bytes_that_were_checked_are_the_bytes_that_are_served(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the disk gives others when it is asked again."""
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, 8 * CHUNK)
    verify = ChunkFile.verify

    def verify_and_damage(file: ChunkFile, first: int, count: int) -> list[memoryview | None]:
        found = verify(file, first, count)
        with (tmp_path / "42.data").open("r+b") as data:
            data.write(bytes(8 * CHUNK))
        return found

    monkeypatch.setattr(ChunkFile, "verify", verify_and_damage)
    monkeypatch.setattr(ChunkFile, "checked_at_once", lambda *_arguments: None)
    async with fetchers(source) as fetcher:
        assert await read(fetcher, 5, 8 * CHUNK - 5) == image[5 : 8 * CHUNK]


async def test_a_check_of_chunks_in_memory_needs_no_thread(
    fetchers: Fetchers, source: MemorySource, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, len(image))
    monkeypatch.setattr(ChunkFile, "verify", None)
    async with fetchers(source) as fetcher:
        for offset, length in [(3, 10), (CHUNK - 1, 2), (5 * CHUNK, 30 * CHUNK), (128 * CHUNK, 2 * CHUNK + 7)]:
            assert bytes(fetcher.hit(offset, length) or b"") == image[offset : offset + length]
            assert await read(fetcher, offset, length) == image[offset : offset + length]


async def test_damage_in_any_chunk_of_a_read_harms_no_other(
    fetchers: Fetchers, source: MemorySource, image: bytes, tmp_path: Path,
    counters: FetchCounters, expected_warnings: ExpectedWarnings,
) -> None:  # fmt: skip
    expected_warnings("2 cached chunks from byte 49152 on are damaged")
    async with fetchers(source) as fetcher:
        await read(fetcher, 0, len(image))
    with (tmp_path / "42.data").open("r+b") as file:
        for at in (3 * CHUNK, len(image) - 1):
            file.seek(at)
            file.write(b"\xa5")
    before = source.received_bytes
    async with fetchers(source) as fetcher:
        assert fetcher.hit(2 * CHUNK, 2 * CHUNK) is None
        assert fetcher.hit(len(image) - 1, 10) is None
        assert await read(fetcher, 0, len(image)) == image
        assert counters.damaged_chunks == 2
        assert source.received_bytes - before < 8 * CHUNK
        assert fetcher.is_complete


async def test_answers_out_of_the_buffer_of_the_hits_are_each_readers_own(
    fetchers: Fetchers, source: MemorySource, image: bytes
) -> None:
    """Of chunks that are here, and of some that come: until the next await nobody else writes there."""
    rng = random.Random(11)
    async with fetchers(source) as fetcher:
        await fetcher.read(0, len(image) // 2, deadline_s=60, patient=False)
        fetcher._ledger.watch()

        async def reader(offset: int, length: int) -> None:
            data = await fetcher.read(offset, length, deadline_s=60, patient=False)
            assert data == image[offset : offset + length]

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                offset = rng.randrange(len(image))
                nursery.start_soon(reader, offset, rng.randint(1, min(1 << 20, len(image) - offset)))


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 300_000, HIT_BYTES_MAX, HIT_BYTES_MAX + 1])
def test_large_answers_are_put_into_whole_pages(length: int) -> None:
    data = random.Random(length).randbytes(length)
    answer = in_whole_pages(data)
    assert answer == data
    assert isinstance(answer, memoryview) == (4096 < length <= HIT_BYTES_MAX)
