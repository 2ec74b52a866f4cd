"""Images that are read from their file in the lower directory, as long as somebody has them open.

Invariants: an image here is read by its fd and never by its name, which nova may unlink meanwhile; each fd is in escrow
before a reader depends on it, so the next server goes on with it; an fd number is forgotten before it is closed, so
one that is used again is never read. Owned by the trio loop.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.cache.chunk_file import data_path
from basefs.cache.hit_buffer import HIT_BYTES_MAX, hit_target
from basefs.cache.reader_table import ReaderTable, Share
from basefs.catalog.records import ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.concurrency.threads import BlockingCalls
from basefs.core.escrow import Escrow, HeldFd
from basefs.core.inodes import image_inode
from basefs.handlers.base import Patience
from basefs.handlers.parts import is_part_name

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HELD_PREFIX = "graduated/"
"""Keys are `graduated/<image number>`."""


class GraduatedImage:
    """`PreparedImage` over an fd, which is its own from here."""

    def __init__(self, image_id: str, fd: int, size: int, blocking: BlockingCalls) -> None:
        self.size = size
        self._image_id = image_id
        self._fd = fd
        self._blocking = blocking
        self._readers = 0
        self._no_readers = trio.Event()
        self.hit: Callable[[int, int], memoryview | bytes | None] = self._hit

    def _hit(self, offset: int, size: int) -> memoryview | bytes | None:
        """See `PreparedImage.hit`; None when a page is not in memory, or once it is closed."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if size > HIT_BYTES_MAX:
            return None
        target = hit_target(size)
        try:
            # Closed: -1, which is no fd. Inline, as in `ChunkFile.hit`.
            if os.preadv(self._fd, target, offset, os.RWF_NOWAIT) == size:
                return target[0]
        except OSError:  # a cold page, or a file system that cannot tell
            pass
        return None

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:  # noqa: ARG002
        """See `PreparedImage.share`."""
        return None

    async def read(self, offset: int, size: int, patience: Patience) -> bytes:  # noqa: ARG002
        """See `PreparedImage.read`. The disk is waited for however long it takes, as by a reader of the plain file.

        Raises:
            LowerFileError: the disk gave an error, or somebody cut the file.
        """
        length = min(size, self.size - offset)
        if length <= 0:
            return b""
        hit = self.hit(offset, length)
        if hit is not None:
            return bytes(hit)
        with self._reader():
            try:
                return await self._blocking.run(_read_all, self._fd, offset, length)
            except OSError as exc:
                where = f"file of image {self._image_id}, bytes {offset}-{offset + length - 1}: {exc.strerror}"
                raise errors.LowerFileError(OSError(exc.errno, where)) from exc

    @contextmanager
    def _reader(self) -> Iterator[None]:
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._no_readers.set()
                self._no_readers = trio.Event()

    def duplicate(self) -> int:
        """An fd of the same file, the caller's."""
        return os.dup(self._fd)

    async def close(self) -> None:
        """Give the fd back, after the readers inside. Cancellation: never, or it would stay open."""
        with trio.CancelScope(shield=True):
            while self._readers:
                await self._no_readers.wait()
            fd, self._fd = self._fd, -1
            if fd >= 0:
                # The last fd of an unlinked file frees its blocks, which may take long.
                await self._blocking.run(os.close, fd)


