"""The downloading handler: chunks over the Glance API into a local cache, when they are read.

Invariants: at most one fetcher an image, and so one chunk file; a fetcher is closed only when nobody has the
image open and nothing is under way. Images nobody has open stay prepared, the least recently used beyond
IDLE_IMAGES_MAX are closed. An image whose chunk file cannot be opened is used without, and gets it later.
"""

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
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
from basefs.views.stored import StoredView

log = logging.getLogger(__name__)

IDLE_IMAGES_MAX = 64


class DownloadedImage:
    """A prepared image: its view over its fetcher."""

    def __init__(self, fetcher: ImageFetcher) -> None:
        self.fetcher = fetcher
        self._view = StoredView(fetcher)
        self.size = self._view.size
        self.hit = self._view.hit

    async def read(self, offset: int, size: int, patience: Patience) -> bytes:
        """See `PreparedImage.read`."""
        return await self._view.read(offset, size, deadline_s=patience.deadline_s, patient=patience.is_guest)


class DownloadingTemplateImageHandler(TemplateImageHandler):
    """Prepares images out of `chunks_dir`."""

    name = "downloading"

    def __init__(self, chunks_dir: Path, chunk_bytes: int, services: FetchServices) -> None:
        self._chunks_dir = chunks_dir
        self._chunk_bytes = chunk_bytes
        self._services = services
        self._images: dict[int, DownloadedImage] = {}  # in order of last use
        self._opens: Counter[int] = Counter()
        self._opening: SingleFlight[int, None] = SingleFlight(services.nursery)
        self._removals: SingleFlight[int, int] = SingleFlight(services.nursery)
        self._removing: dict[int, trio.Event] = {}
        self._is_mending = False
        self.warmer = Warmer(services.nursery, self._fetcher_of)

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

    async def fetch_image(self, entry: ImageEntry) -> DownloadedImage:
        """See the base class. A cache disk that fails is no error: the bytes then go round it."""
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
        """The image's fetcher for a check of what is here; an image that nobody uses is closed again."""
        was_prepared = entry.number in self._images
        image = await self.fetch_image(entry)
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

    async def _fetcher_of(self, entry: ImageEntry) -> ImageFetcher:
        return (await self.fetch_image(entry)).fetcher

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
        self._images[entry.number] = DownloadedImage(fetcher)
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
        ours = self._images.pop(entry.number)
        assert ours is image, "an image was opened that is not the prepared one"
        self._note_use(entry)
        self._images[entry.number] = ours
        self._opens[entry.number] += 1

    async def released(self, entry: ImageEntry) -> None:
        """See the base class. Closes the images that were not used for longest."""
        self._opens[entry.number] -= 1
        if self._opens[entry.number] <= 0:
            del self._opens[entry.number]
        self._note_use(entry)
        await self._close_idle()

    def restore_opens(self, handles: Mapping[int, int]) -> None:
        """See the base class."""
        self._opens = Counter(handles)

    def _note_use(self, entry: ImageEntry) -> None:
        entry.local.last_used_ns = time.time_ns()
        self._services.changed(entry)

    def open_handles(self, entry: ImageEntry) -> int:
        """See the base class."""
        return self._opens.get(entry.number, 0)

    async def _close_idle(self) -> None:
        idle = [n for n, image in self._images.items() if n not in self._opens and not image.fetcher.is_busy]
        for number in idle[: max(0, len(idle) - IDLE_IMAGES_MAX)]:
            await self._images.pop(number).fetcher.close()

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
        removed = self._removing[entry.number] = trio.Event()
        try:
            # An opening under way ends first: it would be left with files that have no name.
            await self._opening.run(entry.number, trio.lowlevel.checkpoint)
            image = self._images.pop(entry.number, None)
            dropped = entry.local.cached_bytes if image is None else image.fetcher.cached_bytes
            if image is not None:
                await image.fetcher.close()
            inode = image_inode(entry.number)
            await self._services.disk.run(remove_files, self._chunks_dir, inode)
            await self._services.disk.run(self._services.space.forget, inode)
            self._services.unstored.forget(entry.number)
        except OSError as exc:
            raise errors.CacheError(f"image {entry.image_id}: {exc}") from exc
        finally:
            del self._removing[entry.number]
            removed.set()
        entry.local.cached_bytes = 0
        self._services.changed(entry)
        return dropped

    async def keep_header(self, entry: ImageEntry, header: bytes) -> None:
        """See the base class."""
        image = await self.fetch_image(entry)
        await image.fetcher.store_header(header)

    def warm(self, entry: ImageEntry) -> None:
        """See the base class."""
        self.warmer.keep(entry)

    def is_warming(self, entry: ImageEntry) -> bool:
        """See the base class."""
        return self.warmer.is_warming(entry)

    async def close(self) -> None:
        """See the base class. Transfers are stopped; readers were answered before."""
        while self._images:
            _, image = self._images.popitem()
            await image.fetcher.close()


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
