"""What readers tell of an image's attributes is what the server would answer to the same request, byte for byte."""

import copy
import mmap
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.cache.reader_table import ReaderTable, new_table
from basefs.catalog.records import ImageEntry
from basefs.core import fuse_wire as wire
from basefs.core.fuse_wire import Opcode, SetattrValid, request_of
from basefs.core.inodes import image_handle, image_inode
from basefs.fuse import forwarded
from basefs.fuse.image_files import ImageFiles
from basefs.fuse.operations import Operations
from basefs.reader_attributes import AttributeCells
from basefs.reader_layout import CELL, CELL_BYTES, CELLS, CELLS_AT, TABLE_BYTES

NUMBER = 7
INODE = image_inode(NUMBER)
SIZE = 1 << 30
NS = 10**9
MEMORY = bytearray(TABLE_BYTES)


class Server:
    """The server's side of one image; `cells` is None for one that tells readers nothing."""

    def __init__(self, entry: Any, cells: AttributeCells | None) -> None:
        self.entry = entry
        catalog: Any = SimpleNamespace(by_number={NUMBER: entry}.get)
        opens: Any = SimpleNamespace(all_handles=dict, opened=lambda *_, **__: False, set_unlinked=lambda *_, **__: 0)
        settings: Any = SimpleNamespace(owner_uid=11, owner_gid=12, guest_uids=frozenset([0]), lookup_deadline_s=1)
        gate: Any = SimpleNamespace(knows_view=lambda _entry: True)
        self.images = ImageFiles(catalog, gate, Handler(), settings, Any, opens, stored=self.stored, cells=cells)
        self.images.told.take_over(catalog.by_number)
        nothing: Any = SimpleNamespace(hits={}, owns=lambda _inode: False)
        self.face = Operations(nothing, self.images, nothing, nothing)

    async def stored(self, entry: ImageEntry) -> None:
        self.touch()
        await trio.lowlevel.checkpoint()

    def touch(self) -> None:
        """As `StateDatabase.touch`."""
        self.images.told.changed(self.entry)

    async def answer(self, opcode: int, body: bytes = b"") -> bytes:
        raw = wire.IN_HEADER.pack(wire.IN_HEADER.size + len(body), opcode, 2, INODE, 0, 0, 1, 0, 0) + body
        return b"".join(map(bytes, await forwarded.answer(self.face, request_of(memoryview(raw)))))


class Handler:
    """One image, which is open."""

    hit = None

    def restore_opens(self, _handles: object) -> None:
        """None."""

    def open_handles(self, _entry: object) -> int:
        return 1

    def warm(self, _entry: object) -> None:
        """Not here."""

    async def fetch_image(self, _entry: object) -> "Handler":
        return self


def new_entry() -> Any:
    local = SimpleNamespace(
        used_at_ns=None, mtime_ns=None, atime_ns=None, uid=None, gid=None, mode=None, cached_bytes=0, pinned=False,
        is_graduated=False, is_wanted=False,
    )  # fmt: skip
    return SimpleNamespace(number=NUMBER, image_id="image", shown_size=SIZE, local=local)


class Table:
    """The table as the server has it, and as a reader does."""

    def __init__(self) -> None:
        self.table = ReaderTable(new_table())
        self.written = AttributeCells(self.table.words)
        self._seen = mmap.mmap(self.table.fd, TABLE_BYTES, prot=mmap.PROT_READ)
        self.seen = AttributeCells(memoryview(self._seen))

    def close(self) -> None:
        os.close(self.table.fd)


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.close()


TIMES = st.integers(-(2**33), 2**33)
STEPS = st.one_of(
    st.tuples(st.just("utime"), TIMES, st.integers(0, NS - 1)),
    st.tuples(st.just("own"), st.integers(0, 2**32 - 1), st.integers(0, 0o7777)),
    st.tuples(st.just("cached"), st.integers(0, SIZE), st.just(0)),
    *(st.tuples(st.just(kind), st.just(0), st.just(0)) for kind in ("getattr", "open", "unlink", "next", "lost")),
)


def setattr_body(valid: int, *, time_s: int = 0, time_ns: int = 0, mode: int = 0, owner: int = 0) -> bytes:
    times = (time_s, time_s - 1, 0, time_ns, NS - 1 - time_ns, 0)
    return wire.SETATTR_IN.pack(valid, 0, 0, 0, 0, *times, mode, 0, owner, owner ^ 1, 0)


