"""A node in memory: a handler over a chunk directory, and a lower directory that its images graduate to."""

import os
import random
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from basefs.cache.chunk_file import data_path, map_path
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.core.inodes import image_inode
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.graduation import Graduator
from basefs.handlers.making import GraduationSettings
from basefs.handlers.parts import ShownFile
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK, IMAGE_ID, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.fakes.escrow import MemoryEscrow

PATIENCE = Patience(deadline_s=30, is_guest=False)
HOST = "testhost"
MTIME_NS = 1_600_000_000_000_000_007


@dataclass(kw_only=True)
class Node:
    chunks: Path
    lower: Path
    entry: ImageEntry
    content: bytes
    """What the image is shown with."""
    handler: DownloadingTemplateImageHandler
    graduated: GraduatedImages
    graduator: Graduator
    escrow: MemoryEscrow
    stored: list[bool]
    """`is_graduated` whenever the entry was stored."""

    @property
    def file(self) -> Path:
        return self.lower / self.entry.base_name

    def has_chunks(self) -> bool:
        inode = image_inode(self.entry.number)
        return data_path(self.chunks, inode).exists() or map_path(self.chunks, inode).exists()

    async def complete(self) -> None:
        image = await self.handler.downloaded_image(self.entry)
        while await image.fetcher.fetch_background(1 << 20):
            pass
        await image.fetcher._flights.wait_idle()
        image.fetcher.check_whole()
        self.entry.local.whole = "verified"

    async def open(self) -> None:
        image = await self.handler.fetch_image(self.entry)
        self.handler.opened(self.entry, image)

    async def read(self, offset: int, size: int) -> bytes:
        image = await self.handler.fetch_image(self.entry)
        found = image.hit(offset, size)
        return bytes(found) if found is not None else await image.read(offset, size, PATIENCE)

    async def check_read(self) -> None:
        assert await self.read(0, len(self.content)) == self.content

    def check_nothing_made(self) -> None:
        """The image is in the cache as before, and the lower directory has nothing of it."""
        assert os.listdir(self.lower) == []
        assert not self.entry.local.is_graduated
        assert self.has_chunks()

    def check_made(self) -> None:
        """The lower directory has what nova's own download would have left, and the cache nothing."""
        assert os.listdir(self.lower) == [self.entry.base_name]
        status = self.file.stat()
        assert self.file.read_bytes() == self.content
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777, status.st_nlink) == (11, 12, 0o644, 1)
        assert status.st_mtime_ns == MTIME_NS
        assert self.entry.local.is_graduated
        assert self.stored[-1]
        assert self.entry.local.cached_bytes == 0
        assert not self.has_chunks()


@asynccontextmanager
async def a_node(
    directory: Path,
    content: bytes,
    *,
    lower: Path | None = None,
    stored_bytes: bytes | None = None,
    reserve_bytes: int = 0,
    is_on: bool = True,
    entry: ImageEntry | None = None,
    escrow: MemoryEscrow | None = None,
    must_tidy: bool = True,
) -> AsyncIterator[Node]:
    """`stored_bytes`: a qcow2 file that contains `content`; `entry` and `escrow`: those of a server before."""
    chunks = directory / "chunks"
    lower = lower or directory / "lower"
    chunks.mkdir(exist_ok=True)
    lower.mkdir(exist_ok=True)
    in_glance = content if stored_bytes is None else stored_bytes
    if entry is None:
        entry = make_entry(len(in_glance), disk_format="raw" if stored_bytes is None else "qcow2")
        entry.local.shown_size = None if stored_bytes is None else len(content)
    escrow = escrow or MemoryEscrow()
    the_entry = entry
    lower_fd = os.open(lower, os.O_RDONLY | os.O_DIRECTORY)
    stored: list[bool] = []

    async def store(entry: ImageEntry) -> None:
        stored.append(entry.local.is_graduated)

    try:
        async with trio.open_nursery() as nursery:
            services = make_services(nursery, MemorySource({IMAGE_ID: in_glance}), chunks)
            blocking = BlockingCalls("graduated", threads_max=4)
            graduated = GraduatedImages(lower_fd, blocking, escrow, nursery, lambda _entry: None)
            handler = DownloadingTemplateImageHandler(chunks, CHUNK, services, Views("raw"), graduated=graduated)
            settings = GraduationSettings(is_on=is_on, chunks_dir=chunks, reserve_bytes=reserve_bytes, host=HOST)
            graduator = Graduator(handler, graduated, settings, nursery, shown=shown, stored=store)
            await graduated.restore(escrow.held(), lambda number: the_entry if number == the_entry.number else None)
            if must_tidy:
                await graduator.tidy_up(lambda: [the_entry])
            yield Node(
                chunks=chunks, lower=lower, entry=entry, content=content, handler=handler, graduated=graduated,
                graduator=graduator, escrow=escrow, stored=stored,
            )  # fmt: skip
            await graduator.stop()
            await handler.close()
            nursery.cancel_scope.cancel()
    finally:
        os.close(lower_fd)


def shown(entry: ImageEntry) -> ShownFile:
    return ShownFile(size=entry.shown_size, uid=11, gid=12, mode=0o644, atime_ns=MTIME_NS, mtime_ns=MTIME_NS)


def disk_content(seed: int, size: int) -> bytes:
    """Random bytes with zeros in between, as disks have them; `size` need not fit anything."""
    rng = random.Random(seed)
    parts = [rng.randbytes(40_000) if rng.random() < 0.6 else bytes(40_000) for _ in range(size // 40_000 + 1)]
    return b"".join(parts)[:size]


def qcow2_of(directory: Path, content: bytes, *arguments: str) -> bytes:
    """A qcow2 file with this content, as `qemu-img convert ARGUMENTS` makes it."""
    raw, qcow2 = directory / "source.raw", directory / "source.qcow2"
    raw.write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *arguments, raw, qcow2], check=True)
    return qcow2.read_bytes()


Patch = Callable[..., None]
