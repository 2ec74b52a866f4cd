"""The volume-linking handler: an image is read from the Cinder volume behind it, as long as that is attached.

Invariant: what this handler gives has the bytes and the size that the downloading one gives, for which it steps aside
whenever there is no volume. So readers move over by themselves, in both directions, when they next miss.
"""

from collections.abc import Mapping

from basefs.catalog.records import ImageEntry
from basefs.handlers.base import LinkReport, PreparedImage, TemplateImageHandler
from basefs.handlers.linked import ReopeningImage
from basefs.handlers.links import Links


class VolumeLinkingTemplateImageHandler(TemplateImageHandler):
    """Prepares images over `links`, and over `downloading` what is not linked."""

    name = "volume-linking"

    def __init__(self, downloading: TemplateImageHandler, links: Links) -> None:
        self._downloading = downloading
        self.links = links

    async def init(self) -> None:
        """See the base class. What was linked is gone on with by `Links.restore`, before anybody reads."""
        await self._downloading.init()

    async def fetch_image(self, entry: ImageEntry) -> PreparedImage:
        """See the base class."""
        image = self.links.image(entry)
        if image is not None:
            return image
        if self.links.is_reopening(entry):
            return ReopeningImage(entry, lambda: self.links.wait_reopened(entry), self.fetch_image)
        return await self._downloading.fetch_image(entry)

    def opened(self, entry: ImageEntry, image: PreparedImage) -> None:
        """See the base class. The image begins to be linked, if it is not."""
        self._downloading.opened(entry, image)
        self.links.want(entry)  # now that it is in use, which with detach_idle_s = 0 is all that keeps it

    async def released(self, entry: ImageEntry) -> None:
        """See the base class."""
        await self._downloading.released(entry)
        self.links.released(entry)

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
        """See the base class. Its volume is detached in the background, unless an overlay names the image."""
        self.links.removed(entry)
        return await self._downloading.remove_image(entry)

    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        """See the base class."""
        await self._downloading.keep_header(entry, header)

    def warm(self, entry: ImageEntry) -> None:
        """See the base class. A linked image is not brought, and stays linked until it is removed."""
        self._downloading.warm(entry)
        self.links.want(entry)

    def is_warming(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self._downloading.is_warming(entry)

    def is_hydrating(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self._downloading.is_hydrating(entry)

    def link(self, entry: ImageEntry) -> LinkReport:
        """See the base class."""
        return self.links.report(entry)

    def is_placed(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self._downloading.is_placed(entry)

    async def close(self) -> None:
        """See the base class. What is linked is left to the next server, or was detached by `Links.close`."""
        await self._downloading.close()
