"""Brings what is missing of one image in the background, piece by piece; the warmer and a refetch say how fast.

Owned by the trio loop.
"""

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.ledger import ChunkLedger
from basefs.cache.transfers import ImageTransfers
from basefs.catalog.records import ImageEntry
from basefs.core.request_size import BYTES_FIRST

CACHE_SHARE = 32
"""One request is for so small a part of the cache at most: room for all of it is promised before it begins."""


class ImageBringing:
    """One image; whether it is sealed is not asked here."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        transfers: ImageTransfers,
        deliveries: Deliveries,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._transfers = transfers
        self._deliveries = deliveries
        self._services = services

    async def bring(self, bytes_max: int) -> int:
        """See `ImageFetcher.fetch_background`."""
        if self._deliveries.is_streamed:
            return await self._bring_stream()
        bytes_max = min(bytes_max, max(BYTES_FIRST, self._services.space.capacity // CACHE_SHARE))
        fetched = await self._transfers.background(max(1, bytes_max // self._ledger.chunk_bytes))
        if not fetched:
            await self._wait_for_others()
        return fetched

    async def _bring_stream(self) -> int:
        missing = self._ledger.size - self._ledger.cached_bytes
        if missing:
            await self._services.readers.wait_none()
            async with self._services.evictor.room(missing, background_for=self._entry.number) as room:
                self._deliveries.check_storable(room, missing)
            await self._transfers.stream_whole()
        return missing

    async def _wait_for_others(self) -> None:
        """Return when what is on its way by others has come, or will not come by them."""
        absent = self._ledger.absent(range(len(self._ledger.states)))
        if absent and await self._transfers.wait_for(absent, keeps=False):
            raise errors.CacheError(f"image {self._entry.image_id}: it could not be kept")
