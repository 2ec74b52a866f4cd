"""One read of an image's stored bytes: what is here is taken, what is not is waited for, until all is here.

No await stands between finding a chunk absent and waiting for it. What is returned may lie in the buffer of the hits:
nothing is awaited once it is there, and it is valid until the caller's next await.
"""

from collections.abc import Callable

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.hit_buffer import in_whole_pages
from basefs.cache.image_trace import ImageTrace
from basefs.cache.ledger import ChunkLedger
from basefs.cache.transfers import ImageTransfers
from basefs.cache.verifier import ChunkVerifier
from basefs.cache.whole_image import WholeImage
from basefs.catalog.records import ImageEntry


class ImageReads:
    """Reads of one image; the caller keeps the chunks of `span`, which has the read, in the cache meanwhile."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        verifier: ChunkVerifier,
        transfers: ImageTransfers,
        deliveries: Deliveries,
        whole: WholeImage,
        trace: ImageTrace,
        services: FetchServices,
        hit: Callable[[int, int], memoryview | bytes | None],
    ) -> None:
        """`hit(offset, size)` gives bytes of READY chunks that are in memory, else None."""
        self._entry = entry
        self._chunk_bytes = ledger.chunk_bytes
        self._ledger = ledger
        self._verifier = verifier
        self._transfers = transfers
        self._deliveries = deliveries
        self._whole = whole
        self._trace = trace
        self._services = services
        self._hit = hit

    async def read(
        self, span: range, offset: int, length: int, patient: bool, last_error: list[errors.BasefsError]
    ) -> bytes | memoryview:
        """As `ImageFetcher.read`, without a deadline; `last_error` gets the failures that were waited through."""
        memory: dict[int, bytes | memoryview] = {}
        seals = self._whole.seals
        while True:
            if self._whole.is_sealed:
                last_error[:] = [self._whole.quarantine_error()]
                await self._whole.wait_open()
            if seals != self._whole.seals:
                memory.clear()
                seals = self._whole.seals
            for marker, chunks in self._ledger.touch(span):
                self._transfers.read_ahead(marker, chunks)
            if fresh := self._ledger.first_touches(span):
                self._trace.touched(span, fresh, by_guest=patient)
            memory |= await self._verifier.verify(span)
            absent = [index for index in self._ledger.absent(span) if index not in memory]
            if absent and (kept := self._unstored(absent)):
                memory |= kept
                absent = [index for index in absent if index not in memory]
            if not absent:
                data = await self._assemble(span, offset, length, memory)
                if data is not None and self._whole.seals == seals:
                    return data
            elif not self._deliveries.gate.is_open:
                await self._deliveries.gate.wait()
            else:
                try:
                    with self._services.readers.waiting():
                        memory |= await self._transfers.wait_for(absent)
                except errors.BasefsError as exc:
                    last_error[:] = [exc]
                    if not _may_pass(exc, patient=patient):
                        raise

    async def kept_start(self, span: range, length: int) -> bytes | None:
        """See `ImageFetcher.kept_start`."""
        memory: dict[int, bytes | memoryview] = {}
        memory |= await self._verifier.verify(span)
        if self._whole.is_sealed or not memory.keys() >= set(self._ledger.absent(span)):
            return None
        start = await self._assemble(span, 0, length, memory)
        return None if start is None else bytes(start)

    def _unstored(self, absent: list[int]) -> dict[int, bytes]:
        """Those of `absent` that are kept in memory, as long as nothing can be stored."""
        unstored = self._services.unstored
        if self._services.health.is_usable and not self._services.evictor.is_full:
            unstored.clear()
            return {}
        found = {index: unstored.get(self._entry.number, index) for index in absent}
        return {index: chunk for index, chunk in found.items() if chunk is not None}

    async def _assemble(
        self, span: range, offset: int, length: int, memory: dict[int, bytes | memoryview]
    ) -> bytes | memoryview | None:
        """The bytes, all of which are here; None when the cache disk failed and the reader has to look again.

        As `_read_file`, nothing is awaited once the bytes are in the buffer of the hits.
        """
        if not memory:
            return await self._read_file(offset, length, span)
        parts = []
        for index in span:
            start = index * self._chunk_bytes
            begin, end = max(offset, start), min(offset + length, start + self._chunk_bytes)
            part: bytes | memoryview
            if index in memory:
                part = memory[index][begin - start : end - start]
            else:
                found = await self._read_file(begin, end - begin, range(index, index + 1))
                if found is None:
                    return None
                part = bytes(found)  # the next one comes into the same buffer
            parts.append(part)
        return in_whole_pages(b"".join(parts))

    async def _read_file(self, offset: int, length: int, span: range) -> bytes | memoryview | None:
        """The bytes of READY chunks, until the next await; None when the cache disk failed: they are absent then."""
        hit = self._hit(offset, length)
        if hit is not None:
            return hit
        file = self._ledger.file
        if file is not None:
            try:
                return in_whole_pages(await self._services.disk.run(file.read, offset, length))
            except errors.CacheError as exc:
                self._services.health.failed(exc)
        for index in span:
            self._ledger.lose(index)
        self._deliveries.tell_size()
        return None


def _may_pass(error: errors.BasefsError, *, patient: bool) -> bool:
    """Whether waiting may help."""
    if isinstance(error, errors.SourceUnavailableError | errors.SourceCorruptError):
        return True
    return patient and isinstance(error, errors.SourceForbiddenError)
