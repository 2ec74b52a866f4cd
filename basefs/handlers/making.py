"""From the chunk file of a complete image to a file of the lower directory: by rename, shared blocks, copy or qemu-img.

Nothing of the image is evicted meanwhile, and a chunk that is lost ends it. What gets the name was compared with the
chunks' checksums as the disk has them, or was made of it by qemu-img, and has the size that was shown.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, data_path
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.core.inodes import image_inode
from basefs.handlers import parts
from basefs.handlers.conversion import convert
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.parts import ShownFile

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEP_BYTES = 4 << 20
"""Checked or copied in one call in a thread: 4 ms to 40 ms, after which it may be cancelled."""
LOOK_S = 0.5
"""How often the free space is looked at while qemu-img writes: nothing tells when a disk fills up, and a full one
would stop the guests whose overlays are on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraduationSettings:
    """`is_on`: `[basefs] graduate`. `reserve_bytes` stay free on the lower file system. `host`: `parts.host_name()`."""

    is_on: bool
    chunks_dir: Path
    reserve_bytes: int
    host: str


class FileMaker:
    """Makes files in the directory behind `lower_fd`. Owned by the trio loop."""

    def __init__(
        self,
        handler: DownloadingTemplateImageHandler,
        lower_fd: int,
        settings: GraduationSettings,
        blocking: BlockingCalls,
        *,
        shown: Callable[[ImageEntry], ShownFile],
        stored: Callable[[ImageEntry], Awaitable[None]],
    ) -> None:
        """`shown(entry)` is what `stat` shows now; `stored(entry)` returns when what changed outlives this server."""
        self._handler = handler
        self._lower_fd = lower_fd
        self._settings = settings
        self._blocking = blocking
        self._shown = shown
        self._stored = stored
        self._may_rename = True

    async def make(self, entry: ImageEntry) -> int:
        """The image's file, under its name; its allocated bytes.

        Raises:
            LowerFileError: EEXIST where the name is there already; else why not now, as any BasefsError.
        """
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
            publish = partial(self._run, parts.publish, self._lower_fd, name, entry.base_name)
            reading_fd = await self._run(parts.reopened, fd)
            try:
                await self._hand_over(entry, reading_fd, publish)
            finally:
                os.close(reading_fd)  # not the last one: the part's own is open
            return allocated_bytes

    # --- ways to a file -------------------------------------------------------------------------------------

    async def _by_rename(self, entry: ImageEntry) -> int | None:
        """The chunk file itself becomes the file, nothing is copied; None where it lies on another file system."""
        if not await self._run(parts.is_same_device, self._lower_fd, self._settings.chunks_dir):
            return None
        async with self._whole(entry) as fetcher:
            with fetcher.whole_file() as file:
                await self._check(fetcher, file)
                fd = await self._run(parts.reopened, file.data_fd)
            return await self._rename(entry, fd)

    async def _rename(self, entry: ImageEntry, fd: int) -> int | None:
        """As `_by_rename`; `fd` is on the chunk file and ours from here."""
        lower_fd, chunks_dir = self._lower_fd, self._settings.chunks_dir
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
        lower_fd = self._lower_fd
        name = parts.part_name(entry.base_name, self._settings.host)
        fd = await self._run(parts.create_part, lower_fd, name)
        try:
            yield fd, name
        finally:
            with trio.CancelScope(shield=True):
                await self._run(parts.remove_part, lower_fd, name)
                await self._run(os.close, fd)

    async def _check_room(self, needed_bytes: int) -> None:
        free = await self._run(parts.free_bytes, self._lower_fd)
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

        # That it is whole: by that `tidy_up` knows the file of a server that was killed before it noted it.
        await self._stored(entry)
        await self._handler.hand_over(entry, fd, publish)
        await self._stored(entry)

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self._blocking.run(fn, *args)
        except OSError as exc:
            raise errors.LowerFileError(exc) from exc


def _check_verified(entry: ImageEntry) -> None:
    if entry.local.whole not in WHOLE:
        raise errors.CacheError(f"it was not verified as a whole ({entry.local.whole})")
