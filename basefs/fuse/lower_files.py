"""Open files of the lower directory: handle -> fd, and the bytes through it.

The table is owned by the trio loop. An fd is closed when its handle was released and no call uses it any more.
`hits` has for each handle the function that reads what is in memory at once; it goes in the step that forgets the
handle, before the fd is closed, so a number that was given out again is never read.
Each is in escrow before the kernel hears of its handle, and the next server restores it under the same number:
reads, writes and the rest go on, also where the file has no name any more.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator

import trio

from basefs import errors
from basefs.cache.hit_buffer import HIT_BYTES_MAX, hit_buffer, hit_targets
from basefs.core.escrow import Escrow, HeldFd
from basefs.fuse.lower_calls import LowerCalls, in_our_words
from basefs.fuse.lower_disk import close_all, kill_set_id
from basefs.fuse.lower_inodes import LowerNode

Hit = Callable[[int, int], "memoryview | bytes | None"]

# Names of this module: two look-ups fewer a read.
_preadv = os.preadv
_NOWAIT = os.RWF_NOWAIT

HELD_PREFIX = "lower/"
"""Keys are `lower/<handle>`, notes `w` for a file open for writing, else `r`."""
FILES_MAX = 16_000
"""Handles at a time, below what the keeper holds (keeper_held.ENTRIES_MAX): open(2) then says ENFILE, and no open
file is one that a restart would lose."""


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

    def __init__(
        self, calls: LowerCalls, escrow: Escrow, closed: Callable[[LowerNode], int | None], *, first_handle: int
    ) -> None:
        """Handles are numbered upwards from `first_handle` and never used again.

        `closed` is told of each file closed; it gives an fd of the node that is to be closed, too.
        """
        self._calls = calls
        self._escrow = escrow
        self._closed = closed
        self._numbers = itertools.count(first_handle)
        self._files: dict[int, OpenFile] = {}
        self.hits: dict[int, Hit] = {}
        self.released: Callable[[int], None] = _nothing
        """Called with each handle that was released: whoever has its file open, too, closes it."""

    def __len__(self) -> int:
        """Open handles."""
        return len(self._files)

    def check_room(self) -> None:
        """LowerFileError if no further file may be opened."""
        if len(self._files) >= FILES_MAX:
            raise in_our_words(OSError(errno.ENFILE, f"{FILES_MAX} lower files are open"))

    async def leave(self, fd: int, flags: int) -> int:
        """A handle for `fd`, which is in escrow then; `know` comes next. LowerFileError: it is not, and is closed.

        Cancellation: never, for what was opened must be answered, or its fd would stay in escrow for ever.
        """
        handle = next(self._numbers)
        try:
            with trio.CancelScope(shield=True):
                await self._escrow.hold(f"{HELD_PREFIX}{handle}", "w" if _is_writable(flags) else "r", fd)
        except OSError as exc:
            os.close(fd)
            raise in_our_words(exc) from exc
        return handle

    def know(self, handle: int, fd: int, flags: int, node: LowerNode) -> int:
        """The handle, which is open from here; the table owns `fd`."""
        self._add(handle, OpenFile(fd, node, writable=_is_writable(flags)))
        return handle

    async def abandon(self, handle: int, fd: int) -> None:
        """Takes `leave` back."""
        os.close(fd)
        with trio.CancelScope(shield=True):
            await self._escrow.drop(f"{HELD_PREFIX}{handle}")

    def restore(self, held: HeldFd, node: LowerNode) -> None:
        """Serves a handle that an earlier server gave out."""
        handle = int(held.key.removeprefix(HELD_PREFIX))
        self._add(handle, OpenFile(held.fd, node, writable=held.note == "w"))
        self._numbers = itertools.count(max(next(self._numbers), handle + 1))

    def _add(self, handle: int, file: OpenFile) -> None:
        self._files[handle] = file
        self.hits[handle] = _hit_of(file.fd, lambda: self.hits.pop(handle, None))
        file.node.opens += 1

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

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`, fewer only at the end of the file. LowerFileError: none of them.

        In a thread; `hits` come first.
        """
        with self.pinned(handle) as file:
            return await self._calls.run(_read, file.fd, offset, size)

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
        self.hits.pop(handle, None)
        self.released(handle)
        file.released = True
        node_fd = self._closed(file.node)
        fds = [file.fd] if file.pins == 0 else []
        # The last close of an unlinked file frees its blocks, which may take long; the fd must not leak.
        with trio.CancelScope(shield=True):
            await self._escrow.drop(f"{HELD_PREFIX}{handle}")
            await self._calls.run(close_all, fds if node_fd is None else [*fds, node_fd])

    def clear(self) -> list[int]:
        """Forgets every handle; the fds to close."""
        fds = [file.fd for file in self._files.values()]
        self._files.clear()
        self.hits.clear()
        return fds


def _nothing(_handle: int) -> None:
    """Nobody wants to know."""


def _hit_of(fd: int, give_up: Callable[[], object]) -> Hit:
    """A function `hit(offset, size)` that gives the bytes there, up to the end of the file, if they are in memory.

    None when they are not, or not all: only a blocking read can tell then whether the file ends there. The answer is
    valid until the next await; 0 <= offset, never raises. `give_up` is called where the file system cannot tell (NFS).
    """

    def hit(offset: int, size: int) -> memoryview | bytes | None:
        try:
            target = hit_targets.get(size)
            if target is None:
                if size > HIT_BYTES_MAX:
                    return None
                target = [hit_buffer[:size]]
            # Inline: 6 us against 64 us through a thread. RWF_NOWAIT: a cold page must not stop the loop.
            count = _preadv(fd, target, offset, _NOWAIT)
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                give_up()
            return None  # a cold page; or an error, which the blocking read will tell
        if count == size:
            return target[0]
        return None if count else b""

    return hit


def _is_writable(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def _read(fd: int, offset: int, size: int) -> bytes:
    """The bytes, fewer than `size` only at the end of the file."""
    data = os.pread(fd, size, offset)
    # Short is no end yet: a signal, or a network file system that gives what it has.
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


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
