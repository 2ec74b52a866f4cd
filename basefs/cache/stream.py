"""The one stream of an image whose store does not honour ranges: everything from byte 0, checked at the end.

At most one stream an image. Readers are served below its watermark; a stream that turns out wrong as a whole
takes back what it brought. One that breaks begins again at byte 0, and passes over the chunks that are here.
"""

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import READY, STORED, ChunkLedger
from basefs.cache.waiters import WaiterBoard
from basefs.catalog.records import ImageEntry
from basefs.sources.base import Digest

STREAM_PIECE_BYTES = 1 << 18


class ImageStream:
    """The stream of one image; `start` it when a chunk is missing."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        board: WaiterBoard,
        flights: Flights,
        deliveries: Deliveries,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._flights = flights
        self._deliveries = deliveries
        self._services = services
        self.is_running = False

    def start(self) -> None:
        """Have the whole image come from byte 0, unless it is coming already. Synchronous."""
        if not self.is_running:
            self.is_running = True
            self._flights.start(self._fly)

    async def _fly(self) -> None:
        record = self._entry.record
        digest = None
        if record.os_hash_algo and record.os_hash_value:
            digest = Digest(algorithm=record.os_hash_algo, value=record.os_hash_value)
        error: errors.BasefsError | None = None
        try:
            async with self._services.stream_slots.take(background=False):
                error = await self._transfer(digest)
            if error is None:
                self._deliveries.gate.succeeded()
            else:
                self._deliveries.note_failure(error)
        finally:
            self.is_running = False
            self._board.all_failed(error)
            self._deliveries.tell_size()

    async def _transfer(self, digest: Digest | None) -> errors.BasefsError | None:
        present = bytes(1 if state in (STORED, READY) else 0 for state in self._ledger.states)
        receiver = self._deliveries.new_receiver(present=present)
        try:
            await self._services.source.fetch_stream(
                self._entry.image_id,
                size=self._ledger.size,
                piece_bytes=max(self._ledger.chunk_bytes, STREAM_PIECE_BYTES),
                digest=digest,
                deliver=receiver.take,
            )
        except errors.SourceCorruptError as exc:
            await self._quarantine(present)
            return exc
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            return exc
        finally:
            self._deliveries.end_receiver(receiver)
        return None

    async def _quarantine(self, present_before: bytes) -> None:
        """The stream turned out wrong as a whole: nothing that it brought may be served again."""
        states = self._ledger.states
        lost = [index for index, before in enumerate(present_before) if not before and states[index] == READY]
        for index in lost:
            self._ledger.lose(index)
        self._services.forget_pages(self._entry)
        if self._ledger.file is not None:
            try:
                await self._services.disk.run(self._ledger.file.clear, lost)
            except errors.CacheError as exc:
                self._deliveries.disk_failed(exc)
