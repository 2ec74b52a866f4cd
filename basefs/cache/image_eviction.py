"""Drops chunks of one prepared image; the evictor says how old ones (`cache.eviction_order.EvictableImage`).

A chunk is claimed in one synchronous step in which nobody has it in hand, so it is served no more; then a thread
clears its checksum and frees its blocks; only then it is missing and may be fetched again. So no reader sees a hole,
and no late hole meets a refetched chunk. Owned by the trio loop.
"""

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import ChunkLedger
from basefs.cache.space import CacheSpace
from basefs.cache.waiters import WaiterBoard
from basefs.catalog.records import ImageEntry
from basefs.core.inodes import image_inode

EVICT_BYTES = 4 << 20
"""Dropped in one call in a thread; who wants one of them waits so long."""


class ImageEviction:
    """One image's side of eviction."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        board: WaiterBoard,
        flights: Flights,
        deliveries: Deliveries,
        services: FetchServices,
    ) -> None:
        self.entry = entry
        self._ledger = ledger
        self._board = board
        self._flights = flights
        self._deliveries = deliveries
        self._services = services

    @property
    def is_busy(self) -> bool:
        """Whether something is under way for the image."""
        return self._flights.under_way > 0

    def ages(self) -> list[tuple[int, int]]:
        """The ages that chunks have, oldest first, and their bytes."""
        return self._ledger.ages()

    def sweep(self) -> bool:
        """Every chunk is one sweep older, until it is touched; whether any was used since the last sweep."""
        return self._ledger.sweep()

    async def evict(self, age: int, bytes_max: int) -> int:
        """Drop chunks at least `age` old until their blocks were at least `bytes_max`; how many chunks that were.

        Chunks that a reader has in hand stay. Who wants one that is going waits, and fetches it again.
        """
        inode = image_inode(self.entry.number)
        chunk_bytes = self._ledger.chunk_bytes
        before = self._services.space.allocated(inode)
        evicted = 0
        with self._flights.eviction():
            # A file that is None was closed: then there is nothing to drop chunk by chunk.
            while (missing := bytes_max - before + self._services.space.allocated(inode)) > 0 and self._ledger.file:
                chunks = self._ledger.claim_eviction(age, max(1, -(-min(EVICT_BYTES, missing) // chunk_bytes)))
                if not chunks or not await self._drop(chunks, inode):
                    break
                evicted += len(chunks)
        self._deliveries.tell_size()
        return evicted

    async def discard(self) -> None:
        """Drop every chunk, whoever has it in hand, and what is kept in memory: the image as a whole is wrong.

        What is under way is stopped first, or it would write beside the drop. Readers are kept out by the seal.
        """
        while self._flights.under_way:
            self._flights.stop()
            await self._flights.wait_idle()
        with self._flights.eviction():
            self._services.unstored.forget(self.entry.number)
            chunks = self._ledger.claim_all()
            if chunks and self._ledger.file is not None:
                await self._drop(chunks, image_inode(self.entry.number))
            else:
                self._ledger.evicted(chunks)
        self._deliveries.tell_size()

    async def _drop(self, chunks: list[int], inode: int) -> bool:
        """Drop EVICTING chunks; whether the disk did it."""
        file = self._ledger.file
        assert file is not None
        try:
            await self._services.disk.run(_drop, file, chunks, self._services.space, inode)
        except errors.CacheError as exc:
            self._services.health.failed(exc)
            return False
        else:
            return True
        finally:
            self._ledger.evicted(chunks)
            self._board.failed(chunks, None)


def _drop(file: ChunkFile, chunks: list[int], space: CacheSpace, inode: int) -> None:
    """In a thread."""
    try:
        file.drop(chunks)
    finally:
        space.settle(inode, 0, file.allocated_bytes)
