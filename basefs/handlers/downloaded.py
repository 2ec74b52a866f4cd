"""Images prepared over their chunk files, as many as are in use and some more.

Invariants: at most one fetcher an image, and so one chunk file; a chunk file loses its name only while nobody has it
open or opens it (`alone`). An image whose chunk file cannot be opened is used without, and gets it later.
Owned by the trio loop.
"""

import logging
import os
from collections.abc import AsyncIterator, Container, Mapping
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
from basefs.cache.reader_table import ReaderTable, Share
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.core.chunk_map import ChunkMapHeader
from basefs.core.inodes import image_inode, image_number_of
from basefs.handlers.viewed import ViewedImage
from basefs.views.choice import Views
from basefs.views.qcow2 import Qcow2View
from basefs.views.qcow2_sharing import SharedClusters
from basefs.views.stored import StoredView

log = logging.getLogger(__name__)


class DownloadedImage(ViewedImage):
    """A prepared image: its view over its fetcher."""

    def __init__(self, fetcher: ImageFetcher, view: StoredView | Qcow2View) -> None:
        super().__init__(view)
        self.fetcher = fetcher
        self._clusters = None if isinstance(view, StoredView) else SharedClusters(view, fetcher)

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:
        """See `PreparedImage.share`."""
        if self._clusters is None:
            return self.fetcher.share(table)
        return self._clusters.share(table, offset, size)


