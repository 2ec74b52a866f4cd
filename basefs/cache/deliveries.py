"""What the transfers of one image bring and tell: chunks that are down, tries that failed.

Owned by the trio loop; every method is one synchronous step.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import ChunkLedger
from basefs.cache.link_meter import TransferTiming
from basefs.cache.outage import RetryGate
from basefs.cache.receiver import Claims, Receiver, Store
from basefs.cache.space import Room
from basefs.cache.waiters import WaiterBoard
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.core.inodes import image_inode

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 3600.0
"""How long an image stays a streamed one before its store is asked for a range again (so it is by each server)."""
STORE_LOOK_AGAIN_S = 30.0
"""The same where a store behind Glance may have come back meanwhile: Glance's own never begins to answer ranges."""


class Deliveries:
    """Publishes what came for one image; `board` learns what came, `gate` what failed."""

    def __init__(
        self, entry: ImageEntry, ledger: ChunkLedger, board: WaiterBoard, flights: Flights, services: FetchServices
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._flights = flights
        self._services = services
        self._losses = ledger.losses
        self.gate = RetryGate(entry.image_id, services.jitter, services.outage, services.good_at)

    @property
    def is_streamed(self) -> bool:
        """Whether the image comes as one sequential stream."""
        return self._entry.local.source_kind == "streamed"

    def may_be_ranged(self) -> bool:
        """Whether a streamed image is to be asked for by range once more; True once in a while."""
        looked_at, now = self._entry.looked_at, trio.current_time()
        has_store = self._services.good_at(self._entry.image_id) <= now
        if looked_at is not None and now - looked_at < (STORE_LOOK_AGAIN_S if has_store else LOOK_AGAIN_S):
            return False
        self._entry.looked_at = now
        return True

    def ranged(self, reason: str) -> None:
        """The streamed image was asked for by range, and that was honoured."""
        log.info("image %s: read by ranges again: %s", self._entry.image_id, reason)
        self._entry.local.source_kind, self._entry.local.source_reason = "ranged", reason
        self._board.all_failed(None)  # who waits for the stream looks again, and finds a quicker way
        self._services.changed(self._entry)

    def new_receiver(
        self,
        room: Room,
        *,
        timing: TransferTiming | None = None,
        claims: Claims | None = None,
        present: bytes = b"",
        not_stored: Callable[[int], Awaitable[bool]] | None = None,
    ) -> Receiver:
        """A receiver for one transfer that draws from `room`; `end_receiver` must follow. The rest: see `Receiver`."""
        file = self._ledger.file
        store: Store | None = None
        if file is not None and self._services.health.is_usable:
            inode = image_inode(self._entry.number)
            store = Store(file=file, inode=inode, space=self._services.space, room=room)
        token = trio.lowlevel.current_trio_token()
        receiver = Receiver(
            store,
            self._ledger.chunk_bytes,
            self._arrived,
            token,
            timing=timing,
            claims=claims,
            present=present,
            not_stored=not_stored,
        )
        self._flights.add(receiver)
        return receiver

    def check_storable(self, room: Room, length: int) -> None:
        """Return if what background work brings can be kept.

        Raises:
            CacheError: it cannot; the message says why.
        """
        if not self._services.health.is_usable:
            raise errors.CacheError(f"image {self._entry.image_id}: {self._services.health.reason}")
        if not room.left_bytes:
            raise errors.CacheError(
                f"image {self._entry.image_id}: the cache has no room for {length} bytes more, "
                "and nothing else that is not in use"
            )

    def end_receiver(self, receiver: Receiver) -> None:
        """The transfer is over."""
        self._flights.remove(receiver)

    def _arrived(self, first: int, length: int, unstored: bytes | None, error: errors.CacheError | None) -> None:
        """See `Arrived`."""
        self._entry.local.fetched_bytes += length
        if error is not None:
            self._services.health.failed(error)
        self._services.evictor.look()
        chunk_bytes = self._ledger.chunk_bytes
        for index in range(first, first + -(-length // chunk_bytes)):
            if unstored is None:
                self._ledger.stored(index)
                self._board.arrived(index)
            else:
                self._ledger.not_stored(index)
                at = (index - first) * chunk_bytes
                chunk = unstored[at : at + chunk_bytes]
                self._services.evictor.counters.unstored_bytes += len(chunk)
                self._services.unstored.put(self._entry.number, index, chunk)
                self._board.arrived(index, chunk)

    def note_failure(self, error: errors.BasefsError) -> None:
        """A transfer failed: the gate closes, or the image is a stream from now on."""
        if isinstance(error, errors.SourceHashError):
            return  # told, and acted upon, by WholeImage
        if isinstance(error, errors.RangeNotHonouredError):
            if not self.is_streamed:
                log.warning("image %s: read as one stream from now on: %s", self._entry.image_id, error)
            self._entry.local.source_kind = "streamed"
            self._entry.local.source_reason = str(error)
            self._entry.looked_at = trio.current_time()
        else:
            if isinstance(error, errors.ImageNotFoundError):
                self._entry.is_gone = True
            self.gate.failed(error)

    def tell_size(self) -> None:
        """Bring the entry's `cached_bytes` up to date, and what is known of it as a whole."""
        local = self._entry.local
        local.cached_bytes = self._ledger.cached_bytes
        # Also where what was lost is here again: it was not hashed.
        is_other = self._ledger.losses > self._losses or local.cached_bytes < self._ledger.size
        if is_other and local.whole in WHOLE:
            local.whole = "unknown"
        self._losses = self._ledger.losses
        self._services.changed(self._entry)
