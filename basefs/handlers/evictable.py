"""What the evictor finds in the downloading handler (`cache.eviction_order.CacheContents`)."""

from collections.abc import Callable, Iterable

from basefs.cache.eviction_order import EvictableImage
from basefs.cache.space import CacheSpace
from basefs.catalog.records import ImageEntry
from basefs.core.inodes import image_inode
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.uses import ImageUses


class HandlerContents:
    """`entries` gives every image of the catalog."""

    def __init__(
        self,
        handler: DownloadingTemplateImageHandler,
        entries: Callable[[], Iterable[ImageEntry]],
        uses: ImageUses,
        space: CacheSpace,
    ) -> None:
        self._handler = handler
        self._entries = entries
        self._uses = uses
        self._space = space

    def prepared(self) -> list[EvictableImage]:
        """See `CacheContents`."""
        return [fetcher.eviction for fetcher in self._handler.fetchers()]

    def entries(self) -> Iterable[ImageEntry]:
        """See `CacheContents`."""
        return self._entries()

    def allocated(self, entry: ImageEntry) -> int:
        """See `CacheContents`."""
        return self._space.allocated(image_inode(entry.number))

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        """See `CacheContents`."""
        return self._uses.why_in_use(entry)

    async def learn_uses(self) -> None:
        """See `CacheContents`."""
        await self._uses.overlays.refresh()

    async def prepare(self, entry: ImageEntry) -> EvictableImage:
        """See `CacheContents`."""
        return (await self._handler.downloaded_image(entry)).fetcher.eviction

    async def drop(self, entry: ImageEntry) -> int:
        """See `CacheContents`."""
        return await self._handler.remove_image(entry)
