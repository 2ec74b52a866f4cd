"""What a reader serves of an image are its bytes, whatever the server does before, during and after its read."""

import gc
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs import reader_images
from basefs.cache.chunk_file import ChunkFile, open_chunk_file
from basefs.cache.reader_table import ReaderTable, Share, new_table
from basefs.core.chunk_map import ChunkMapHeader
from basefs.reader_images import Image
from basefs.reader_inflate import Inflater
from basefs.reader_layout import TABLE_ENTRIES, packed_word

CHUNK = 16 * 1024
CHUNKS = 5
SIZE = CHUNKS * CHUNK - 1000
NUMBER = 7
CLUSTER_BITS = 13
CONTENT = random.Random(0).randbytes(SIZE)
HEADER = ChunkMapHeader(image_id="image", size=SIZE, chunk_bytes=CHUNK)


class Server:
    """The server's side of one image, as `ledger` and `image_eviction` order it; and the next server's."""

    def __init__(self, directory: Path, content: bytes = CONTENT) -> None:
        self._directory = directory
        self._content = content
        self._files: list[ChunkFile] = []
        self.table_fd = new_table()
        self.table = ReaderTable(self.table_fd)
        self.file: ChunkFile
        self._open()

    def _open(self) -> None:
        self.file, _ = open_chunk_file(self._directory, NUMBER, HEADER)
        self._files.append(self.file)

    def share(self) -> Share:
        share = self.file.share(NUMBER, self.table)
        assert share is not None
        return share

    def fetch(self, index: int) -> None:
        start = index * CHUNK
        self.file.write_piece(start, self._content[start : start + CHUNK])
        self.file.mark_ready(index)

    def evict(self, index: int) -> None:
        self.file.mark_not_ready(index)
        self.file.drop([index])

    def refetch(self, index: int) -> None:
        """As if nothing had been: ready before and after."""
        self.evict(index)
        self.fetch(index)

    def damage(self, index: int) -> None:
        """Sealed, then other bytes, as a quarantine's refetch may have them for a while."""
        self.file.mark_none_ready()
        os.pwrite(self.file.data_fd, b"\xff" * min(CHUNK, SIZE - index * CHUNK), index * CHUNK)

    def age(self, _index: int) -> None:
        self.file.age_all()

    def reopen(self, index: int) -> None:
        """The image is closed and used anew: its bytes go, the reader has not heard of it."""
        self._files.remove(self.file)
        self.file.close()
        self._open()
        self.file.drop([index])

    def die(self, index: int) -> None:
        """Killed; the next server opens the file and evicts, and nobody has told the reader."""
        self.table = ReaderTable(self.table_fd)
        self.table.revoke_inherited(NUMBER)
        self._open()
        self.file.drop([index])

    def close(self) -> None:
        for file in self._files:
            file.close()
        os.close(self.table_fd)
        gc.collect()  # mappings keep fds of their own


OPERATIONS = (
    Server.fetch, Server.fetch, Server.fetch, Server.evict, Server.refetch, Server.damage, Server.age, Server.reopen,
    Server.die,
)  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, CHUNKS - 1)), max_size=4)
READS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), STEPS, STEPS, STEPS, STEPS)


def image_of(share: Share, table: ReaderTable) -> Image:
    fds = [os.dup(share.data_fd), os.dup(share.ready_fd)]
    return Image(table.words, share.entry, share.serial, share.size, share.chunk_shift, fds, 0, Inflater())


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def do(server: Server, steps: list[tuple[Callable[[Server, int], None], int]]) -> None:
    for operation, index in steps:
        operation(server, index)


@settings(max_examples=60, deadline=None)
@given(st.lists(READS, min_size=1, max_size=6))
def test_what_is_served_is_right(reads: list[tuple[int, int, list, list, list, list]]) -> None:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        server = Server(Path(name))
        for index in range(CHUNKS):
            server.fetch(index)
        image = image_of(server.share(), server.table)
        try:
            for offset, length, before, first, second, after in reads:
                do(server, before)

                def torn(fd: int, targets: list[memoryview], at: int, _flags: int) -> int:
                    """A read in two halves, with the server at work around and between them."""
                    (target,) = targets
                    half = len(target) // 2
                    do(server, first)  # noqa: B023
                    done = os.preadv(fd, [target[:half]], at) if half else 0
                    do(server, second)  # noqa: B023
                    done += os.preadv(fd, [target[half:]], at + half)
                    do(server, after)  # noqa: B023
                    return done

                patch.setattr(reader_images, "_preadv", torn)
                end = min(SIZE, offset + length)
                target = memoryview(bytearray(end - offset))
                if image.read_into(target, offset, end):
                    assert target == CONTENT[offset:end]
                if image.is_revoked:
                    image.close()
                    image = image_of(server.share(), server.table)
        finally:
            image.close()
            server.close()


