"""The one stream of an image whose store does not honour ranges: everything from byte 0, checked at the end.

At most one stream an image. Readers are served below its watermark; one that is not this image's takes back what it
brought, one whose hash is right or wrong decides on the whole image (`WholeImage`). One that breaks begins again at
byte 0, and passes over the chunks that are here.
Where there is no room for what it brings, it goes on only as far as readers wait for it: what runs past them would
be lost, and cost them another stream.
"""

import trio

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import READY, STORED, ChunkLedger
from basefs.cache.space import Room
from basefs.cache.waiters import WaiterBoard
from basefs.cache.whole_image import WholeImage, digest_of
from basefs.catalog.records import ImageEntry
from basefs.sources.base import Digest

STREAM_PIECE_BYTES = 1 << 18
ROOM_BYTES = 16 << 20
"""Room that a stream asks for at a time; it takes minutes, and must not keep from others what it may need once."""
PACE_S = 20.0
"""A stream that cannot be stored and that nobody waits for ends after so long."""


class ImageStream:
    """The stream of one image; `start` it when a chunk is missing."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        board: WaiterBoard,
        flights: Flights,
        deliveries: Deliveries,
        whole: WholeImage,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._flights = flights
        self._deliveries = deliveries
        self._whole = whole
        self._services = services
        self._is_running = False
        self._ended = trio.Event()
        self._error: errors.BasefsError | None = None
        self._went_round = False

    def start(self) -> None:
        """Have the whole image come from byte 0, unless it is coming already. Synchronous."""
        if not self._is_running:
            self._is_running = True
            self._ended = trio.Event()
            self._flights.start(self._fly)

    async def run_to_end(self) -> errors.BasefsError | None:
        """Start it if it does not run; why it failed, when it has ended. One that was stopped is no failure."""
        self.start()
        await self._ended.wait()
        return self._error

    async def _fly(self) -> None:
        digest = digest_of(self._entry.record)
        error: errors.BasefsError | None = None
        ended, self._went_round = self._ended, False
        # It writes without claiming: no chunk may be dropped meanwhile, or the drop would overtake a write.
        whole = range(len(self._ledger.states))
        self._ledger.hold(whole)
        try:
            await self._flights.wait_no_evictions()
            async with self._services.stream_slots.take(background=False):
                error = await self._transfer(digest)
            if error is None:
                self._deliveries.gate.succeeded()
            else:
                self._deliveries.note_failure(error)
        finally:
            self._is_running = False
            self._ledger.release(whole)
            self._board.all_failed(error)
            self._deliveries.tell_size()
            self._error = error or self._not_kept()
            ended.set()

    async def _transfer(self, digest: Digest | None) -> errors.BasefsError | None:
        present = bytes(1 if state in (STORED, READY) else 0 for state in self._ledger.states)
        losses = self._ledger.losses
        room = Room(0)
        receiver = self._deliveries.new_receiver(room, present=present, not_stored=self._not_stored)
        try:
            await self._services.source.fetch_stream(
                self._entry.image_id,
                size=self._ledger.size,
                piece_bytes=max(self._ledger.chunk_bytes, STREAM_PIECE_BYTES),
                digest=digest,
                deliver=receiver.take,
            )
        except errors.SourceHashError as exc:
            assert digest is not None, "nothing was compared"
            self._whole.mismatched(digest)
            return exc
        except errors.SourceCorruptError as exc:
            await self._take_back(present)
            return exc
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            return exc
        finally:
            self._deliveries.end_receiver(receiver)
            self._whole.rewritten()
        is_all = receiver.is_same and not receiver.stop and self._ledger.losses == losses
        if digest is not None and is_all and self._ledger.cached_bytes == self._ledger.size:
            self._whole.proved()
        return None

    def _not_kept(self) -> errors.CacheError | None:
        return errors.CacheError(f"image {self._entry.image_id}: it could not be kept") if self._went_round else None

    async def _not_stored(self, first: int) -> bool:
        """The chunks from `first` on cannot be stored: make room, or wait until somebody waits for them.

        True: try again to store them; False: go round the cache. Called from the fetch thread.
        """
        if self._services.health.is_usable:
            async with self._services.evictor.room(ROOM_BYTES) as room:
                if room.left_bytes:
                    return True
        self._went_round = True
        with trio.move_on_after(PACE_S) as waited:
            await self._board.wait_wanted(first)
        if waited.cancelled_caught:
            self._flights.stop()
        return False

    async def _take_back(self, present_before: bytes) -> None:
        """The stream is not this image's: nothing that it brought may be served again."""
        states = self._ledger.states
        lost = [index for index, before in enumerate(present_before) if not before and states[index] == READY]
        for index in lost:
            self._ledger.lose(index)
        self._services.forget_pages(self._entry)
        self._services.unstored.forget(self._entry.number)
        if self._ledger.file is not None:
            try:
                await self._services.disk.run(self._ledger.file.clear, lost)
            except errors.CacheError as exc:
                self._services.health.failed(exc)