async def do(server: Server, kind: str, first: int, second: int) -> None:
    if kind == "utime":
        valid = SetattrValid.ATIME | SetattrValid.MTIME
        await server.answer(Opcode.SETATTR, setattr_body(valid, time_s=first, time_ns=second))
    elif kind == "own":
        valid = SetattrValid.MODE | SetattrValid.UID | SetattrValid.GID
        await server.answer(Opcode.SETATTR, setattr_body(valid, mode=second, owner=first))
    elif kind == "cached":
        server.entry.local.cached_bytes = first
        server.touch()
    elif kind == "getattr":
        await server.answer(Opcode.GETATTR, bytes(16))
    elif kind == "open":
        await server.answer(Opcode.OPEN, wire.OPEN_IN.pack(os.O_RDONLY, 0))
    else:
        await server.images.unlink(server.entry)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_what_is_told_is_what_the_server_answers(steps: list[tuple[str, int, int]]) -> None:
    async def run() -> None:
        table = Table()
        server = Server(new_entry(), table.written)
        lost = copy.deepcopy(server.entry)
        for kind, first, second in steps:
            if kind in ("next", "lost"):
                # Another server over the same state, or over what was noted when the last one began.
                server = Server(copy.deepcopy(lost if kind == "lost" else server.entry), table.written)
                lost = copy.deepcopy(server.entry)
            else:
                await do(server, kind, first, second)
            told = table.seen.get(INODE)
            assert (told is not None) >= (kind in ("getattr", "open") and server.entry.local.used_at_ns is not None)
            if told is not None:
                assert await Server(server.entry, None).answer(Opcode.GETATTR, bytes(16)) == (
                    wire.reply_header(2, len(told)) + told
                )
        table.close()

    trio.run(run)


async def test_a_change_is_told_before_it_is_stored_and_so_before_it_is_answered(table: Table) -> None:
    server = Server(new_entry(), table.written)
    server.entry.local.used_at_ns = 1
    await server.answer(Opcode.GETATTR, bytes(16))
    before = table.seen.get(INODE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(do, server, "utime", 9, 9)
        await trio.testing.wait_all_tasks_blocked()
    assert table.seen.get(INODE) not in (None, before)


def test_an_image_whose_times_are_those_of_the_question_is_the_servers(table: Table) -> None:
    server = Server(new_entry(), table.written)
    trio.run(server.answer, Opcode.GETATTR, bytes(16))
    assert table.seen.get(INODE) is None


def test_what_is_told_of_an_image_that_the_next_server_does_not_know_is_told_no_more(table: Table) -> None:
    other = image_inode(NUMBER + 1)
    table.written.put(other, bytes(104))
    Server(new_entry(), table.written)
    assert table.seen.inodes() == []


@settings(deadline=None)
@given(st.binary(min_size=104, max_size=104), st.binary(min_size=104, max_size=104), st.integers(0, CELL.size))
def test_a_cell_that_is_read_while_it_is_written_is_one_of_both_or_nothing(old: bytes, new: bytes, cut: int) -> None:
    memory = memoryview(MEMORY)
    cells = AttributeCells(memory)
    at = CELLS_AT + INODE % CELLS * CELL_BYTES
    place = memory[at : at + CELL.size]
    cells.put(INODE, old)
    before = bytes(place)
    cells.put(INODE, new)
    after = bytes(place)
    for first, second in ((after, before), (before, after)):
        place[:] = first[:cut] + second[cut:]
        assert cells.get(INODE) in (old, new, None)


def test_two_images_with_one_cell_never_have_each_others_attributes(table: Table) -> None:
    other = INODE + CELLS
    table.written.put(INODE, b"a" * 104)
    table.written.put(other, b"b" * 104)
    assert (table.seen.get(INODE), table.seen.get(other)) == (None, b"b" * 104)
    table.written.clear(INODE)
    assert table.seen.get(other) == b"b" * 104
    table.written.clear(other)
    assert table.seen.get(other) is None


@pytest.mark.parametrize("is_guest", [False, True])
def test_only_an_images_handle_is_its_inode(is_guest: bool) -> None:
    """What readers know the FLUSH of an image by: see `basefs.reader`."""
    assert image_handle(NUMBER, is_guest=is_guest) >> 1 == INODE