class DownloadedImages:
    """Those of this server, by image number, in order of last use; their chunk files are in `chunks_dir`."""

    def __init__(self, chunks_dir: Path, chunk_bytes: int, services: FetchServices, views: Views) -> None:
        self._chunks_dir = chunks_dir
        self._chunk_bytes = chunk_bytes
        self._services = services
        self._views = views
        self._images: dict[int, DownloadedImage] = {}
        self._opening: SingleFlight[int, None] = SingleFlight(services.nursery)
        self._alone: dict[int, trio.Event] = {}
        self._is_mending = False

    async def make_directory(self) -> None:
        """Make the chunk directory.

        Raises:
            CacheError: it cannot be made.
        """
        try:
            await self._services.disk.run(_make_directory, self._chunks_dir)
        except OSError as exc:
            raise errors.CacheError(f"cache directory {self._chunks_dir}: {exc}") from exc

    async def tidy_up(self, known: Mapping[int, ImageEntry]) -> None:
        """Remove chunk files of images that are not known, for which nobody asks again; note which images have none."""
        removed, stored = await self._services.disk.run(_remove_unknown, self._chunks_dir, set(known))
        if removed:
            log.info("removed the chunk files of %d unknown images", removed)
        for number, entry in known.items():
            if number not in stored and number not in self._images and entry.local.cached_bytes:
                self._is_not_here(entry)

    async def stored_numbers(self) -> set[int]:
        """The numbers of the images that have a chunk file."""
        return await self._services.disk.run(_stored_numbers, self._chunks_dir)

    async def cells(self, entry: ImageEntry, cells_max: int) -> ImageCells:
        """Where the stored bytes of the image are, in at most `cells_max` cells; CacheError if the disk fails."""
        image = self._images.get(entry.number)
        if image is not None:
            return await image.fetcher.cells(cells_max)
        inode, wanted = image_inode(entry.number), self._wanted(entry)
        return await self._services.disk.run(lambda: stored_cells(self._chunks_dir, inode, wanted, cells_max=cells_max))

    def fetchers(self) -> list[ImageFetcher]:
        """Those of the prepared images."""
        return [image.fetcher for image in self._images.values()]

    def get(self, number: int) -> DownloadedImage | None:
        """The image, if it is prepared."""
        return self._images.get(number)

    def used(self, number: int) -> None:
        """The image, which is prepared, was used last of all."""
        self._images[number] = self._images.pop(number)

    # --- preparing --------------------------------------------------------------------------------------

    async def prepare(self, entry: ImageEntry) -> DownloadedImage:
        """The image over its chunk file. A cache disk that fails is no error: the bytes then go round it.

        No await lies between finding it prepared and the return.
        """
        while (image := await self.prepare_once(entry)) is None:
            pass
        return image

    async def prepare_once(self, entry: ImageEntry) -> DownloadedImage | None:
        """The image; None when it was prepared, or let alone, just now: look again.

        For it may be removed or closed between the flight's end and the caller's turn.
        """
        if (alone := self._alone.get(entry.number)) is not None:
            await alone.wait()
            return None
        image = self._images.get(entry.number)
        if image is None:
            await self._opening.run(entry.number, lambda: self._open(entry))
        return image

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
        if self._services.reader_table is not None:
            self._services.reader_table.revoke_inherited(entry.number)
        file, states = await disk.run(open_chunk_file, self._chunks_dir, inode, self._wanted(entry))
        await disk.run(space.settle, inode, 0, file.allocated_bytes)
        return file, states

    async def _mend(self) -> None:
        """Open the chunk files that could not be opened, in the images' use. Ends when every image has its own."""
        while any(not image.fetcher.has_file for image in self._images.values()):
            await trio.sleep(DISK_RETRY_S)
            for number, image in list(self._images.items()):
                is_here = self._images.get(number) is image and number not in self._alone
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

    # --- closing and removing ---------------------------------------------------------------------------

    def take(self, number: int) -> DownloadedImage | None:
        """The image, which the caller closes; from here it is not prepared. Not while somebody opens it (`alone`)."""
        return self._images.pop(number, None)

    async def close_idle(self, opened: Container[int], keep: int) -> None:
        """Close images that are not `opened` and have nothing under way, but for the `keep` that were used last."""
        idle = [n for n, image in self._images.items() if n not in opened and not image.fetcher.is_busy]
        for number in idle[: max(0, len(idle) - keep)]:
            await self._images.pop(number).fetcher.close()

    async def close(self) -> None:
        """Close all of them. Transfers are stopped; readers were answered before."""
        while self._images:
            _, image = self._images.popitem()
            await image.fetcher.close()

    @asynccontextmanager
    async def alone(self, entry: ImageEntry) -> AsyncIterator[None]:
        """Nobody opens or removes the image's chunk file while the body runs; who wants it waits and begins anew."""
        while (other := self._alone.get(entry.number)) is not None:
            await other.wait()
        done = self._alone[entry.number] = trio.Event()
        try:
            # An opening under way ends first: it would be left with files that have no name.
            await self._opening.run(entry.number, trio.lowlevel.checkpoint)
            yield
        finally:
            del self._alone[entry.number]
            done.set()

    async def drop_files(self, entry: ImageEntry) -> None:
        """Remove the chunk file, which nobody has open; the caller is `alone`.

        Raises:
            CacheError: the disk does not let it go.
        """
        inode = image_inode(entry.number)
        # Before the files go: a server that is killed between them would leave the next one with a verified image.
        self._is_not_here(entry)
        if self._services.reader_table is not None:
            # A reader that has an earlier server's file open would keep its place on the disk.
            self._services.reader_table.revoke_inherited(entry.number)
        try:
            await self._services.disk.run(remove_files, self._chunks_dir, inode)
        except OSError as exc:
            raise errors.CacheError(f"image {entry.image_id}: {exc}") from exc
        await self._services.disk.run(self._services.space.forget, inode)
        self._services.unstored.forget(entry.number)

    def _is_not_here(self, entry: ImageEntry) -> None:
        entry.local.cached_bytes = 0
        if entry.local.whole in WHOLE and not entry.local.is_graduated:
            entry.local.whole = "unknown"  # what is fetched in its place was not hashed
        self._services.changed(entry)


def _make_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_unknown(directory: Path, known_numbers: set[int]) -> tuple[int, set[int]]:
    """How many went, and the numbers of the known images that have files. OSError: the directory cannot be read."""
    names = [name.partition(".") for name in os.listdir(directory)]
    inodes = {int(stem) for stem, _, suffix in names if suffix in ("map", "data") and stem.isdecimal()}
    unknown = [inode for inode in inodes if image_number_of(inode) not in known_numbers]
    for inode in unknown:
        remove_files(directory, inode)
    return len(unknown), {number for inode in inodes if (number := image_number_of(inode)) in known_numbers}


def _stored_numbers(directory: Path) -> set[int]:
    try:
        names = [path.stem for path in directory.glob("*.map")]
    except OSError:
        return set()
    numbers = (image_number_of(int(name)) for name in names if name.isdecimal())
    return {number for number in numbers if number is not None}