def packed_disk() -> tuple[bytes, bytes, list[int]]:
    """Stored bytes as large as CONTENT, the disk of compressed clusters in them, and its map."""
    chance = random.Random(3)
    stored, disk, words = bytearray(SIZE), b"", []
    at = CHUNK // 2
    for _ in range(6):
        cluster = chance.randbytes(1 << CLUSTER_BITS - 1) * 2
        deflate = zlib.compressobj(6, zlib.DEFLATED, -12)
        packed = deflate.compress(cluster) + deflate.flush()
        stored[at : at + len(packed)] = packed
        words.append(packed_word(at, len(packed), CLUSTER_BITS))
        disk += cluster
        at += len(packed) + chance.randrange(CHUNK // 4)
    return bytes(stored), disk, words


PACKED_READS = st.tuples(st.integers(0, 5 << CLUSTER_BITS), st.integers(1, 2 << CLUSTER_BITS), *[STEPS] * 5)


@settings(max_examples=25, deadline=None)
@given(st.lists(PACKED_READS, min_size=1, max_size=6))
def test_what_is_inflated_is_right(reads: list[tuple[int, int, list, list, list, list, list]]) -> None:  # type: ignore[type-arg]
    stored, disk, words = packed_disk()
    inflater = Inflater()

    def image_of_disk() -> Image:
        share = server.file.share(NUMBER, server.table, cluster_bits=CLUSTER_BITS, shown_bytes=len(disk))
        assert share is not None
        assert share.cluster_map is not None
        for at, word in enumerate(words):
            share.cluster_map[at] = word
        fds = [os.dup(fd) for fd in (share.data_fd, share.ready_fd, share.map_fd)]
        return Image(
            server.table.words, share.entry, share.serial, share.size, share.chunk_shift, fds, CLUSTER_BITS, inflater
        )

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        server = Server(Path(name), stored)
        for index in range(CHUNKS):
            server.fetch(index)
        image = image_of_disk()
        try:
            for offset, length, before, first, second, after, between in reads:
                do(server, before)

                def torn(fd: int, targets: list[memoryview], at: int, _flags: int) -> int:
                    """As above, around and between the halves of the stream."""
                    (target,) = targets
                    half = len(target) // 2
                    do(server, first)  # noqa: B023
                    done = os.preadv(fd, [target[:half]], at) if half else 0
                    do(server, second)  # noqa: B023
                    done += os.preadv(fd, [target[half:]], at + half)
                    do(server, after)  # noqa: B023
                    return done

                patch.setattr(reader_images, "_preadv", torn)
                end = min(len(disk), offset + length)
                target = memoryview(bytearray(end - offset))
                if image.read_into(target, offset, end):
                    assert target == disk[offset:end]
                if image.is_packed(offset, end) and image.bring(offset, end):
                    do(server, between)
                    if image.read_into(target, offset, end):
                        assert target == disk[offset:end]
                if image.is_revoked:
                    image.close()
                    image = image_of_disk()
        finally:
            image.close()
            server.close()


def test_ready_chunks_are_served_and_marked_ones_are_not(directory: Path) -> None:
    server = Server(directory)
    image = image_of(server.share(), server.table)
    target = memoryview(bytearray(CHUNK))
    assert not image.read_into(target, 0, CHUNK)
    server.fetch(0)
    assert image.read_into(target, 0, CHUNK)
    assert target == CONTENT[:CHUNK]
    server.file.mark_ready(0, marker=True)
    assert not image.read_into(target, 0, CHUNK)
    server.fetch(0)
    server.file.age_all()
    assert not image.read_into(target, 0, CHUNK)
    image.close()
    server.close()


def test_a_table_that_is_full_lists_no_more_and_a_revoked_entry_is_free_again(directory: Path) -> None:
    server = Server(directory)
    entries = [server.table.list(number) for number in range(1, TABLE_ENTRIES + 1)]
    assert all(entries)
    assert server.table.list(1) is None
    assert server.file.share(NUMBER, server.table) is None
    heard = []
    server.table.revoked = lambda: heard.append(1)
    assert entries[3] is not None
    entries[3].revoke()
    assert heard == [1]
    again = server.table.list(1)
    assert again is not None
    assert again.word == entries[3].word
    assert again.serial > max(entry.serial for entry in entries if entry is not None)
    server.close()


def test_what_is_no_table_is_refused() -> None:
    fd = os.memfd_create("other")
    with pytest.raises(ValueError, match="size"):
        ReaderTable(fd)
    os.ftruncate(fd, os.fstat(table := new_table()).st_size)
    with pytest.raises(ValueError, match="kind"):
        ReaderTable(fd)
    os.close(fd)
    os.close(table)
