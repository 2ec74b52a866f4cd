"""A complete, verified image becomes a plain raw file of the lower directory: what nova's own download would have left.

From then on nova owns the file. Who has the image open goes on with the same bytes, read from that file; the cache has
its space back. Steps: the bytes are checked (each chunk by its checksum, as the disk has it); they become a file by
rename, by shared blocks, by copy or by `qemu-img convert`; `DownloadingTemplateImageHandler.hand_over` moves the
readers over; the file gets its name. Killed at any step: the cache still has the image, or the file has its name;
what was half-made is removed at the next start.
"""

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, data_path
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.concurrency.threads import BlockingCalls
from basefs.core.inodes import image_inode
from basefs.handlers import parts
from basefs.handlers.conversion import convert
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.parts import ShownFile

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WHOLE = ("verified", "no_hash")
"""What may become a file, see `WholeState`."""
STEP_BYTES = 4 << 20
"""Checked or copied in one call in a thread: 4 ms to 40 ms, after which it may be cancelled."""
LOOK_S = 0.5
"""How often the free space is looked at while qemu-img writes: nothing tells when a disk fills up, and a full one
would stop the guests whose overlays are on it."""


@dataclass(slots=True)
class GraduationCounters:
    """Since the server began."""

    images: int = 0
    failures: int = 0
    bytes: int = 0
    """Allocated in the files that were made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraduationSettings:
    """`is_on`: `[basefs] graduate`. `reserve_bytes` stay free on the lower file system."""

    is_on: bool
    chunks_dir: Path
    reserve_bytes: int
    host: str


class Graduator:
    """Makes images files of the lower directory; one at a time an image. Owned by the trio loop."""

    def __init__(
        self,
        handler: DownloadingTemplateImageHandler,
        graduated: GraduatedImages,
        settings: GraduationSettings,
        nursery: trio.Nursery,
        *,
        shown: Callable[[ImageEntry], ShownFile],
        stored: Callable[[ImageEntry], Awaitable[None]],
    ) -> None:
        """`shown(entry)` is what `stat` shows now; `stored(entry)` returns when what changed outlives this server."""
        self._handler = handler
        self._graduated = graduated
        self._settings = settings
        self._shown = shown
        self._stored = stored
        # Apart from the readers' threads: they must not wait behind a copy.
        self._blocking = BlockingCalls("graduation", threads_max=2)
        self._flights: SingleFlight[int, None] = SingleFlight(nursery)
        self._may_rename = True
        self._tidied = trio.Event()
        self.counters = GraduationCounters()

    @property
    def is_on(self) -> bool:
        """Whether images become files."""
        return self._settings.is_on

    async def is_lower(self, entry: ImageEntry) -> bool:
        """Whether the lower directory has a file of the image's name, whoever made it.

        Raises:
            LowerFileError: it does not say.
        """
        return await self._graduated.has_name(entry)

    async def graduate(self, entry: ImageEntry) -> None:
        """Make the image a file, if there is none of its name yet; does nothing where `[basefs] graduate = false`.

        Raises:
            BasefsError: why not now; everything is as before.
        Cancellation: ends this wait only.
        """
        if self.is_on:
            await self._flights.run(entry.number, lambda: self._graduate(entry))

    async def _graduate(self, entry: ImageEntry) -> None:
        """Runs as a flight: one at a time for an image."""
        await self._tidied.wait()
        begun = trio.current_time()
        try:
            allocated_bytes = None if await self.is_lower(entry) else await self._make(entry)
        except errors.BasefsError as exc:
            if not _is_second(exc):
                self.counters.failures += 1
                log.warning("image %s: it did not become a file of the lower directory: %s", entry.image_id, exc)
                raise
            allocated_bytes = None
        if allocated_bytes is None:
            # Another host that shares the directory came first, or nova itself.
            await self._handler.remove_image(entry)
            return
        self.counters.images += 1
        self.counters.bytes += allocated_bytes
        log.info(
            "image %s: it is a file of the lower directory now, nova's own: %d bytes, %d allocated, in %.1f s",
            entry.image_id, entry.shown_size, allocated_bytes, trio.current_time() - begun,
        )  # fmt: skip

    async def _make(self, entry: ImageEntry) -> int:
        """The allocated bytes of the file."""
        _check_verified(entry)
        if entry.local.shown_size is None and self._may_rename:
            allocated_bytes = await self._by_rename(entry)
            if allocated_bytes is not None:
                return allocated_bytes
            self._may_rename = False
        async with self._whole(entry) as fetcher, self._part(entry) as (fd, name):
            if entry.local.shown_size is None:
                await self._copy(fetcher, fd)
            else:
                await self._convert(fetcher, fd)
            allocated_bytes = await self._run(parts.finish, fd, self._shown(entry))
            publish = partial(self._run, parts.publish, self._graduated.lower_fd, name, entry.base_name)
            reading_fd = await self._run(parts.reopened, fd)
            try:
                await self._hand_over(entry, reading_fd, publish)
            finally:
                os.close(reading_fd)  # not the last one: the part's own is open
            return allocated_bytes

    # --- ways to a file -------------------------------------------------------------------------------------

    async def _by_rename(self, entry: ImageEntry) -> int | None:
        """The chunk file itself becomes the file, nothing is copied; None where it lies on another file system."""
        if not await self._run(parts.is_same_device, self._graduated.lower_fd, self._settings.chunks_dir):
            return None
        async with self._whole(entry) as fetcher:
            with fetcher.whole_file() as file:
                await self._check(fetcher, file)
                fd = await self._run(parts.reopened, file.data_fd)
            return await self._rename(entry, fd)

    async def _rename(self, entry: ImageEntry, fd: int) -> int | None:
        """As `_by_rename`; `fd` is on the chunk file and ours from here."""
        lower_fd, chunks_dir = self._graduated.lower_fd, self._settings.chunks_dir
        try:
            allocated_bytes = await self._run(parts.finish, fd, self._shown(entry))
            path = os.fspath(data_path(chunks_dir, image_inode(entry.number)))
            try:
                await self._hand_over(entry, fd, partial(self._run, parts.move, path, lower_fd, entry.base_name))
            except errors.BasefsError as exc:
                await self._run(parts.make_private, fd)
                if isinstance(exc, errors.LowerFileError) and exc.os_error.errno in parts.NOT_MOVED:
                    return None  # one file system, but two mounts, or one that knows no RENAME_NOREPLACE
                raise
            return allocated_bytes
        finally:
            with trio.CancelScope(shield=True):
                await self._run(os.close, fd)

    async def _copy(self, fetcher: ImageFetcher, part_fd: int) -> None:
        """The part has the bytes of the chunk file: the same blocks where the file system can, else copies."""
        with fetcher.whole_file() as file:
            await self._check_room(await self._run(file.allocated_bytes))
            if await self._run(parts.clone, file.data_fd, part_fd):
                await self._check(fetcher, file)
                return
            await self._run(os.ftruncate, part_fd, file.size)
            step = max(1, STEP_BYTES // file.header.chunk_bytes)
            for first in range(0, file.header.chunks, step):
                await self._check_room(0)
                count = min(step, file.header.chunks - first)
                if not await self._run(parts.copy_chunks, file, part_fd, first, count):
                    await fetcher.check_disk(range(first, first + count))
                    self._damaged(fetcher)

    async def _convert(self, fetcher: ImageFetcher, part_fd: int) -> None:
        """The part has the disk that the chunk file, a qcow2, contains."""
        with fetcher.whole_file() as file:
            # What a compressed image inflates to is seen while it does.
            await self._check_room(await self._run(file.allocated_bytes))
            await self._check(fetcher, file)
            is_direct = await self._run(parts.takes_direct_io, part_fd)
            trouble: list[errors.BasefsError] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_room, nursery.cancel_scope, trouble)
                try:
                    await convert(file.data_fd, part_fd, shown_size=fetcher.entry.shown_size, is_direct=is_direct)
                except errors.CacheError as exc:
                    trouble.append(exc)
                nursery.cancel_scope.cancel()
            if trouble:
                raise trouble[0]

    @asynccontextmanager
    async def _whole(self, entry: ImageEntry) -> AsyncIterator[ImageFetcher]:
        """The image over its chunk file, complete; nothing of it is evicted while the body runs."""
        fetcher = (await self._handler.downloaded_image(entry)).fetcher
        with fetcher.kept_whole():
            yield fetcher

    async def _check(self, fetcher: ImageFetcher, file: ChunkFile) -> None:
        """Every chunk is on the disk as its checksum says. CacheError: not so; what is damaged is missing now."""
        await self._run(os.fsync, file.data_fd)
        step = max(1, STEP_BYTES // file.header.chunk_bytes)
        for first in range(0, file.header.chunks, step):
            found = await fetcher.check_disk(range(first, min(first + step, file.header.chunks)))
            if found is None or found.damaged:
                self._damaged(fetcher)

    def _damaged(self, fetcher: ImageFetcher) -> None:
        # What comes in its place was not part of what was verified.
        fetcher.entry.local.whole = "unknown"
        raise errors.CacheError("a chunk was damaged on the disk; it has to be fetched again")

    # --- the part, its room, its name -----------------------------------------------------------------------

    @asynccontextmanager
    async def _part(self, entry: ImageEntry) -> AsyncIterator[tuple[int, str]]:
        """A new file in the lower directory and its name; it is removed unless it got its final name."""
        lower_fd = self._graduated.lower_fd
        name = parts.part_name(entry.base_name, self._settings.host)
        fd = await self._run(parts.create_part, lower_fd, name)
        try:
            yield fd, name
        finally:
            with trio.CancelScope(shield=True):
                await self._run(parts.remove_part, lower_fd, name)
                await self._run(os.close, fd)

    async def _check_room(self, needed_bytes: int) -> None:
        free = await self._run(parts.free_bytes, self._graduated.lower_fd)
        reserve = self._settings.reserve_bytes
        if free < needed_bytes + reserve:
            raise errors.CacheError(
                f"the lower directory's file system has {free} bytes free: {needed_bytes} are needed, and {reserve} "
                "(cache_min_free_bytes) shall stay"
            )

    async def _watch_room(self, work: trio.CancelScope, trouble: list[errors.BasefsError]) -> None:
        """Cancels the work and notes why when the room becomes short. Ends then, or when it is cancelled."""
        try:
            while True:
                await self._check_room(0)
                await trio.sleep(LOOK_S)
        except errors.BasefsError as exc:
            trouble.append(exc)
            work.cancel()

    async def _hand_over(self, entry: ImageEntry, fd: int, give_name: Callable[[], Awaitable[None]]) -> None:
        """Move the readers over to the finished file behind `fd`, and give it its name."""

        async def publish() -> None:
            _check_verified(entry)  # of the very chunks that are here: losing one ends it
            await give_name()
            entry.local.is_graduated = True

        await self._stored(
            entry
        )  # that it is whole: by that a file is known whose server was killed before it noted it
        await self._handler.hand_over(entry, fd, publish)
        await self._stored(entry)

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self._blocking.run(fn, *args)
        except OSError as exc:
            raise errors.LowerFileError(exc) from exc

    # --- after servers that were killed ---------------------------------------------------------------------

    async def tidy_up(self, entries: Callable[[], Iterable[ImageEntry]]) -> None:
        """Finish or take back what a killed server was at; nothing is graduated before. Once, at the start."""
        try:
            await self._run(parts.remove_left_over, self._graduated.lower_fd, self._settings.host)
            stored = await self._handler.stored_numbers()
            for entry in list(entries()):
                if entry.local.is_graduated or entry.number in stored:
                    await self._settle(entry, is_stored=entry.number in stored)
        except errors.BasefsError as exc:
            log.warning("what a killed server left in the lower directory was not tidied up: %s", exc)
        finally:
            self._tidied.set()

    async def _settle(self, entry: ImageEntry, *, is_stored: bool) -> None:
        is_there = await self._graduated.is_there(entry)
        if not is_there:
            self._graduated.gone(entry)
            return
        local = entry.local
        was_whole = local.cached_bytes == entry.size > 0 and local.whole in WHOLE
        if not local.is_graduated and (was_whole or self._graduated.get(entry.number) is not None):
            local.is_graduated = True  # the server was killed between the name and the note of it
            await self._stored(entry)
        if is_stored:
            await self._handler.drop_left_over(entry)


def _check_verified(entry: ImageEntry) -> None:
    if entry.local.whole not in WHOLE:
        raise errors.CacheError(f"it was not verified as a whole ({entry.local.whole})")


def _is_second(error: errors.BasefsError) -> bool:
    return isinstance(error, errors.LowerFileError) and error.os_error.errno == errno.EEXIST
