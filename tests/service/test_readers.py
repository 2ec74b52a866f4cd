"""The server's end of its readers: each request that was handed on is begun once and answered on the clone."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from basefs import errors
from basefs.cache.reader_table import ReaderTable, new_table
from basefs.core import fuse_wire as wire
from basefs.core.fuse_wire import Opcode
from basefs.reader_layout import KEPT, MESSAGE, SLOTS, SLOTS_BYTES, TABLE
from basefs.service.readers import Readers

HEADER = wire.IN_HEADER.size
REPLY_BYTES_MAX = 2 << 20


class Face(pyfuse3.Operations):
    """Notes what is done; `gate` holds it up."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []
        self.gate = trio.Event()
        self.gate.set()

    async def mkdir(self, parent_inode: Any, name: Any, mode: Any, ctx: Any) -> Any:
        self.done.append(bytes(name))
        await self.gate.wait()
        raise pyfuse3.FUSEError(errno.EROFS)

    async def write(self, fh: Any, off: int, buf: bytes) -> int:
        self.done.append((fh, off, len(buf)))
        return len(buf)


class Reader:
    """The reader's end of one connection, and the kernel's of its clone."""

    def __init__(self, readers: Readers, number: int = 0, clone: "Reader | None" = None, *, kept: int = 0) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.send(KEPT.pack(kept))
        if clone is None:
            self.kernel, self._clone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.kernel.settimeout(10)
        else:
            self.kernel, self._clone = clone.kernel, clone._clone
        slots_fd = os.memfd_create("slots")
        os.ftruncate(slots_fd, SLOTS_BYTES)
        readers.connect(number, [theirs.detach(), os.dup(self._clone.fileno()), slots_fd])

    async def send(self, data: bytes) -> None:
        stream = memoryview(data)
        self.sock.setblocking(False)
        while stream:
            await trio.lowlevel.wait_writable(self.sock)
            stream = stream[self.sock.send(stream) :]

    async def reply(self) -> bytes:
        await trio.lowlevel.wait_readable(self.kernel)
        return self.kernel.recv(REPLY_BYTES_MAX)

    def close(self) -> None:
        for one in (self.sock, self.kernel, self._clone):
            one.close()


def request(unique: int, opcode: int, body: bytes) -> bytes:
    return wire.IN_HEADER.pack(HEADER + len(body), opcode, unique, 1, 0, 0, 1, 0, 0) + body


def mkdir(unique: int, name: bytes) -> bytes:
    return request(unique, Opcode.MKDIR, wire.MKDIR_IN.pack(0o755, 0) + name + b"\0")


@pytest.fixture
def face() -> Face:
    return Face()


@pytest.fixture
def readers(face: Face) -> Iterator[Readers]:
    async def share(_number: int, _table: ReaderTable, _offset: int, _size: int) -> None:
        return None

    table = ReaderTable(new_table())
    lower = SimpleNamespace(shared_fd=lambda _handle: None, when_released=lambda _call: None)
    yield Readers(face, SimpleNamespace(share=share), lower, table, requests_max=4)  # type: ignore[arg-type]
    os.close(table.fd)


async def test_requests_that_come_in_pieces_or_together_are_answered(
    face: Face, readers: Readers, nursery: trio.Nursery
) -> None:
    nursery.start_soon(readers.run)
    reader = Reader(readers)
    data = mkdir(2, b"one") + mkdir(4, b"two")
    for at in range(len(data)):
        await reader.send(data[at : at + 1])
    replies = {await reader.reply(), await reader.reply()}
    assert replies == {wire.error_reply(2, errno.EROFS), wire.error_reply(4, errno.EROFS)}
    big = request(6, Opcode.WRITE, wire.READ_IN.pack(9, 0, 1 << 20, 0, 0, 0, 0) + bytes(1 << 20))
    await reader.send(big + big.replace(struct.pack("<Q", 6), struct.pack("<Q", 8), 1))
    assert len(await reader.reply()) == len(await reader.reply()) == 24
    assert face.done == [b"one", b"two", (9, 0, 1 << 20), (9, 0, 1 << 20)]
    assert MESSAGE.unpack(reader.sock.recv(MESSAGE.size))[0] == TABLE
    assert readers.counts()["readers"] == 1
    nursery.cancel_scope.cancel()
    reader.close()


async def test_what_a_dead_reader_handed_on_is_answered_and_not_begun_again(
    face: Face, readers: Readers, nursery: trio.Nursery
) -> None:
    nursery.start_soon(readers.run)
    face.gate = trio.Event()
    reader = Reader(readers)
    await reader.send(mkdir(2, b"one") + mkdir(4, b"two") + mkdir(6, b"cut")[:-2])
    reader.sock.close()
    # What it had taken: the last one that it handed on, perhaps without having noted that, and the one in part.
    successor = Reader(readers, clone=reader, kept=2)
    await successor.send(mkdir(4, b"two") + mkdir(6, b"cut"))
    await trio.testing.wait_all_tasks_blocked()
    assert face.done == [b"one", b"two", b"cut"]
    face.gate.set()
    assert {(await reader.reply())[8] for _ in range(3)} == {2, 4, 6}
    assert readers.counts()["readers"] == 1
    nursery.cancel_scope.cancel()
    successor.close()
    reader.close()


@pytest.mark.parametrize("kept", [0, 1])
async def test_what_the_kernel_resends_is_begun_although_it_was_the_last_that_was_handed_on(
    face: Face, readers: Readers, nursery: trio.Nursery, kept: int
) -> None:
    """After three quick deaths slots are cleared, and what had been resent before comes again with the same unique."""
    nursery.start_soon(readers.run)
    reader = Reader(readers)
    await reader.send(mkdir(4, b"last"))
    await reader.reply()
    reader.sock.close()
    successor = Reader(readers, clone=reader, kept=kept)
    await successor.send(mkdir(4, b"last") * (1 + kept))
    assert (await successor.reply())[8] == 4
    assert face.done == [b"last", b"last"]
    nursery.cancel_scope.cancel()
    successor.close()
    reader.close()


async def test_no_more_is_begun_than_there_is_room_for(face: Face, readers: Readers, nursery: trio.Nursery) -> None:
    nursery.start_soon(readers.run)
    face.gate = trio.Event()
    reader = Reader(readers)
    await reader.send(b"".join(mkdir(2 * number + 2, b"name") for number in range(9)))
    await trio.testing.wait_all_tasks_blocked()
    assert len(face.done) == 4
    face.gate.set()
    assert len({(await reader.reply())[8] for _ in range(9)}) == 9
    nursery.cancel_scope.cancel()
    reader.close()


@pytest.mark.parametrize(("kept", "data"), [(0, bytes(8)), (SLOTS + 1, b"")])
async def test_what_is_no_request_ends_the_server(readers: Readers, kept: int, data: bytes) -> None:
    with pytest.RaisesGroup(errors.InternalError, allow_unwrapped=True, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readers.run)
            reader = Reader(readers, kept=kept)
            await reader.send(data)
    reader.close()
