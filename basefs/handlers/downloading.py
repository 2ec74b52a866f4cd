"""The downloading handler: chunks over the Glance API into a local cache, when they are read.

Invariant: an image is closed only when nobody has it open and nothing is under way. Images nobody has open stay
prepared, the least recently used beyond IDLE_IMAGES_MAX are closed.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchServices
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.image_map import ImageCells
from basefs.cache.reader_table import ReaderTable
from basefs.cache.warmer import Warmer
from basefs.catalog.records import ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.handlers.base import PreparedImage, TemplateImageHandler
from basefs.handlers.downloaded import DownloadedImage, DownloadedImages
from basefs.handlers.graduated import GraduatedImages
from basefs.views.choice import Views

log = logging.getLogger(__name__)

IDLE_IMAGES_MAX = 64


class DownloadingTemplateImageHandler(TemplateImageHandler):
    """Prepares images out of `chunks_dir`, shown through `views`."""

    name = "downloading"

    def __init__(
        self,
        chunks_dir: Path,
        chunk_bytes: int,
        services: FetchServices,
        views: Views,
        *,
        graduated: GraduatedImages | None = None,
    ) -> None:
        """`graduated`: the images that are served from their own file; None where there are none."""
        self._images = DownloadedImages(chunks_dir, chunk_bytes, services, views)
        self._graduated = graduated
        self._services = services
        self._opens: Counter[int] = Counter()
        self._removals: SingleFlight[int, int] = SingleFlight(services.nursery)
        self.warmer = Warmer(services, self.checked_image)
        self._held_back: set[int] = set()  # images whose replay waits until it is known that they are not linked
        self.expects_volume: Callable[[ImageEntry], bool] = lambda _entry: False
        """Whether an image that is opened will soon be read from elsewhere; the links', once there are some."""
        self.uses_changed: Callable[[], None] = lambda: None
        """Called when an image is opened, closed, or wanted; the hydrator's, once there is one."""

    @property
    def reader_table(self) -> ReaderTable | None:
        """Where readers look what they may serve; None where there are none."""
        return self._services.reader_table

    async def init(self) -> None:
        """Make the chunk directory.

        Raises:
            CacheError: it cannot be made.
        """
        await self._images.make_directory()

    async def tidy_up(self, known: Mapping[int, ImageEntry]) -> None:
        """See `DownloadedImages.tidy_up`."""
        await self._images.tidy_up(known)

    async def fetch_image(self, entry: ImageEntry) -> PreparedImage:
        """See the base class. An image that became a file of the lower directory is read from there."""
        while True:
            if self._graduated is not None and (graduated := await self._graduated.find(entry)) is not None:
                return graduated
            image = await self._images.prepare_once(entry)
            if image is not None:
                if entry.local.is_replaying and self.open_handles(entry):
                    image.fetcher.trace.replay()  # a server before this one did, until it ended
                return image

    async def downloaded_image(self, entry: ImageEntry) -> DownloadedImage:
        """The image over its chunk file, whatever it is served from; see `DownloadedImages.prepare`."""
        return await self._images.prepare(entry)

    @asynccontextmanager
    async def checked_image(self, entry: ImageEntry) -> AsyncIterator[ImageFetcher]:
        """The image's fetcher for work on what is here; an image that nobody uses is closed again."""
        was_prepared = self._images.get(entry.number) is not None
        image = await self.downloaded_image(entry)
        try:
            yield image.fetcher
        finally:
            idle = not self.open_handles(entry) and not image.fetcher.is_busy
            if not was_prepared and idle and self._images.get(entry.number) is image:
                self._images.take(entry.number)
                with trio.CancelScope(shield=True):
                    await image.fetcher.close()

    async def kept_start(self, entry: ImageEntry, length: int) -> bytes | None:
        """The image's first `length` bytes, if it is prepared and all of them are in the cache."""
        image = self._images.get(entry.number)
        return None if image is None else await image.fetcher.kept_start(length)

    async def cells(self, entry: ImageEntry, cells_max: int) -> ImageCells:
        """Where the stored bytes of the image are, in at most `cells_max` cells; CacheError if the disk fails."""
        return await self._images.cells(entry, cells_max)

    def readers_wait(self) -> bool:
        """Whether reads wait for the cache disk, or for a request slot."""
        return self._services.disk.busy > 0 or self._services.slots.waiting_demand > 0

    async def stored_numbers(self) -> set[int]:
        """The numbers of the images that have a chunk file."""
        return await self._images.stored_numbers()

    def fetchers(self) -> list[ImageFetcher]:
        """Those of the prepared images."""
        return self._images.fetchers()

    def opened(self, entry: ImageEntry, image: PreparedImage) -> None:
        """See the base class. `image` is the last `fetch_image` gave for this entry, with no await since."""
        if isinstance(image, DownloadedImage):
            assert self._images.get(entry.number) is image, "an image was opened that is not the prepared one"
            self._images.used(entry.number)
            if not self._opens[entry.number]:
                image.fetcher.trace.opened()
                if self.expects_volume(entry):
                    self._held_back.add(entry.number)
                else:
                    image.fetcher.trace.replay()
        self._note_use(entry)
        self._opens[entry.number] += 1

    async def released(self, entry: ImageEntry) -> None:
        """See the base class. Closes the images that were not used for longest."""
        self._opens[entry.number] -= 1
        if self._opens[entry.number] <= 0:
            del self._opens[entry.number]
            self._held_back.discard(entry.number)
            if (image := self._images.get(entry.number)) is not None:
                image.fetcher.trace.closed()
        self._note_use(entry)
        await self._close_idle()

    def note_link(self, entry: ImageEntry, *, is_linked: bool) -> None:
        """Who has the image open reads it from its volume from here, and nothing is fetched ahead of them; or not."""
        image = self._images.get(entry.number)
        was_held_back = entry.number in self._held_back
        self._held_back.discard(entry.number)
        if image is None:
            return
        if is_linked:
            image.fetcher.trace.end_replay()
        elif was_held_back:
            image.fetcher.trace.replay()

    def restore_opens(self, handles: Mapping[int, int]) -> None:
        """See the base class."""
        self._opens = Counter(handles)

    def _note_use(self, entry: ImageEntry) -> None:
        entry.local.last_used_ns = time.time_ns()
        self._services.changed(entry)
        self.uses_changed()

    def open_handles(self, entry: ImageEntry) -> int:
        """See the base class."""
        return self._opens.get(entry.number, 0)

    async def _close_idle(self) -> None:
        await self._images.close_idle(self._opens, IDLE_IMAGES_MAX)
        if self._graduated is not None:
            await self._graduated.close_but(self._opens)

    async def remove_image(self, entry: ImageEntry) -> int:
        """See the base class. A warming is stopped; who wants the image meanwhile waits and begins anew.

        Cancellation: ends this wait only; half a removal would leave files that nobody drops.
        """
        return await self._removals.run(entry.number, lambda: self._remove(entry))

    async def _remove(self, entry: ImageEntry) -> int:
        """Runs as a flight: one at a time for an image, and to its end."""
        if self.open_handles(entry):
            return 0
        self.warmer.cancel(entry)
        async with self._images.alone(entry):
            if self.open_handles(entry):
                return 0
            image = self._images.take(entry.number)
            dropped = entry.local.cached_bytes if image is None else image.fetcher.cached_bytes
            if image is not None:
                await image.fetcher.close()
            await self._images.drop_files(entry)
        return dropped

    async def is_lazy_again(self, entry: ImageEntry) -> bool:
        """See the base class. Who has the image open goes on reading the file that has no name any more."""
        if self._graduated is None or not entry.local.is_graduated or await self._graduated.has_name(entry):
            return False
        self._graduated.gone(entry)
        return True

    async def drop_left_over(self, entry: ImageEntry) -> None:
        """Remove the chunk file of an image that is a lower file, unless somebody reads it from there."""
        async with self._images.alone(entry):
            is_served = self._graduated is not None and self._graduated.get(entry.number) is not None
            if self._images.get(entry.number) is None and (is_served or not self.open_handles(entry)):
                await self._images.drop_files(entry)

    async def hand_over(self, entry: ImageEntry, fd: int, publish: Callable[[], Awaitable[None]]) -> None:
        """Serve the image from a duplicate of `fd`, where all its bytes are, then `publish`, then drop the chunk file.

        When `publish` runs nobody can write to the chunk file any more, and who has the image open reads from `fd`.

        Raises:
            CacheError: a chunk was lost since all were here.
            BasefsError: what `publish` raised; the image is served from its chunk file as before.
        """
        assert self._graduated is not None, "there is nothing to hand over to"
        async with self._images.alone(entry):
            image = self._images.get(entry.number)
            if image is None:
                raise errors.CacheError(f"image {entry.image_id}: it was removed meanwhile")
            with image.fetcher.kept_whole():
                await self._graduated.serve(entry, os.dup(fd))
                self._images.take(entry.number)
                await image.fetcher.close()
            try:
                image.fetcher.check_whole()
                await publish()
            except BaseException:
                await self._graduated.close(entry.number)
                raise
            try:
                await self._images.drop_files(entry)
            except errors.CacheError as exc:
                log.warning("image %s: its local bytes were not removed: %s", entry.image_id, exc)
        if not self.open_handles(entry):
            await self._graduated.close(entry.number)

    async def lift_quarantine(self, entry: ImageEntry) -> None:
        """Drop what is here of a quarantined image, open or not, and begin anew with it."""
        await (await self.downloaded_image(entry)).fetcher.whole.lift()
        self.uses_changed()

    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        """See the base class."""
        image = await self.downloaded_image(entry)
        await image.fetcher.store_header(header)
        self.uses_changed()  # it may be in use for long, and can be brought only now that it was checked

    def warm(self, entry: ImageEntry) -> None:
        """See the base class."""
        entry.local.is_wanted = True
        self._services.changed(entry)
        self.uses_changed()

    def is_warming(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self.warmer.is_warming(entry)

    def is_hydrating(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self.warmer.is_hydrating(entry)

    async def close(self) -> None:
        """See the base class. Transfers are stopped; readers were answered before."""
        await self.warmer.stop()
        await self._images.close()
        if self._graduated is not None:
            await self._graduated.clear()
