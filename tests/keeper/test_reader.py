"""A reader without a kernel: the test is /dev/fuse, the keeper and the server."""

import array
import gc
import json
import mmap
import os
import queue
import random
import select
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from basefs.cache.reader_table import Entry, ReaderTable, new_table
from basefs.core import fuse_wire as wire
from basefs.keeper_reader_process import Place, clear_slots, taken_slots
from basefs.reader import PUT_OFF_A_BURST, PUT_OFF_MAX, Reader
from basefs.reader_attributes import AttributeCells
from basefs.reader_inflate import Inflater
from basefs.reader_layout import (
    ATTRIBUTES,
    CLOSE,
    FILE,
    FORWARDED,
    HIT_BYTES,
    HITS,
    IMAGE,
    KEPT,
    MESSAGE,
    SLOTS,
    SLOTS_BYTES,
    SWEEP,
    TABLE,
    VOLUME,
    packed_word,
)

HEADER = wire.IN_HEADER.size
INODE = (1 << 32) + 7
HANDLE = INODE << 1
SIZE = 40_000
CHUNK_SHIFT = 14
CONTENT = random.Random(1).randbytes(SIZE)
PATIENCE_S = 20.0
SILENCE_S = 0.1
SO_SNDBUFFORCE = 32
FUSE_UNIQUE_RESEND = 1 << 63