class GraduatedImages:
    """Those of this server, by image number; at most one an image."""

    def __init__(
        self,
        lower_fd: int,
        blocking: BlockingCalls,
        escrow: Escrow,
        nursery: trio.Nursery,
        changed: Callable[[ImageEntry], None],
    ) -> None:
        """`lower_fd`: any fd on the lower directory; it stays the caller's. `changed` is told of each changed entry."""
        self.lower_fd = lower_fd
        self._blocking = blocking
        self._escrow = escrow
        self._changed = changed
        self._images: dict[int, GraduatedImage] = {}
        self._finding: SingleFlight[int, None] = SingleFlight(nursery)

    def get(self, number: int) -> GraduatedImage | None:
        """The image that is served, if it is."""
        return self._images.get(number)

    async def is_there(self, entry: ImageEntry) -> bool:
        """Whether the lower directory has a file of the image's name that may be the image: regular, and as long.

        Raises:
            LowerFileError: it does not say.
        """
        return await self._run(_fits, self.lower_fd, entry.base_name, entry.shown_size)

    async def has_name(self, entry: ImageEntry) -> bool:
        """Whether the lower directory has whatever of the image's name.

        Raises:
            LowerFileError: it does not say.
        """
        return await self._run(_has_name, self.lower_fd, entry.base_name)

    async def find(self, entry: ImageEntry) -> GraduatedImage | None:
        """The image that is served; else it is opened by its name, once. None: it is a lazy one (again).

        No await lies between finding it served and the return.

        Raises:
            LowerFileError: the lower directory cannot be read.
        """
        while (image := self._images.get(entry.number)) is None and entry.local.is_graduated:
            await self._finding.run(entry.number, lambda: self._open(entry))
        return image

    async def _open(self, entry: ImageEntry) -> None:
        """Runs as a flight: one at a time for an image."""
        fd = await self._run(_open_file, self.lower_fd, entry.base_name, entry.shown_size)
        if fd is None:
            self.gone(entry)
        else:
            await self.serve(entry, fd)

    async def serve(self, entry: ImageEntry, fd: int) -> None:
        """Serve the image from `fd`, which is ours from here, in place of what served it before."""
        with trio.CancelScope(shield=True):
            try:
                await self._escrow.hold(f"{HELD_PREFIX}{entry.number}", "", fd)
            except OSError as exc:
                os.close(fd)
                raise errors.LowerFileError(exc) from exc
            former = self._images.get(entry.number)
            self._images[entry.number] = GraduatedImage(entry.image_id, fd, entry.shown_size, self._blocking)
            if former is not None:
                await former.close()

    def gone(self, entry: ImageEntry) -> None:
        """The lower directory has no such file any more: the name is a lazy image again, not verified."""
        if entry.local.is_graduated:
            entry.local.is_graduated = False
            entry.local.whole = "unknown"
            self._changed(entry)

    async def close(self, number: int) -> None:
        """Nobody has the image open any more. Never fails."""
        image = self._images.pop(number, None)
        if image is not None:
            with trio.CancelScope(shield=True):
                await image.close()
                if number not in self._images:
                    await self._escrow.drop(f"{HELD_PREFIX}{number}")

    async def close_but(self, opened: Collection[int]) -> None:
        """Close all images but those with these numbers."""
        for number in [number for number in self._images if number not in opened]:
            await self.close(number)

    async def restore(self, held: Sequence[HeldFd], entry_of: Callable[[int], ImageEntry | None]) -> None:
        """Go on with what the servers before served, whose fds are ours from here.

        A file that had not got its name yet when its server was killed is dropped: the cache has its bytes.
        """
        for one in held:
            entry = entry_of(int(one.key.removeprefix(HELD_PREFIX)))
            if entry is None or _is_unfinished(one.fd, entry) or os.fstat(one.fd).st_size != entry.shown_size:
                os.close(one.fd)
                await self._escrow.drop(one.key)
            else:
                self._images[entry.number] = GraduatedImage(entry.image_id, one.fd, entry.shown_size, self._blocking)

    async def clear(self) -> None:
        """Close every fd, after the last request. What is in escrow is the next server's."""
        while self._images:
            await self._images.popitem()[1].close()

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self._blocking.run(fn, *args)
        except OSError as exc:
            raise errors.LowerFileError(exc) from exc


def _is_unfinished(fd: int, entry: ImageEntry) -> bool:
    """Whether it has not got its name: the kernel tells the last name of an open file, also of an unlinked one."""
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).removesuffix(" (deleted)")
    return is_part_name(name) or name == data_path(Path(), image_inode(entry.number)).name


def _read_all(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(errno.EIO, f"the file ends after {offset + len(data)} bytes")
    return data


def _has_name(lower_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=lower_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _fits(lower_fd: int, name: str, size: int) -> bool:
    try:
        status = os.stat(name, dir_fd=lower_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _open_file(lower_fd: int, name: str, size: int) -> int | None:
    if not _fits(lower_fd, name, size):
        return None
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=lower_fd)
    except FileNotFoundError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        os.close(fd)
        return None
    return fd
