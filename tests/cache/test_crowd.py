"""A thousand readers of many images: through ten minutes without Glance, and side by side on one link.

Nothing here uses a thread, so virtual time runs as fast as the processor: an hour costs seconds.
"""

import json
import logging
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.cache.chunk_file import open_chunk_file
from basefs.cache.image_fetcher import ImageFetcher
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.core.chunk_map import ChunkMapHeader
from basefs.sources.base import Deliver, Digest, ProbeResult
from basefs.sources.endpoints import Endpoint, Endpoints
from tests.cache.conftest import CHUNK, make_entry
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings

MIB = 1 << 20
AWAY = errors.SourceUnavailableError("ConnectionRefusedError", may_be_away=True)
TRACE = Path(__file__).parents[2] / "tools" / "bench" / "debian12-boot.json"


class LoopSource:
    """A Glance behind a link of `bytes_per_s`; `is_away` makes it go. No threads."""

    def __init__(self, endpoints: Endpoints, *, bytes_per_s: float) -> None:
        self.requests = self.received_bytes = 0
        self.is_away = False
        self._endpoints = endpoints
        self._bytes_per_s = bytes_per_s
        self._link_free_at = 0.0

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        self._endpoints.check()
        self.requests += 1
        self._link_free_at = max(self._link_free_at, trio.current_time()) + length / self._bytes_per_s
        await trio.sleep_until(self._link_free_at + 0.005)
        if self.is_away:
            self._endpoints.failed("glance", AWAY)
            raise AWAY
        for start in range(offset, offset + length, piece_bytes):
            deliver(start, memoryview(bytes(min(piece_bytes, offset + length - start))))
        self.received_bytes += length

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        raise NotImplementedError

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        raise NotImplementedError


class LoopEndpoints(Endpoints):
    """Probes without a thread."""

    def __init__(self) -> None:
        super().__init__({"glance": lambda: None}, has_token=lambda: True, changed=lambda _name: None)
        self.source: LoopSource | None = None

    async def _probe(self, endpoint: Endpoint) -> None:
        await trio.sleep(0.01)
        if self.source is not None and self.source.is_away:
            self._probe_failed(endpoint, AWAY)
        else:
            self.answered("glance")


@asynccontextmanager
async def images_over(
    directory: Path, count: int, size: int, *, bytes_per_s: float
) -> AsyncIterator[tuple[LoopSource, list[ImageFetcher]]]:
    endpoints = LoopEndpoints()
    source = endpoints.source = LoopSource(endpoints, bytes_per_s=bytes_per_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoints.watch)
        services = replace(
            make_services(nursery, source, directory),
            slots=PrioritySlots(8, reserved=2),
            request_bytes_max=4 * MIB,
            outage=endpoints.outage,
        )
        fetchers = []
        for number in range(count):
            entry = make_entry(size, image_id=f"image-{number}")
            wanted = ChunkMapHeader(image_id=entry.image_id, size=size, chunk_bytes=CHUNK)
            file, states = open_chunk_file(directory, 100 + number, wanted)
            fetchers.append(ImageFetcher(entry, file, states, CHUNK, services))
        yield source, fetchers
        for fetcher in fetchers:
            await fetcher.close()
        nursery.cancel_scope.cancel()


async def test_a_thousand_guests_outlive_ten_minutes_without_glance_in_silence_and_go_on_together(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    expected_warnings: ExpectedWarnings,
) -> None:
    caplog.set_level(logging.INFO, logger="basefs")
    expected_warnings("Glance is away: ConnectionRefusedError")
    served: list[float] = []
    refused: list[float] = []
    async with images_over(tmp_path, 50, 4 * MIB, bytes_per_s=100 * MIB) as (source, fetchers):
        source.is_away = True

        async def guest(number: int) -> None:
            fetcher = fetchers[number % 50]
            await trio.sleep(number * 0.05)  # all through the first minute
            offset = number // 50 * CHUNK * 12
            assert await fetcher.read(offset, CHUNK, deadline_s=900.0, patient=True) == bytes(CHUNK)
            served.append(trio.current_time())

        async def other(number: int) -> None:
            await trio.sleep(number * 6.0)
            began = trio.current_time()
            with pytest.raises(errors.SourceUnavailableError, match="Glance is away"):
                await fetchers[number % 50].read(3 * MIB, CHUNK, deadline_s=15.0, patient=False)
            refused.append(trio.current_time() - began)

        async with trio.open_nursery() as readers:
            for number in range(1000):
                readers.start_soon(guest, number)
            for number in range(90):
                readers.start_soon(other, number)
            await trio.sleep(600.0)
            assert served == []
            asked = source.requests
            assert asked <= 16, "no ordinary request goes out while Glance is known to be away"
            source.is_away = False
            back_at = trio.current_time()
    assert len(served) == 1000
    assert max(served) - back_at <= 5.0
    assert source.requests - asked <= 1000
    assert max(refused) <= 15.1
    records = [record.getMessage() for record in caplog.records]
    assert len(records) == 2, records
    assert "Glance is back after 60" in records[1]


async def test_two_hundred_booting_guests_get_equal_shares_of_a_link(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [(offset, length) for offset, length in json.loads(TRACE.read_text()) if offset + length < 64 * MIB][:40]
    waits = [0.0] * 200
    async with images_over(tmp_path, 20, 64 * MIB, bytes_per_s=20 * MIB) as (_source, fetchers):

        async def guest(number: int) -> None:
            fetcher = fetchers[number % 20]
            for offset, length in trace:
                began = trio.current_time()
                await fetcher.read(offset, length, deadline_s=300.0, patient=True)
                waits[number] += trio.current_time() - began

        async with trio.open_nursery() as guests:
            for number in range(200):
                guests.start_soon(guest, number)
    jain = sum(waits) ** 2 / (len(waits) * sum(wait * wait for wait in waits))
    with capsys.disabled():
        print(
            f"\n200 guests, 20 images, {len(trace)} reads each: wait median {statistics.median(waits):.1f} s, "
            f"max {max(waits):.1f} s (virtual), Jain's index {jain:.4f}"
        )
    assert jain > 0.95
    assert max(waits) < 1.5 * statistics.median(waits)
