"""One image's bytes on this node, over its parts.

Owned by the trio loop. `_ledger` knows the chunks, `_reads` serves them, `_transfers` brings them, `_deliveries`
publishes them, `_board` wakes the readers.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from basefs import errors
from basefs.cache.bringing import ImageBringing
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.image_eviction import ImageEviction
from basefs.cache.image_map import ImageCells, cells_of
from basefs.cache.image_reads import ImageReads
from basefs.cache.image_trace import ImageTrace
from basefs.cache.ledger import STORED, ChunkLedger
from basefs.cache.reader_table import ReaderTable, Share
from basefs.cache.transfers import ImageTransfers
from basefs.cache.verifier import ChunkVerifier
from basefs.cache.waiters import WaiterBoard
from basefs.cache.whole_image import WholeImage
from basefs.catalog.records import ImageEntry
from basefs.core.byte_ranges import chunk_span

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCheck:
    """What a check of some chunks on the disk found."""

    checked_bytes: int
    damaged: list[int]


class ImageFetcher:
    """One image's bytes, through its chunk file. `file` is None while the cache directory is not usable."""

    def __init__(
        self,
        entry: ImageEntry,
        file: ChunkFile | None,
        states: bytearray,
        chunk_bytes: int,
        services: FetchServices,
    ) -> None:
        self.entry = entry
        self.size = entry.size
        self.chunk_bytes = chunk_bytes
        self._services = services
        self._board = WaiterBoard()
        age = services.evictor.age_of(entry.local.last_used_ns)
        self._ledger = ChunkLedger(states, file, size=entry.size, chunk_bytes=chunk_bytes, age=age)
        self._flights = Flights(entry.image_id, services.nursery)
        self._deliveries = Deliveries(entry, self._ledger, self._board, self._flights, services)
        self._verifier = ChunkVerifier(self._ledger, services.disk, services.hashes, self._damaged)
        self.eviction = ImageEviction(entry, self._ledger, self._board, self._flights, self._deliveries, services)
        self.whole = WholeImage(
            entry, self._ledger, self._verifier, self.eviction, self._deliveries, services, self._bring
        )
        self._transfers = ImageTransfers(
            entry, self._ledger, self._board, self._flights, self._deliveries, self.whole, services
        )
        self._bringing = ImageBringing(entry, self._ledger, self._transfers, self._deliveries, services)
        self.trace = ImageTrace(entry, self._ledger, self._flights, self._transfers, self._deliveries, services)
        self._readers = 0
        self._no_readers = trio.Event()
        # With nothing to check the chunk file's own: a hit costs one call.
        hits = self._verifier if file is None or STORED in states else file
        self.hit: Callable[[int, int], memoryview | bytes | None] = hits.hit
        self.hit_into: Callable[[int, memoryview], bool] = hits.hit_into
        self._reads = ImageReads(
            entry,
            self._ledger,
            self._verifier,
            self._transfers,
            self._deliveries,
            self.whole,
            self.trace,
            services,
            self.hit,
        )
        self._deliveries.tell_size()

    @property
    def has_file(self) -> bool:
        """Whether there is a chunk file; without one nothing is stored."""
        return self._ledger.file is not None

    def share(self, table: ReaderTable, *, cluster_bits: int = 0, shown_bytes: int = 0) -> Share | None:
        """See `ChunkFile.share`; None while there is no chunk file."""
        file = self._ledger.file
        if file is None:
            return None
        return file.share(self.entry.number, table, cluster_bits=cluster_bits, shown_bytes=shown_bytes)

    def forget_clusters(self) -> None:
        """See `ChunkFile.forget_clusters`."""
        if self._ledger.file is not None:
            self._ledger.file.forget_clusters()

    def adopt(self, file: ChunkFile, states: bytearray) -> None:
        """Use the chunk file that could not be opened before. Its chunks are as large as those here."""
        self._ledger.adopt(file, states, age=self._services.evictor.age_of(self.entry.local.last_used_ns))
        self._deliveries.tell_size()

    @property
    def cached_bytes(self) -> int:
        """Image bytes in the chunk file, exactly."""
        return self._ledger.cached_bytes

    @property
    def is_complete(self) -> bool:
        """Whether every byte is in the chunk file."""
        return self._ledger.cached_bytes == self.size

    def check_whole(self) -> None:
        """Return if every byte is in the chunk file, or was when that was closed.

        Raises:
            CacheError: some are missing.
        """
        if not self.is_complete:
            missing = self.size - self.cached_bytes
            raise errors.CacheError(f"image {self.entry.image_id}: {missing} of {self.size} bytes are missing")

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """No chunk is evicted while the body runs, which may close the image.

        Raises:
            CacheError: some bytes are missing.
        """
        self.check_whole()
        with self._kept(range(len(self._ledger.states))):
            yield

    @contextmanager
    def whole_file(self) -> Iterator[ChunkFile]:
        """The chunk file, kept open and whole while the body runs.

        Raises:
            CacheError: some bytes are missing, or one was lost while the body ran.
        """
        with self._reader(range(len(self._ledger.states))):
            file = self._ledger.file
            if file is None:
                raise errors.CacheError(f"image {self.entry.image_id}: it has no chunk file")
            self.check_whole()
            losses = self._ledger.losses
            yield file
            if self._ledger.losses != losses:
                raise errors.CacheError(f"image {self.entry.image_id}: a cached chunk was lost meanwhile")

    @property
    def is_streamed(self) -> bool:
        """Whether the image comes as one sequential stream."""
        return self._deliveries.is_streamed

    @property
    def is_busy(self) -> bool:
        """Whether a transfer is under way or a reader is inside."""
        return self._flights.under_way > 0 or self._readers > 0 or self.whole.is_refetching

    async def read(self, offset: int, length: int, *, deadline_s: float, patient: bool) -> bytes | memoryview:
        """Exactly `[offset, offset + length)`; 0 <= offset, 0 < length, offset + length <= size.

        Valid until the next await: who keeps it copies it.

        Waits up to `deadline_s`, through outages and retries; `patient` readers (guests) also wait through
        a refusal (401, 403), which an operator may lift; others get it at once.

        Raises:
            ImageNotFoundError: Glance has the image no more and the bytes are not here.
            ImageQuarantinedError: the bytes are not those that Glance tells of: at once, or, while they are fetched
                again, when the deadline came.
            SourceError: why the last try failed, when the deadline came.
            DeadlineExceededError: no try failed, and the bytes did not come in time.
        Cancellation: at any time; transfers under way go on.
        """
        last_error: list[errors.BasefsError] = []
        span = chunk_span(offset, length, self.chunk_bytes)
        with self._reader(span), trio.move_on_after(deadline_s):
            return await self._reads.read(span, offset, length, patient, last_error)
        gate = self._deliveries.gate
        if (error := last_error[-1] if gate.is_open and last_error else gate.error) is not None:
            raise copy.copy(error)
        raise errors.DeadlineExceededError(
            f"image {self.entry.image_id}: bytes {offset}-{offset + length - 1} did not come within {deadline_s:g} s"
        )

    @contextmanager
    def _reader(self, span: range) -> Iterator[None]:
        """Keeps the chunk file open, and the chunks of `span` in it, while the body runs."""
        with self.held(), self._kept(span):
            yield

    @contextmanager
    def _kept(self, span: range) -> Iterator[None]:
        """Keeps the chunks of `span` in the cache while the body runs."""
        self._ledger.hold(span)
        try:
            yield
        finally:
            self._ledger.release(span)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the chunk file open while the body runs; `close` waits for it."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._no_readers.set()
                self._no_readers = trio.Event()

    async def kept_start(self, length: int) -> bytes | None:
        """The first `length` bytes, 0 < length <= size, if all of them are in the cache; nothing is fetched."""
        span = chunk_span(0, length, self.chunk_bytes)
        with self._reader(span):
            return await self._reads.kept_start(span, length)

    async def check_disk(self, span: range) -> DiskCheck | None:
        """What the disk holds of the chunks in `span`, past the page cache; None when the image was closed.

        Chunks that are damaged there are absent afterwards.

        Raises:
            CacheError: the chunk file cannot be read at all.
        """
        with self._reader(span):
            here = self._ledger.here(span)
            damaged = await self._verifier.check_disk(span)
            if damaged is None:
                return None
            size = sum(min(self.chunk_bytes, self.size - index * self.chunk_bytes) for index in here)
            return DiskCheck(checked_bytes=size, damaged=damaged)

    async def cells(self, cells_max: int) -> ImageCells:
        """Where the bytes are now, in at most `cells_max` cells.

        Raises:
            CacheError: the disk does not tell which chunks are holes.
        """
        with self._reader(range(0)):  # keeps the fd open
            states, file = bytes(self._ledger.states), self._ledger.file
            try:
                return await self._services.disk.run(
                    lambda: cells_of(
                        states,
                        None if file is None else file.data_fd,
                        size=self.size,
                        chunk_bytes=self.chunk_bytes,
                        cells_max=cells_max,
                    )
                )
            except OSError as exc:
                raise errors.CacheError(f"cache file of {self.entry.image_id}: {exc}") from exc

    def _damaged(self, first: int, count: int) -> None:
        """Chunks of an earlier life did not fit their checksums; they are absent now."""
        self._services.counters.damaged_chunks += count
        # They may have been served since they were last checked.
        self._services.forget_pages(self.entry)
        log.warning(
            "image %s: %d cached chunks from byte %d on are damaged; they are fetched again",
            self.entry.image_id, count, first * self.chunk_bytes,
        )  # fmt: skip
        self._deliveries.tell_size()

    async def fetch_background(self, bytes_max: int) -> int:
        """Bring something that is missing, at most `bytes_max`, at background priority; how many bytes that were.

        Until `is_complete` it may be called again; 0 says that others brought something. A streamed image is brought
        whole. One that is being fetched again, because its hash was wrong, is waited for.

        Raises:
            CacheError: what came could not be kept: the cache is full, or its disk fails.
            SourceError, ImageNotFoundError: the transfer failed.
            ImageQuarantinedError: the image's bytes are not those that Glance tells of.
        """
        await self.whole.wait_open()
        return await self._bring(bytes_max)

    async def _bring(self, bytes_max: int) -> int:
        """As `fetch_background`, also while the image is sealed."""
        return await self._bringing.bring(bytes_max)

    async def wait_retry(self) -> None:
        """Return when a try may be made after a failed one."""
        await self._deliveries.gate.wait()

    async def store_header(self, header: bytes) -> None:
        """Keep the image's first bytes, which the checks read (whole chunks of them, or the whole image)."""
        whole = len(header) if len(header) == self.size else len(header) // self.chunk_bytes * self.chunk_bytes
        if not whole:
            return
        span = chunk_span(0, whole, self.chunk_bytes)
        self._ledger.hold(span)  # it writes without claiming: see ImageStream
        try:
            await self._flights.wait_no_evictions()
            async with self._services.evictor.room(whole) as room:
                receiver = self._deliveries.new_receiver(room)
                try:
                    await self._services.disk.run(receiver.take, 0, memoryview(header)[:whole])
                finally:
                    self._deliveries.end_receiver(receiver)
                    self.whole.rewritten()
        finally:
            self._ledger.release(span)
        self._deliveries.tell_size()

    def stop_unwanted(self) -> None:
        """Ask what is under way to end at its next piece, unless a reader waits for a chunk."""
        if not len(self._board):
            self._flights.stop()

    async def close(self) -> None:
        """Give the chunk file back once nothing is under way; transfers are stopped, readers waited for."""
        await self.trace.close()
        while self.is_busy:
            await self.whole.close()
            self._flights.stop()
            await self._flights.wait_idle()
            if self._readers:
                await self._no_readers.wait()
        self._deliveries.tell_size()
        file, self._ledger.file = self._ledger.file, None
        if file is not None:
            file.close()