class Rig:
    """One reader in a thread, and our ends of its fds. The clone is a socket, so every request is ours to answer."""

    def __init__(self, directory: Path, slots_fd: int | None = None) -> None:
        self.directory = directory
        self.kernel, self._clone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._clone.setblocking(False)
        for sock in (self.kernel, self._clone):
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
        if slots_fd is None:
            slots_fd = os.memfd_create("slots")
            os.ftruncate(slots_fd, SLOTS_BYTES)
        self.slots_fd = slots_fd
        self.kernel.settimeout(PATIENCE_S)
        self.keeper.settimeout(PATIENCE_S)
        self._reader = Reader(clone_fd=self._clone.fileno(), slots_fd=slots_fd, keeper_fd=theirs.detach())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.server: socket.socket | None = None
        self.table = ReaderTable(new_table())

    def _run(self) -> None:
        with pytest.raises(SystemExit):
            self._reader.run()

    def heard(self) -> dict[str, object]:
        message: dict[str, object] = json.loads(self.keeper.recv(4096))
        return message

    def new_server(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        socket.send_fds(self.keeper, [b'{"type": "server"}'], [theirs.fileno()])
        theirs.close()
        self.server = ours
        self.tell(TABLE, [self.table.fd])
        (self.kept,) = KEPT.unpack(self.handed_on(KEPT.size))

    def tell(self, kind: int, fds: list[int], entry: Entry | None = None, *, inode: int = 0) -> None:
        assert self.server is not None
        rest = (inode, 0, 0, 0, 0) if entry is None else (INODE, entry.word, entry.serial, SIZE, 0)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.server.sendmsg([MESSAGE.pack(kind, CHUNK_SHIFT, *rest)], rights)
        self.settle()

    def settle(self) -> None:
        """The reader has read what was sent before: one ping may be heard before what came with it, no second one."""
        for number in range(2):
            self.keeper.send(b'{"type": "ping", "n": %d}' % number)
            assert self.heard() == {"type": "pong", "n": number}

    def handed_on(self, length: int) -> bytes:
        assert self.server is not None
        data = b""
        while len(data) < length:
            data += self.server.recv(length - len(data))
        return data

    def is_silent(self) -> bool:
        """Nothing comes from the reader, neither to the kernel nor to the server."""
        watched = [sock for sock in (self.kernel, self.server) if sock is not None]
        return not select.select(watched, [], [], SILENCE_S)[0]

    def counters(self) -> list[int]:
        return list(memoryview(mmap.mmap(self.slots_fd, 4096)).cast("Q")[:4])

    def end(self) -> None:
        if self.server is not None:
            self.server.close()
        self.keeper.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        for sock in (self._reader._server, self._reader._keeper):  # its process would be gone
            if sock is not None:
                sock.close()
        self.kernel.close()
        self._clone.close()
        os.close(self.table.fd)
        # Its memory and epoll have fds, too, and other tests count the open ones.
        del self._reader
        gc.collect()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.end()


def read_of(unique: int, offset: int, size: int, handle: int = HANDLE) -> bytes:
    body = wire.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
    return wire.IN_HEADER.pack(HEADER + len(body), 15, unique, INODE, 0, 0, 1, 0, 0) + body


def lookup_of(unique: int) -> bytes:
    return wire.IN_HEADER.pack(HEADER + 5, 1, unique, 1, 0, 0, 1, 0, 0) + b"name\0"


class SharedImage:
    """An image of three chunks as the server shares it."""

    def __init__(self, rig: Rig) -> None:
        file = rig.directory / "data"  # a memfd cannot tell what is in memory
        file.write_bytes(CONTENT)
        self.data_fd = os.open(file, os.O_RDONLY)
        ready_fd = os.memfd_create("ready")
        os.write(ready_fd, b"\1\1\1")
        self.ready = memoryview(mmap.mmap(ready_fd, 3))
        entry = rig.table.list(7)
        assert entry is not None
        self.entry = entry
        rig.tell(IMAGE, [self.data_fd, ready_fd], entry)
        os.close(ready_fd)


def test_hits_are_answered_and_everything_else_is_handed_on(rig: Rig) -> None:
    rig.new_server()
    image = SharedImage(rig)
    for unique, (offset, size) in enumerate([(0, 4096), (20_000, 16_000), (16_000, 1 << 20), (39_999, 5)]):
        rig.kernel.send(read_of(2 * unique + 2, offset, size))
        wanted = CONTENT[offset : offset + size]
        assert rig.kernel.recv(1 << 20) == wire.reply_header(2 * unique + 2, len(wanted)) + wanted
    image.ready[1] = 2
    others = [
        lookup_of(10),
        read_of(12, SIZE, 10),
        read_of(14, 16_384, 10),
        read_of(16, 0, 10, handle=1 << 41),
        read_of(18, 0, (1 << 20) + 4096),
    ]
    for other in others:
        rig.kernel.send(other)
    assert rig.handed_on(sum(map(len, others))) == b"".join(others)
    rig.kernel.send(wire.IN_HEADER.pack(HEADER + 8, 36, 21, 0, 0, 0, 0, 0, 0) + struct.pack("<Q", 20))
    rig.settle()
    assert rig.is_silent()
    served = [0] * 4
    served[HITS], served[HIT_BYTES], served[FORWARDED] = 4, 4096 + 16_000 + 24_000 + 1, len(others)
    assert rig.counters() == served
    assert taken_slots(Place(0, rig.slots_fd)) == []


class PackedImage:
    """A disk of compressed clusters, of 8 KiB each, as the server shares it."""

    BITS = 13

    def __init__(self, rig: Rig, clusters: int) -> None:
        self.disk = b"".join(random.Random(seed).randbytes(4096) * 2 for seed in range(clusters))
        stored, words = b"", []
        for at in range(0, len(self.disk), 1 << self.BITS):
            deflate = zlib.compressobj(6, zlib.DEFLATED, -12)
            packed = deflate.compress(self.disk[at : at + (1 << self.BITS)]) + deflate.flush()
            words.append(packed_word(len(stored), len(packed), self.BITS))
            stored += packed
        path = rig.directory / "packed"
        path.write_bytes(stored)
        data_fd = os.open(path, os.O_RDONLY)
        ready_fd, map_fd = os.memfd_create("ready"), os.memfd_create("map")
        os.write(ready_fd, bytes([1]) * (-(-len(stored) >> CHUNK_SHIFT)))
        os.write(map_fd, struct.pack(f"<{len(words)}Q", *words))
        entry = rig.table.list(8)
        assert entry is not None
        self.entry = entry
        assert rig.server is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [data_fd, ready_fd, map_fd]))]
        message = MESSAGE.pack(IMAGE, CHUNK_SHIFT, INODE + 1, entry.word, entry.serial, len(self.disk), self.BITS)
        rig.server.sendmsg([message], rights)
        for fd in (data_fd, ready_fd, map_fd):
            os.close(fd)
        rig.settle()

    def read(self, unique: int, cluster: int) -> bytes:
        return read_of(unique, cluster << self.BITS, 100, HANDLE + 2)

    def answer(self, unique: int, cluster: int) -> bytes:
        at = cluster << self.BITS
        return wire.reply_header(unique, 100) + self.disk[at : at + 100]


