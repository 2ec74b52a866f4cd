"""The downloading handler: chunks over the Glance API into a local cache, when they are read.

Invariants: at most one fetcher an image, and so one chunk file; a fetcher is closed only when nobody has the
image open and nothing is under way. Images nobody has open stay prepared, the least recently used beyond
IDLE_IMAGES_MAX are closed. An image whose chunk file cannot be opened is used without, and gets it later.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, open_chunk_file, remove_files
from basefs.cache.disk_health import DISK_RETRY_S
from basefs.cache.fetch_services import FetchServices
from basefs.cache.image_fetcher import ImageFetcher
from basefs.cache.image_map import ImageCells, stored_cells
from basefs.cache.warmer import Warmer
from basefs.catalog.records import ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.core.chunk_map import ChunkMapHeader
from basefs.core.inodes import image_inode, image_number_of
from basefs.handlers.base import Patience, PreparedImage, TemplateImageHandler
from basefs.handlers.graduated import GraduatedImage, GraduatedImages
from basefs.views.choice import Views
from basefs.views.qcow2 import Qcow2View
from basefs.views.stored import StoredView

log = logging.getLogger(__name__)

IDLE_IMAGES_MAX = 64


class DownloadedImage:
    """A prepared image: its view over its fetcher."""

    def __init__(self, fetcher: ImageFetcher, view: StoredView | Qcow2View) -> None:
        self.fetcher = fetcher
        self._view = view
        self.hit: Callable[[int, int], memoryview | bytes | None] = view.hit

    @property
    def size(self) -> int:
        """See `PreparedImage.size`."""
        return self._view.size

    async def read(self, offset: int, size: int, patience: Patience) -> bytes | memoryview:
        """See `PreparedImage.read`."""
        return await self._view.read(offset, size, deadline_s=patience.deadline_s, patient=patience.is_guest)


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
        self._chunks_dir = chunks_dir
        self._graduated = graduated
        self._chunk_bytes = chunk_bytes
        self._services = services
        self._views = views
        self._images: dict[int, DownloadedImage] = {}  # in order of last use
        self._opens: Counter[int] = Counter()
        self._opening: SingleFlight[int, None] = SingleFlight(services.nursery)
        self._removals: SingleFlight[int, int] = SingleFlight(services.nursery)
        self._removing: dict[int, trio.Event] = {}
        self._is_mending = False
        self.warmer = Warmer(services, self.checked_image)
        self.uses_changed: Callable[[], None] = lambda: None
        """Called when an image is opened, closed, or wanted; the hydrator's, once there is one."""

    async def init(self) -> None:
        """Make the chunk directory.

        Raises:
            CacheError: it cannot be made.
        """
        try:
            await self._services.disk.run(_make_directory, self._chunks_dir)
        except OSError as exc:
            raise errors.CacheError(f"cache directory {self._chunks_dir}: {exc}") from exc

    async def remove_unknown(self, known_numbers: set[int]) -> None:
        """Remove chunk files of images that the catalog does not know; nobody will ask for them again."""
        removed = await self._services.disk.run(_remove_unknown, self._chunks_dir, known_numbers)
        if removed:
            log.info("removed the chunk files of %d unknown images", removed)

    async def fetch_image(self, entry: ImageEntry) -> PreparedImage:
        """See the base class. An image that became a file of the lower directory is read from there."""
        while True:
            if self._graduated is not None and (graduated := await self._graduated.find(entry)) is not None:
                return graduated
            if entry.number not in self._removing:
                image = self._images.get(entry.number)
                if image is not None:
                    return image
                await self._opening.run(entry.number, lambda: self._open(entry))
            else:
                await self._removing[entry.number].wait()

    async def downloaded_image(self, entry: ImageEntry) -> DownloadedImage:
        """The image over its chunk file, whatever it is served from.

        A cache disk that fails is no error: the bytes then go round it.
        """
        while True:
            while (removed := self._removing.get(entry.number)) is not None:
                await removed.wait()
            image = self._images.get(entry.number)
            if image is not None:
                return image
            # Looked up again, for the image may be removed or closed between the flight's end and our turn.
            await self._opening.run(entry.number, lambda: self._open(entry))

    @asynccontextmanager
    async def checked_image(self, entry: ImageEntry) -> AsyncIterator[ImageFetcher]:
        """The image's fetcher for work on what is here; an image that nobody uses is closed again."""
        was_prepared = entry.number in self._images
        image = await self.downloaded_image(entry)
        try:
            yield image.fetcher
        finally:
            idle = not self.open_handles(entry) and not image.fetcher.is_busy
            if not was_prepared and idle and self._images.get(entry.number) is image:
                del self._images[entry.number]
                with trio.CancelScope(shield=True):
                    await image.fetcher.close()

    async def cells(self, entry: ImageEntry, cells_max: int) -> ImageCells:
        """Where the stored bytes of the image are, in at most `cells_max` cells; CacheError if the disk fails."""
        image = self._images.get(entry.number)
        if image is not None:
            return await image.fetcher.cells(cells_max)
        inode, wanted = image_inode(entry.number), self._wanted(entry)
        return await self._services.disk.run(lambda: stored_cells(self._chunks_dir, inode, wanted, cells_max=cells_max))

    def readers_wait(self) -> bool:
        """Whether reads wait for the cache disk, or for a request slot."""
        return self._services.disk.busy > 0 or self._services.slots.waiting_demand > 0

    async def stored_numbers(self) -> set[int]:
        """The numbers of the images that have a chunk file."""
        return await self._services.disk.run(_stored_numbers, self._chunks_dir)

    def fetchers(self) -> list[ImageFetcher]:
        """Those of the prepared images."""
        return [image.fetcher for image in self._images.values()]

    async def _open(self, entry: ImageEntry) -> None:
        """Runs as a flight: one at a time for an image."""
        file: ChunkFile | None = None
        try:
            file, states = await self._open_file(entry)
        except errors.CacheError as exc:
            log.warning("image %s: serving it round the cache: %s", entry.image_id, exc)
            states = bytearray(self._wanted(entry).chunks)
        chunk_bytes = self._chunk_bytes if file is None else file.header.chunk_bytes
        fetcher = ImageFetcher(entry, file, states, chunk_bytes, self._services)
        self._images[entry.number] = DownloadedImage(fetcher, self._views.of(entry, fetcher))
        if file is None and not self._is_mending:
            self._is_mending = True
            self._services.nursery.start_soon(self._mend)

    def _wanted(self, entry: ImageEntry) -> ChunkMapHeader:
        return ChunkMapHeader(image_id=entry.image_id, size=entry.size, chunk_bytes=self._chunk_bytes)

    async def _open_file(self, entry: ImageEntry) -> tuple[ChunkFile, bytearray]:
        inode = image_inode(entry.number)
        disk, space = self._services.disk, self._services.space
        file, states = await disk.run(open_chunk_file, self._chunks_dir, inode, self._wanted(entry))
        await disk.run(space.settle, inode, 0, file.allocated_bytes)
        return file, states

    async def _mend(self) -> None:
        """Open the chunk files that could not be opened, in the images' use. Ends when every image has its own."""
        while any(not image.fetcher.has_file for image in self._images.values()):
            await trio.sleep(DISK_RETRY_S)
            for number, image in list(self._images.items()):
                is_here = self._images.get(number) is image and number not in self._removing
                if is_here and not image.fetcher.has_file:
                    with suppress(errors.BasefsError):  # a bug, which was logged; the next round tries again
                        await self._opening.run(number, partial(self._reopen, image))
        self._is_mending = False

    async def _reopen(self, image: DownloadedImage) -> None:
        """Runs as a flight, as `_open`; nothing changes where the disk still fails."""
        fetcher = image.fetcher
        try:
            file, states = await self._open_file(fetcher.entry)
        except errors.CacheError as exc:
            log.debug("image %s: still round the cache: %s", fetcher.entry.image_id, exc)
            return
        # Chunks of another size wait until the image is opened anew.
        if self._images.get(fetcher.entry.number) is image and file.header.chunk_bytes == fetcher.chunk_bytes:
            fetcher.adopt(file, states)
            log.info("image %s: it has its place in the cache again", fetcher.entry.image_id)
        else:
            file.close()

    def opened(self, entry: ImageEntry, image: PreparedImage) -> None:
        """See the base class. `image` is the last `fetch_image` gave for this entry, with no await since."""
        if not isinstance(image, GraduatedImage):
            ours = self._images.pop(entry.number)
            assert ours is image, "an image was opened that is not the prepared one"
            self._images[entry.number] = ours
            if not self._opens[entry.number]:
                ours.fetcher.trace.opened()
        self._note_use(entry)
        self._opens[entry.number] += 1

    async def released(self, entry: ImageEntry) -> None:
        """See the base class. Closes the images that were not used for longest."""
        self._opens[entry.number] -= 1
        if self._opens[entry.number] <= 0:
            del self._opens[entry.number]
            if (image := self._images.get(entry.number)) is not None:
                image.fetcher.trace.closed()
        self._note_use(entry)
        await self._close_idle()

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
        idle = [n for n, image in self._images.items() if n not in self._opens and not image.fetcher.is_busy]
        for number in idle[: max(0, len(idle) - IDLE_IMAGES_MAX)]:
            await self._images.pop(number).fetcher.close()
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
        async with self._alone(entry):
            if self.open_handles(entry):
                return 0
            image = self._images.pop(entry.number, None)
            dropped = entry.local.cached_bytes if image is None else image.fetcher.cached_bytes
            if image is not None:
                await image.fetcher.close()
            await self._drop_files(entry)
        return dropped

    @asynccontextmanager
    async def _alone(self, entry: ImageEntry) -> AsyncIterator[None]:
        """Nobody opens or removes the image's chunk file while the body runs; who wants it waits and begins anew."""
        while (other := self._removing.get(entry.number)) is not None:
            await other.wait()
        done = self._removing[entry.number] = trio.Event()
        try:
            # An opening under way ends first: it would be left with files that have no name.
            await self._opening.run(entry.number, trio.lowlevel.checkpoint)
            yield
        finally:
            del self._removing[entry.number]
            done.set()

    async def _drop_files(self, entry: ImageEntry) -> None:
        """Remove the chunk file, which nobody has open."""
        inode = image_inode(entry.number)
        try:
            await self._services.disk.run(remove_files, self._chunks_dir, inode)
        except OSError as exc:
            raise errors.CacheError(f"image {entry.image_id}: {exc}") from exc
        await self._services.disk.run(self._services.space.forget, inode)
        self._services.unstored.forget(entry.number)
        entry.local.cached_bytes = 0
        if entry.local.whole in ("verified", "no_hash"):
            entry.local.whole = "unknown"
        self._services.changed(entry)

    async def is_lazy_again(self, entry: ImageEntry) -> bool:
        """See the base class. Who has the image open goes on reading the file that has no name any more."""
        if self._graduated is None or not entry.local.is_graduated or await self._graduated.has_name(entry):
            return False
        self._graduated.gone(entry)
        return True

    async def drop_left_over(self, entry: ImageEntry) -> None:
        """Remove the chunk file of an image that is a lower file, unless somebody reads it from there."""
        async with self._alone(entry):
            is_served = self._graduated is not None and self._graduated.get(entry.number) is not None
            if entry.number not in self._images and (is_served or not self.open_handles(entry)):
                await self._drop_files(entry)

    async def hand_over(self, entry: ImageEntry, fd: int, publish: Callable[[], Awaitable[None]]) -> None:
        """Serve the image from a duplicate of `fd`, where all its bytes are, then `publish`, then drop the chunk file.

        When `publish` runs nobody can write to the chunk file any more, and who has the image open reads from `fd`.

        Raises:
            CacheError: a chunk was lost since all were here.
            BasefsError: what `publish` raised; the image is served from its chunk file as before.
        """
        assert self._graduated is not None, "there is nothing to hand over to"
        async with self._alone(entry):
            image = self._images.get(entry.number)
            if image is None:
                raise errors.CacheError(f"image {entry.image_id}: it was removed meanwhile")
            with image.fetcher.kept_whole():
                await self._graduated.serve(entry, os.dup(fd))
                del self._images[entry.number]
                await image.fetcher.close()
            try:
                image.fetcher.check_whole()
                await publish()
            except BaseException:
                await self._graduated.close(entry.number)
                raise
            try:
                await self._drop_files(entry)
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
        while self._images:
            _, image = self._images.popitem()
            await image.fetcher.close()
        if self._graduated is not None:
            await self._graduated.clear()


def _make_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_unknown(directory: Path, known_numbers: set[int]) -> int:
    inodes = {int(path.stem) for path in directory.glob("*.map") if path.stem.isdecimal()}
    inodes |= {int(path.stem) for path in directory.glob("*.data") if path.stem.isdecimal()}
    unknown = [inode for inode in inodes if image_number_of(inode) not in known_numbers]
    for inode in unknown:
        remove_files(directory, inode)
    return len(unknown)


def _stored_numbers(directory: Path) -> set[int]:
    try:
        names = [path.stem for path in directory.glob("*.map")]
    except OSError:
        return set()
    numbers = (image_number_of(int(name)) for name in names if name.isdecimal())
    return {number for number in numbers if number is not None}
