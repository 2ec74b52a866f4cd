"""The file-placing handler: an image is read from Glance's own file, as long as that is on this host.

Invariant: what this handler gives has the bytes and the size that the downloading one gives, for which it steps aside
whenever there is no file. So readers move over by themselves, in both directions, when they next miss.
"""

from collections.abc import Mapping

from basefs.catalog.records import ImageEntry
from basefs.handlers.base import PreparedImage, TemplateImageHandler
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.placed import PlacedImages


class FilePlacingTemplateImageHandler(TemplateImageHandler):
    """Prepares images over `placed`, and over `downloading` what is not read in place."""

    name = "downloading"

    def __init__(self, downloading: DownloadingTemplateImageHandler, placed: PlacedImages) -> None:
        self._downloading = downloading
        self.placed = placed

    async def init(self) -> None:
        """See the base class."""
        await self._downloading.init()

    async def fetch_image(self, entry: ImageEntry) -> PreparedImage:
        """See the base class."""
        return self.placed.image(entry) or await self._downloading.fetch_image(entry)

    def opened(self, entry: ImageEntry, image: PreparedImage) -> None:
        """See the base class. Its file is looked for."""
        self._downloading.opened(entry, image)
        self.placed.want(entry)

    async def released(self, entry: ImageEntry) -> None:
        """See the base class."""
        await self._downloading.released(entry)
        self.placed.look(entry)

    def restore_opens(self, handles: Mapping[int, int]) -> None:
        """See the base class."""
        self._downloading.restore_opens(handles)

    def open_handles(self, entry: ImageEntry) -> int:
        """See the base class."""
        return self._downloading.open_handles(entry)

    async def is_lazy_again(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return await self._downloading.is_lazy_again(entry)

    async def remove_image(self, entry: ImageEntry) -> int:
        """See the base class."""
        dropped = await self._downloading.remove_image(entry)
        self.placed.look(entry)
        return dropped

    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        """See the base class."""
        await self._downloading.keep_header(entry, header)

    def warm(self, entry: ImageEntry) -> None:
        """See the base class."""
        self._downloading.warm(entry)

    def is_warming(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self._downloading.is_warming(entry)

    def is_hydrating(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self._downloading.is_hydrating(entry)

    def is_placed(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self.placed.image(entry) is not None

    async def close(self) -> None:
        """See the base class."""
        await self._downloading.close()
        await self.placed.close()