class Gate:
    """Holds a reader up before each cluster that it inflates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._passes: queue.SimpleQueue[None] = queue.SimpleQueue()
        inflate = Inflater.inflate

        def held(*arguments: Any) -> None:
            self._reached.put(None)
            self._passes.get(timeout=PATIENCE_S)
            inflate(*arguments)

        monkeypatch.setattr(Inflater, "inflate", held)

    def wait(self) -> None:
        """Until the reader has come to the next cluster."""
        self._reached.get(timeout=PATIENCE_S)

    def open(self, clusters: int = 100) -> None:
        """Let it inflate so many."""
        for _ in range(clusters):
            self._passes.put(None)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def test_what_is_to_be_inflated_waits_for_what_is_not_and_what_is_too_much_is_handed_on(rig: Rig, gate: Gate) -> None:
    rig.new_server()
    SharedImage(rig)
    many = 1 + PUT_OFF_MAX + 20
    packed = PackedImage(rig, many)
    rig.kernel.send(packed.read(2, 0))
    gate.wait()
    for cluster in range(1, many):
        rig.kernel.send(packed.read(2 * cluster + 2, cluster))
    rig.kernel.send(read_of(1000, 0, 100))
    gate.open()
    answers = []
    while not answers or answers[-1][8:16] != struct.pack("<Q", 1000):
        answers.append(rig.kernel.recv(1 << 20))
    assert answers[-1] == wire.reply_header(1000, 100) + CONTENT[:100]
    before = len(answers) - 1
    # Of each burst PUT_OFF_A_BURST are put off, and one is done; once PUT_OFF_MAX wait the rest is handed on.
    assert before < PUT_OFF_MAX // (PUT_OFF_A_BURST - 1) + 2
    served = before + PUT_OFF_MAX
    assert answers[:-1] == [packed.answer(2 * cluster + 2, cluster) for cluster in range(before)]
    for cluster in range(before, served):
        assert rig.kernel.recv(1 << 20) == packed.answer(2 * cluster + 2, cluster)
    rest = b"".join(packed.read(2 * cluster + 2, cluster) for cluster in range(served, many))
    assert rig.handed_on(len(rest)) == rest
    rig.settle()
    assert rig.is_silent()
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_what_waits_to_be_inflated_when_another_server_comes_is_handed_on(rig: Rig, gate: Gate) -> None:
    rig.new_server()
    packed = PackedImage(rig, 4)
    rig.kernel.send(packed.read(2, 0))
    gate.wait()
    for cluster in range(1, 4):
        rig.kernel.send(packed.read(2 * cluster + 2, cluster))
    gate.open(1)
    gate.wait()
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    socket.send_fds(rig.keeper, [b'{"type": "server"}'], [theirs.fileno()])
    theirs.close()
    gate.open()
    assert rig.kernel.recv(1 << 20) == packed.answer(2, 0)
    rig.server, before = ours, rig.server
    # Three had been taken; one of them is done, and then the keeper is heard.
    assert rig.kernel.recv(1 << 20) == packed.answer(4, 1)
    asked = [rig.kernel.recv(100) for _ in range(2)]
    assert sorted(asked) == [struct.pack("<IiQ", 16, -4, unique | 1) for unique in (6, 8)]
    assert rig.handed_on(KEPT.size) == KEPT.pack(2)
    assert rig.handed_on(2 * len(packed.read(2, 0))) == packed.read(6, 2) + packed.read(8, 3)
    assert before is not None
    before.close()
    rig.settle()
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_an_image_that_is_revoked_while_its_read_waits_is_handed_on(rig: Rig, gate: Gate) -> None:
    rig.new_server()
    packed = PackedImage(rig, 2)
    rig.kernel.send(packed.read(2, 0))
    gate.wait()
    rig.kernel.send(packed.read(4, 1))
    gate.open(1)
    gate.wait()
    assert rig.kernel.recv(1 << 20) == packed.answer(2, 0)
    rig.kernel.send(packed.read(6, 0))
    packed.entry.revoke()
    gate.open()
    rest = packed.read(4, 1) + packed.read(6, 0)
    assert rig.handed_on(len(rest)) == rest
    rig.tell(SWEEP, [])
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_a_revoked_image_is_handed_on_and_its_files_are_closed(rig: Rig) -> None:
    rig.new_server()
    image = SharedImage(rig)
    status = os.fstat(image.data_fd)
    os.close(image.data_fd)
    image.entry.revoke()
    rig.kernel.send(read_of(2, 0, 10))
    assert rig.handed_on(len(read_of(2, 0, 10))) == read_of(2, 0, 10)
    rig.tell(SWEEP, [])
    open_now = {(found.st_dev, found.st_ino) for fd in os.listdir("/proc/self/fd") if (found := _stat(int(fd)))}
    assert (status.st_dev, status.st_ino) not in open_now


def _stat(fd: int) -> os.stat_result | None:
    try:
        return os.fstat(fd)
    except OSError:
        return None


def test_without_a_server_hits_go_on_and_the_rest_waits_for_the_next_one(rig: Rig) -> None:
    rig.new_server()
    SharedImage(rig)
    assert rig.server is not None
    rig.server.close()
    rig.server = None
    for number in range(5):
        rig.kernel.send(lookup_of(2 * number + 100))
        rig.kernel.send(read_of(2 * number + 2, 0, 4096))
        assert rig.kernel.recv(1 << 20) == wire.reply_header(2 * number + 2, 4096) + CONTENT[:4096]
    rig.settle()
    assert len(taken_slots(Place(0, rig.slots_fd))) == 5
    rig.new_server()
    # It asks the kernel for each whether it still waits; a socket takes every answer.
    asked = [rig.kernel.recv(100) for _ in range(5)]
    assert sorted(asked) == sorted(struct.pack("<IiQ", 16, -4, 2 * number + 101) for number in range(5))
    handed = b"".join(lookup_of(2 * number + 100) for number in range(5))
    assert rig.handed_on(len(handed)) == handed
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_a_successor_goes_on_with_what_was_taken_and_no_more_than_the_slots_hold_is_taken(rig: Rig) -> None:
    for number in range(SLOTS + 3):
        rig.kernel.send(lookup_of(2 * number + 2))
    while len(taken_slots(Place(0, rig.slots_fd))) < SLOTS:
        rig.settle()
    assert len(taken_slots(Place(0, rig.slots_fd))) == SLOTS
    successor = Rig(rig.directory, rig.slots_fd)
    try:
        successor.new_server()
        assert successor.kept == SLOTS
        length = len(lookup_of(2))
        uniques = {int.from_bytes(successor.handed_on(length)[8:16], "little") for _ in range(SLOTS)}
        assert uniques == {2 * number + 2 for number in range(SLOTS)}
        successor.settle()
        assert taken_slots(Place(0, rig.slots_fd)) == []
    finally:
        successor.end()


def test_what_was_resent_twice_before_it_could_be_handed_on_is_handed_on_once(rig: Rig) -> None:
    resent = lookup_of(2 | FUSE_UNIQUE_RESEND)
    for request in (lookup_of(2), resent, lookup_of(4), resent):
        rig.kernel.send(request)
    rig.settle()
    rig.new_server()
    assert sorted([rig.handed_on(len(resent)) for _ in range(3)]) == sorted([lookup_of(2), resent, lookup_of(4)])
    rig.kernel.send(lookup_of(6))
    assert rig.handed_on(len(resent)) == lookup_of(6), "and nothing comes before it"
    rig.settle()
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_a_forget_that_was_kept_is_handed_on_although_no_answer_to_it_is_waited_for(rig: Rig) -> None:
    body = wire.LOOKUP_COUNT.pack(3)
    forget = wire.IN_HEADER.pack(HEADER + len(body), wire.Opcode.FORGET, 2, INODE, 0, 0, 0, 0, 0) + body
    rig.kernel.send(forget)
    rig.settle()
    rig.new_server()
    assert rig.handed_on(len(forget)) == forget
    assert not select.select([rig.kernel], [], [], 0)[0], "it did not ask the kernel"


def test_a_server_that_takes_nothing_loses_nothing_and_a_stop_waits_for_what_is_held(rig: Rig) -> None:
    rig.new_server()
    # More than a socket takes at once. One datagram of 1 MiB needs as much memory in one piece: ENOBUFS, now and then.
    body = wire.READ_IN.pack(9, 0, 1 << 16, 0, 0, 0, 0) + bytes(1 << 16)
    writes = [
        wire.IN_HEADER.pack(HEADER + len(body), 16, 2 * number + 2, INODE, 0, 0, 1, 0, 0) + body for number in range(16)
    ]
    for write in writes:
        rig.kernel.send(write)
    rig.settle()
    rig.keeper.send(b'{"type": "stop"}')
    rig.settle()
    assert taken_slots(Place(0, rig.slots_fd))
    assert rig.handed_on(sum(map(len, writes))) == b"".join(writes)
    rig._thread.join(PATIENCE_S)
    assert not rig._thread.is_alive()
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_slots_are_cleared(tmp_path: Path) -> None:
    fd = os.memfd_create("slots")
    os.ftruncate(fd, SLOTS_BYTES)
    rig = Rig(tmp_path, fd)
    rig.kernel.send(lookup_of(2))
    rig.settle()
    rig.end()
    place = Place(0, fd)
    assert taken_slots(place) == [0]
    clear_slots(place)
    assert taken_slots(place) == []
    os.close(fd)


def test_open_lower_files_are_read_through_until_they_are_released(rig: Rig) -> None:
    rig.new_server()
    assert rig.server is not None
    handle = 1 << 41 | 1
    path = rig.directory / "lower"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    status = os.fstat(fd)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    rig.server.sendmsg([MESSAGE.pack(FILE, 0, handle, 0, 0, 0, 0)], rights)
    os.close(fd)
    rig.settle()
    rig.kernel.send(read_of(2, 100, 4096, handle))
    assert rig.kernel.recv(1 << 20) == wire.reply_header(2, 4096) + CONTENT[100:4196]
    others = [read_of(4, SIZE - 10, 4096, handle), read_of(6, 0, 10, handle - 1), read_of(8, 0, 10, handle + 1)]
    for other in others:  # its end is the server's affair; handles are not inodes
        rig.kernel.send(other)
    assert rig.handed_on(sum(map(len, others))) == b"".join(others)
    rig.tell(CLOSE, [], None, inode=handle)
    open_now = {(found.st_dev, found.st_ino) for one in os.listdir("/proc/self/fd") if (found := _stat(int(one)))}
    assert (status.st_dev, status.st_ino) not in open_now
    rig.kernel.send(read_of(10, 0, 10, handle))
    assert rig.handed_on(len(others[0])) == read_of(10, 0, 10, handle)


def test_an_image_that_is_a_file_is_served_until_it_is_revoked(rig: Rig) -> None:
    rig.new_server()
    path = rig.directory / "graduated"
    path.write_bytes(CONTENT)
    entry = rig.table.list(7)
    assert entry is not None
    fd = os.open(path, os.O_RDONLY)
    rig.tell(IMAGE, [fd], entry)
    os.close(fd)
    rig.kernel.send(read_of(2, 20_000, 4096))
    assert rig.kernel.recv(1 << 20) == wire.reply_header(2, 4096) + CONTENT[20_000:24_096]
    entry.revoke()
    rig.kernel.send(read_of(4, 0, 10))
    assert rig.handed_on(len(read_of(4, 0, 10))) == read_of(4, 0, 10)


def getattr_of(unique: int, inode: int = INODE) -> bytes:
    return wire.IN_HEADER.pack(HEADER + 16, 3, unique, inode, 0, 0, 1, 0, 0) + bytes(16)


def flush_of(unique: int, inode: int, handle: int) -> bytes:
    body = wire.FLUSH_IN.pack(handle, 0, 0, 0)
    return wire.IN_HEADER.pack(HEADER + len(body), 25, unique, inode, 0, 0, 1, 0, 0) + body


def test_attributes_are_told_as_the_table_has_them_with_and_without_a_server(rig: Rig) -> None:
    told = random.Random(2).randbytes(104)
    rig.kernel.send(getattr_of(2))  # nobody has told it where to look
    rig.settle()
    rig.new_server()
    assert rig.kernel.recv(100) == struct.pack("<IiQ", 16, -4, 3)
    assert rig.handed_on(HEADER + 16) == getattr_of(2)
    cells = AttributeCells(rig.table.words)
    cells.put(INODE, told)
    rig.kernel.send(getattr_of(4))
    assert rig.kernel.recv(1 << 20) == wire.reply_header(4, 104) + told
    rig.kernel.send(getattr_of(6, INODE + 1))
    assert rig.handed_on(HEADER + 16) == getattr_of(6, INODE + 1)
    assert rig.server is not None
    rig.server.close()
    rig.server = None
    rig.kernel.send(getattr_of(8))
    assert rig.kernel.recv(1 << 20) == wire.reply_header(8, 104) + told
    rig.new_server()
    cells.clear(INODE)
    rig.kernel.send(getattr_of(10))
    assert rig.handed_on(HEADER + 16) == getattr_of(10)
    rig.settle()
    assert rig.counters()[ATTRIBUTES] == 2
    assert taken_slots(Place(0, rig.slots_fd)) == []


def test_the_close_of_an_image_is_answered_and_that_of_any_other_file_handed_on(rig: Rig) -> None:
    rig.kernel.send(flush_of(2, INODE, HANDLE | 1))
    assert rig.kernel.recv(1 << 20) == wire.error_reply(2, 0)
    rig.new_server()
    lower = 1 << 63 | 5
    for unique, (inode, handle) in enumerate([(lower, 1 << 41), (5, 5 << 16 | 1), (INODE, 1 << 41)]):
        other = flush_of(2 * unique + 4, inode, handle)
        rig.kernel.send(other)
        assert rig.handed_on(len(other)) == other


def test_a_volume_is_closed_and_then_its_lease_once_it_is_revoked(rig: Rig) -> None:
    rig.new_server()
    path = rig.directory / "volume"
    path.write_bytes(CONTENT)
    entry = rig.table.list(7)
    assert entry is not None
    end, lease = os.pipe()
    fd = os.open(path, os.O_RDONLY)
    rig.tell(VOLUME, [lease, fd], entry)
    os.close(fd)
    os.close(lease)
    rig.kernel.send(read_of(2, 20_000, 4096))
    assert rig.kernel.recv(1 << 20) == wire.reply_header(2, 4096) + CONTENT[20_000:24_096]
    assert not select.select([end], [], [], 0)[0]
    entry.revoke()
    rig.kernel.send(read_of(4, 0, 10))
    assert rig.handed_on(len(read_of(4, 0, 10))) == read_of(4, 0, 10)
    rig.tell(SWEEP, [])
    assert os.read(end, 1) == b"", "nobody has the lease any more"
    os.close(end)
    status = path.stat()
    open_now = {(found.st_dev, found.st_ino) for one in os.listdir("/proc/self/fd") if (found := _stat(int(one)))}
    assert (status.st_dev, status.st_ino) not in open_now
