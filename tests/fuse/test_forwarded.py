"""A forwarded request has the outcome that pyfuse3 gives it: the same call of `Operations`, the same bytes of reply.

libfuse speaks over a socket here, as in the handshake with the keeper, so the test is the kernel.
"""

import errno
import os
import random
import socket
import stat
import struct
from typing import Any

import pyfuse3
import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from basefs.core import fuse_wire as wire
from basefs.core.fuse_wire import Opcode, request_of
from basefs.fuse import forwarded, session_waits
from basefs.fuse.listing_page import add_entry

INIT = struct.pack("<IIII", 7, 36, 1 << 20, 0x03FF_FFFB) + bytes(48)
REPLY_BYTES_MAX = 2 << 20
HEADER = wire.IN_HEADER.size


class Recorder(pyfuse3.Operations):
    """Notes each call and gives an answer that only `seed` decides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._seed = seed
        self._random = random.Random(seed)

    def begin(self) -> None:
        """The next request gets the same answer as the first did."""
        self.calls.clear()
        self._random.seed(self._seed)

    def _called(self, name: str, *args: Any) -> None:
        self.calls.append((name, *(_plain(arg) for arg in args)))
        if self._random.random() < 0.2:
            raise pyfuse3.FUSEError(self._random.choice([errno.EIO, errno.ENOENT, errno.EROFS, errno.ENODATA]))

    def _entry(self) -> pyfuse3.EntryAttributes:
        chance = self._random
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.generation = chance.getrandbits(63) + 1, chance.getrandbits(32)
        entry.entry_timeout, entry.attr_timeout = chance.choice([0, 1.0, 0.25, 300, -1]), chance.random() * 3
        entry.st_mode = chance.choice([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO]) | chance.getrandbits(12)
        entry.st_nlink, entry.st_uid, entry.st_gid = (chance.getrandbits(31) for _ in range(3))
        entry.st_rdev, entry.st_blksize = chance.getrandbits(20), chance.getrandbits(20)
        entry.st_size, entry.st_blocks = chance.getrandbits(62), chance.getrandbits(62)
        entry.st_atime_ns = chance.choice([0, chance.getrandbits(60), -1, -1_500_000_000])
        entry.st_mtime_ns, entry.st_ctime_ns = chance.getrandbits(60), chance.getrandbits(60)
        return entry

    def _file(self) -> pyfuse3.FileInfo:
        flags = (self._random.random() < 0.5 for _ in range(3))
        return pyfuse3.FileInfo(self._random.getrandbits(63), *flags)

    async def lookup(self, parent_inode: Any, name: Any, ctx: Any) -> Any:
        self._called("lookup", parent_inode, name, ctx)
        return self._entry()

    async def forget(self, inode_list: Any) -> None:
        self.calls.append(("forget", list(inode_list)))

    async def getattr(self, inode: Any, ctx: Any) -> Any:
        self._called("getattr", inode, ctx)
        return self._entry()

    async def setattr(self, inode: Any, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        named = {name: getattr(fields, name) for name in dir(fields) if name.startswith("update_")}
        times = (attr.st_atime_ns, attr.st_mtime_ns)
        # "Now" is not the same in two calls.
        times = tuple("now" if time > 1_500_000_000_000_000_000 else time for time in times)
        changed = (attr.st_mode, attr.st_uid, attr.st_gid, attr.st_size, attr.st_ctime_ns)
        self._called("setattr", inode, changed, times, named, fh, ctx)
        return self._entry()

    async def readlink(self, inode: Any, ctx: Any) -> Any:
        self._called("readlink", inode, ctx)
        return b"to/where"

    async def mknod(self, *args: Any) -> Any:
        self._called("mknod", *args)
        return self._entry()

    async def mkdir(self, *args: Any) -> Any:
        self._called("mkdir", *args)
        return self._entry()

    async def symlink(self, *args: Any) -> Any:
        self._called("symlink", *args)
        return self._entry()

    async def link(self, *args: Any) -> Any:
        self._called("link", *args)
        return self._entry()

    async def unlink(self, *args: Any) -> None:
        self._called("unlink", *args)

    async def rmdir(self, *args: Any) -> None:
        self._called("rmdir", *args)

    async def rename(self, *args: Any) -> None:
        self._called("rename", *args)

    async def open(self, *args: Any) -> Any:
        self._called("open", *args)
        return self._file()

    async def create(self, *args: Any) -> Any:
        self._called("create", *args)
        return self._file(), self._entry()

    async def read(self, fh: Any, off: int, size: int) -> Any:
        self._called("read", fh, off, size)
        return memoryview(self._random.randbytes(min(size, 5000)))

    async def write(self, fh: Any, off: int, buf: bytes) -> int:
        self._called("write", fh, off, bytes(buf))
        return len(buf)

    async def flush(self, fh: Any) -> None:
        self._called("flush", fh)

    async def release(self, fh: Any) -> None:
        self._called("release", fh)

    async def fsync(self, fh: Any, datasync: bool) -> None:
        self._called("fsync", fh, datasync)

    async def opendir(self, inode: Any, ctx: Any) -> Any:
        self._called("opendir", inode, ctx)
        return self._random.getrandbits(63)

    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        self._called("readdir", fh, start_id)
        for number in range(40):
            if not add_entry(token, b"n" * self._random.randint(1, 255), self._entry(), number + 1):
                return

    async def releasedir(self, fh: Any) -> None:
        self._called("releasedir", fh)

    async def fsyncdir(self, fh: Any, datasync: bool) -> None:
        self._called("fsyncdir", fh, datasync)

    async def statfs(self, ctx: Any) -> Any:
        self._called("statfs", ctx)
        numbers = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_namemax"):
            setattr(numbers, name, self._random.getrandbits(20))
        for name in ("f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree"):
            setattr(numbers, name, self._random.getrandbits(50))
        return numbers

    async def getxattr(self, inode: Any, name: Any, ctx: Any) -> bytes:
        self._called("getxattr", inode, name, ctx)
        return self._random.randbytes(self._random.randint(0, 100))

    async def listxattr(self, inode: Any, ctx: Any) -> Any:
        self._called("listxattr", inode, ctx)
        return [b"user.a" * self._random.randint(1, 5) for _ in range(self._random.randint(0, 3))]

    async def setxattr(self, *args: Any) -> None:
        self._called("setxattr", *args)

    async def removexattr(self, *args: Any) -> None:
        self._called("removexattr", *args)

    async def access(self, inode: Any, mode: Any, ctx: Any) -> bool:
        self._called("access", inode, mode, ctx)
        return self._random.random() < 0.5


def _plain(arg: Any) -> Any:
    return (arg.uid, arg.gid, arg.pid, arg.umask) if hasattr(arg, "umask") else arg


NAMES = st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"\0", b"x").replace(b"/", b"y"))
U64, U32 = st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1)
OPCODES = [*(code for code in Opcode if code not in (Opcode.DESTROY, Opcode.INTERRUPT)), 28, 37, 43, 46, 47, 51]
SIZE = st.one_of(st.integers(0, 300), st.integers(300, 1 << 17))


@st.composite
def _bodies(draw: Any) -> tuple[int, bytes]:  # noqa: C901 (one case an opcode)
    """An opcode and a body as the kernel sends it."""
    opcode = draw(st.sampled_from(OPCODES))
    name, other = draw(NAMES) + b"\0", draw(NAMES) + b"\0"
    handle, offset, size, flags = draw(U64), draw(U64), draw(SIZE), draw(U32)
    match opcode:
        case Opcode.LOOKUP | Opcode.UNLINK | Opcode.RMDIR | Opcode.REMOVEXATTR:
            return opcode, name
        case Opcode.SYMLINK:
            return opcode, name + other
        case Opcode.FORGET:
            return opcode, struct.pack("<Q", handle)
        case Opcode.BATCH_FORGET:
            pairs = draw(st.lists(st.tuples(U64, U64), min_size=1, max_size=20))
            return opcode, struct.pack("<II", len(pairs), 0) + b"".join(struct.pack("<QQ", *pair) for pair in pairs)
        case Opcode.GETATTR:
            return opcode, struct.pack("<IIQ", flags & 1, 0, handle)
        case Opcode.SETATTR:
            times = draw(st.tuples(*[st.integers(-(2**33), 2**30)] * 3, *[st.integers(0, 999_999_999)] * 3))
            valid = draw(st.integers(0, (1 << 12) - 1))
            return opcode, wire.SETATTR_IN.pack(valid, 0, handle, offset, 0, *times, flags, 0, size, 7, 0)
        case Opcode.MKNOD:
            return opcode, wire.MKNOD_IN.pack(flags, size, draw(st.integers(0, 0o777)), 0) + name
        case Opcode.MKDIR:
            return opcode, wire.MKDIR_IN.pack(flags & 0o177777, draw(st.integers(0, 0o777))) + name
        case Opcode.RENAME:
            return opcode, struct.pack("<Q", handle) + name + other
        case Opcode.RENAME2:
            return opcode, struct.pack("<QII", handle, flags & 7, 0) + name + other
        case Opcode.LINK:
            return opcode, struct.pack("<Q", handle) + name
        case Opcode.OPEN | Opcode.OPENDIR:
            return opcode, wire.OPEN_IN.pack(flags, 0)
        case Opcode.CREATE:
            return opcode, wire.CREATE_IN.pack(flags, size, draw(st.integers(0, 0o777)), 0) + name
        case Opcode.READ | Opcode.READDIRPLUS:
            return opcode, wire.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
        case Opcode.WRITE:
            return opcode, wire.READ_IN.pack(handle, offset, len(name), 0, 0, 0, 0) + name
        case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.FLUSH:
            return opcode, wire.RELEASE_IN.pack(handle, flags, flags & 3, 0)
        case Opcode.FSYNC | Opcode.FSYNCDIR:
            return opcode, wire.FSYNC_IN.pack(handle, flags & 1, 0)
        case Opcode.SETXATTR:
            return opcode, wire.SETXATTR_IN.pack(len(other), draw(st.integers(0, 2))) + name + other
        case Opcode.GETXATTR:
            return opcode, wire.GETXATTR_IN.pack(draw(st.sampled_from([0, 1, 50, 4096])), 0) + name
        case Opcode.LISTXATTR:
            return opcode, wire.GETXATTR_IN.pack(draw(st.sampled_from([0, 1, 50, 4096])), 0)
        case Opcode.ACCESS:
            return opcode, wire.ACCESS_IN.pack(flags & 7, 0)
    return opcode, bytes(64)


def _request(unique: int, opcode: int, body: bytes, inode: int = 1, who: tuple[int, int, int] = (0, 0, 1)) -> bytes:
    return wire.IN_HEADER.pack(HEADER + len(body), opcode, unique, inode, *who, 0, 0) + body


REQUESTS = st.tuples(_bodies(), st.integers(1, 2**63), st.tuples(U32, U32, U32), st.integers(0, 2**32))


class Libfuse:
    """pyfuse3 over a socket; `ask` gives its reply."""

    def __init__(self, kernel: socket.socket) -> None:
        self._kernel = kernel

    async def ask(self, request: bytes, *, has_reply: bool) -> bytes:
        self._kernel.send(request)
        if has_reply:
            await trio.lowlevel.wait_readable(self._kernel)
            return self._kernel.recv(REPLY_BYTES_MAX)
        # The reply to what comes next says that this was dealt with.
        await trio.testing.wait_all_tasks_blocked()
        return b""


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.lists(REQUESTS, min_size=1, max_size=12))
def test_the_same_call_and_the_same_reply(requests: list[Any]) -> None:
    trio.run(_compare, requests)


async def _compare(requests: list[Any]) -> None:
    face = Recorder(0)
    kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (kernel, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPLY_BYTES_MAX)
    fd = os.dup(theirs.fileno())
    session_waits.install()
    pyfuse3.init(face, f"/dev/fd/{fd}", set())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            libfuse = Libfuse(kernel)
            await libfuse.ask(_request(2, 26, INIT), has_reply=True)
            for number, ((opcode, body), inode, who, seed) in enumerate(requests):
                raw = _request(2 * number + 4, opcode, body, inode, who)
                await _compare_one(face, seed, libfuse, raw)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
        kernel.close()
        theirs.close()


async def _compare_one(face: Recorder, seed: int, libfuse: Libfuse, raw: bytes) -> None:
    request = request_of(memoryview(raw))
    has_reply = request.opcode not in wire.NO_REPLY
    face._seed = seed
    face.begin()
    wanted = await libfuse.ask(raw, has_reply=has_reply)
    wanted_calls = list(face.calls)
    face.begin()
    pieces = await forwarded.answer(face, request)
    assert b"".join(bytes(piece) for piece in pieces) == wanted
    assert face.calls == wanted_calls


async def test_what_is_no_request_is_refused() -> None:
    for raw in (b"", bytes(39), _request(2, 1, b"x\0") + b"y"):
        with pytest.raises(ValueError, match="bytes"):
            request_of(memoryview(raw))
    face = Recorder(0)
    for opcode in (Opcode.LOOKUP, Opcode.READ, Opcode.SETATTR, Opcode.RENAME2):
        short = request_of(memoryview(_request(2, opcode, b"x")))
        assert await forwarded.answer(face, short) == [wire.error_reply(2, errno.EINVAL)]
    assert not face.calls


async def test_an_interrupt_has_no_answer_and_changes_nothing() -> None:
    face = Recorder(0)
    assert await forwarded.answer(face, request_of(memoryview(_request(3, 36, struct.pack("<Q", 2))))) == []
    assert not face.calls
