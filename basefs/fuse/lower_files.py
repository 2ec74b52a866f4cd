"""Open files of the lower directory: handle -> fd, and the bytes through it.

The table is owned by the trio loop and knows nothing of inode numbers or names, so its fds can be handed
to the next server as they are. An fd is closed when its handle was released and no call uses it any more.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator

import trio

from basefs import errors
from basefs.fuse.lower_calls import LowerCalls, in_our_words
from basefs.fuse.lower_disk import close_all, kill_set_id
from basefs.fuse.lower_inodes import LowerNode

ReadBytes = bytes | bytearray | memoryview

# What preadv says when the bytes are not in memory, or when this file system cannot tell.
_NOT_AT_ONCE = (errno.EAGAIN, errno.EOPNOTSUPP)


class OpenFile:
    """An opened lower file; `fd` stays valid while `pins` is above zero or the table holds it."""

    __slots__ = ("fd", "node", "pins", "released", "writable")

    def __init__(self, fd: int, node: LowerNode, *, writable: bool) -> None:
        self.fd = fd
        self.node = node
        self.writable = writable
        self.pins = 0
        self.released = False


class LowerFiles:
    """The open files and what is done to them by handle. Unknown handles: BadHandleError."""

    def __init__(self, calls: LowerCalls, *, first_handle: int) -> None:
        """Handles are numbered upwards from `first_handle` and never used again."""
        self._calls = calls
        self._numbers = itertools.count(first_handle)
        self._files: dict[int, OpenFile] = {}

    def __len__(self) -> int:
        """Open handles."""
        return len(self._files)

    def add(self, fd: int, flags: int, node: LowerNode) -> int:
        """A handle for `fd`, which the table owns from here."""
        handle = next(self._numbers)
        self._files[handle] = OpenFile(fd, node, writable=flags & os.O_ACCMODE != os.O_RDONLY)
        return handle

    def find(self, handle: int) -> OpenFile:
        """The open file."""
        try:
            return self._files[handle]
        except KeyError:
            raise errors.BadHandleError(f"no lower file has handle {handle}") from None

    @contextlib.contextmanager
    def pinned(self, handle: int) -> Iterator[OpenFile]:
        """Keeps the file's fd open over awaits."""
        file = self.find(handle)
        file.pins += 1
        try:
            yield file
        finally:
            file.pins -= 1
            # Linux releases no file while a request uses it; should it happen, this close may wait for the disk.
            if file.pins == 0 and file.released:
                os.close(file.fd)

    async def read(self, handle: int, offset: int, size: int) -> ReadBytes:
        """The `size` bytes at `offset`, fewer only at the end of the file. LowerFileError: none of them.

        Bytes in the page cache are copied at once, without a thread and without a checkpoint.
        """
        buffer = bytearray(size)
        try:
            count = os.preadv(self.find(handle).fd, (buffer,), offset, os.RWF_NOWAIT)
        except OSError as exc:
            if exc.errno not in _NOT_AT_ONCE:
                raise in_our_words(exc) from exc
            count = 0
        else:
            if count == size:
                return buffer
            if count == 0:
                return b""
        # Short means the end of the file or the end of what is in memory: only a blocking read can tell.
        rest = memoryview(buffer)[count:]
        with self.pinned(handle) as file:
            count += await self._calls.run(_read_into, file.fd, rest, offset + count)
        return buffer if count == size else memoryview(buffer)[:count]

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """The length of `data`, all of it written. LowerFileError: some may be, as after any failed write."""
        with self.pinned(handle) as file:
            await self._calls.run(_write_all, file.fd, data, offset, file.node.has_set_id)
        return len(data)

    async def flush(self, handle: int) -> None:
        """Reports what close(2) on the lower file would now: the delayed writes that another host refused.

        On file systems of this host close(2) has nothing to report.
        """
        with self.pinned(handle) as file:
            if file.writable and not self._calls.status_in_memory:
                await self._calls.run(_flush, file.fd)

    async def fsync(self, handle: int, *, datasync: bool) -> None:
        """The file's bytes are on the disk; without `datasync` its attributes too."""
        with self.pinned(handle) as file:
            await self._calls.run(os.fdatasync if datasync else os.fsync, file.fd)

    async def release(self, handle: int) -> None:
        """Forgets the handle and closes its file; what close(2) says was for `flush` to tell."""
        file = self.find(handle)
        del self._files[handle]
        file.released = True
        if file.pins == 0:
            # The last close of an unlinked file frees its blocks, which may take long; the fd must not leak.
            with trio.CancelScope(shield=True):
                await self._calls.run(close_all, [file.fd])

    def clear(self) -> list[int]:
        """Forgets every handle; the fds to close."""
        fds = [file.fd for file in self._files.values()]
        self._files.clear()
        return fds


def _read_into(fd: int, view: memoryview, offset: int) -> int:
    """Bytes read, fewer than the view only at the end of the file."""
    count = 0
    while count < len(view):
        more = os.preadv(fd, (view[count:],), offset + count)
        if more == 0:
            break
        count += more
    return count


def _write_all(fd: int, data: bytes, offset: int, has_set_id: bool) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count
    if has_set_id:
        kill_set_id(fd)


def _flush(fd: int) -> None:
    os.close(os.dup(fd))
