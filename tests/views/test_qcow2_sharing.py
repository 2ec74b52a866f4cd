"""What readers are told of a raw view gives the disk's bytes, or leaves them to the server."""

import os
import random
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, open_chunk_file
from basefs.cache.reader_table import ReaderTable, Share, new_table
from basefs.core.chunk_map import ChunkMapHeader
from basefs.reader_images import INFLATE_BYTES_MAX, Image
from basefs.reader_inflate import Inflater
from basefs.reader_layout import PACKED, UNKNOWN, ZEROS, packed_place
from basefs.views.qcow2_sharing import NEIGHBOURS, SharedClusters
from tests.views.conftest import read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_writer import Cluster, Shape, Writer, packed_bytes
from tests.views.test_qcow2_layouts import READS, files

KINDS = ("data", "zero", "packed", "zero-allocated", "data", "absent")
CLUSTER = 65536
CHUNK = 65536
HEADER_BYTES = 512


class Shared:
    """Stored bytes in a chunk file, and in memory for the view."""

    def __init__(self, directory: Path, data: bytes) -> None:
        self.stored = MemoryStored(data)
        self.view = view_of(self.stored)
        header = ChunkMapHeader(image_id="image", size=len(data), chunk_bytes=CHUNK)
        self.file: ChunkFile
        self.file, _ = open_chunk_file(directory, 1, header)
        self.file.write_piece(0, data)
        for index in range(header.chunks):
            self.file.mark_ready(index)
        self.table = ReaderTable(new_table())
        self.clusters = SharedClusters(self.view, self)

    def share(self, table: ReaderTable, *, cluster_bits: int, shown_bytes: int) -> Share | None:
        return self.file.share(1, table, cluster_bits=cluster_bits, shown_bytes=shown_bytes)

    def forget_clusters(self) -> None:
        self.file.forget_clusters()

    async def read_and_tell(self, offset: int, size: int) -> Share:
        """A read that a reader handed on."""
        await read(self.view, offset, size)
        share = self.clusters.share(self.table, offset, size)
        assert share is not None
        return share

    def image_of(self, share: Share) -> Image:
        fds = [os.dup(fd) for fd in (share.data_fd, share.ready_fd, share.map_fd)]
        return Image(
            self.table.words, share.entry, share.serial, share.size, share.chunk_shift, fds, share.cluster_bits,
            Inflater(),
        )  # fmt: skip

    def close(self) -> None:
        self.file.close()
        os.close(self.table.fd)


def served(image: Image, offset: int, end: int) -> bytes | None:
    """What a reader answers; None where it hands the read on."""
    target = memoryview(bytearray(end - offset))
    if image.read_into(target, offset, end):
        return bytes(target)
    if image.is_packed(offset, end) and image.bring(offset, end) and image.read_into(target, offset, end):
        return bytes(target)
    return None


async def test_a_reader_serves_what_it_was_told(tmp_path: Path) -> None:
    chance = random.Random(5)
    kinds = [chance.choice(KINDS) for _ in range(80)]
    made = Writer(Shape(), [Cluster(kind=kind, seed=seed) for seed, kind in enumerate(kinds)])
    shared = Shared(tmp_path, made.data)
    share = await shared.read_and_tell(40 * CLUSTER, 4096)
    assert share.cluster_map is not None
    assert share.size == len(made.disk)
    image = shared.image_of(share)
    told = [word != UNKNOWN for word in share.cluster_map]
    assert told == [at // NEIGHBOURS == 40 // NEIGHBOURS for at in range(80)]
    await shared.read_and_tell(0, len(made.disk))
    assert [word >= PACKED for word in share.cluster_map] == [kind == "packed" for kind in kinds]
    answered = set()
    for _ in range(300):
        offset = chance.randrange(len(made.disk))
        end = min(len(made.disk), offset + chance.choice([1, 4096, CLUSTER, 5 * CLUSTER]))
        found = served(image, offset, end)
        answered.add((end - offset, found is not None))
        if "packed" not in kinds[offset // CLUSTER : -(-end // CLUSTER)] or end - offset <= INFLATE_BYTES_MAX:
            assert found is not None
        assert found is None or found == made.disk[offset:end]
    assert {(1, True), (4096, True), (CLUSTER, True), (5 * CLUSTER, True), (5 * CLUSTER, False)} <= answered
    image.close()
    shared.close()


@pytest.mark.parametrize("shape", [Shape(compression="zstd"), Shape(cluster_bits=17)])
async def test_what_readers_do_not_inflate_is_not_told_and_has_no_other_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    made = Writer(shape, [Cluster(kind="packed", seed=seed) for seed in range(40)])
    shared = Shared(tmp_path, made.data)
    looked_at: list[int] = []
    known_extents = shared.view.known_extents
    monkeypatch.setattr(shared.view, "known_extents", lambda at: looked_at.append(at) or known_extents(at))
    cluster = 1 << shape.cluster_bits
    for _ in range(3):
        share = await shared.read_and_tell(5 * cluster, 2 * cluster)
        assert share.cluster_map is not None
        assert set(share.cluster_map) == {UNKNOWN}
    assert looked_at == [5 * cluster, 6 * cluster] * 3
    shared.close()


async def test_compressed_clusters_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Writer(Shape(), [Cluster(kind="packed", seed=seed) for seed in range(40)])
    shared = Shared(tmp_path, made.data)
    looked_at: list[int] = []
    known_extents = shared.view.known_extents
    monkeypatch.setattr(shared.view, "known_extents", lambda at: looked_at.append(at) or known_extents(at))
    for _ in range(3):
        await shared.read_and_tell(5 * CLUSTER, 2 * CLUSTER)
    assert sorted(looked_at) == [at * CLUSTER for at in range(NEIGHBOURS)]
    shared.close()


async def test_what_was_inflated_is_served_only_as_long_as_its_stored_bytes_are(tmp_path: Path) -> None:
    made = Writer(Shape(), [Cluster(kind="packed", seed=1), Cluster(kind="packed", seed=2)])
    shared = Shared(tmp_path, made.data)
    share = await shared.read_and_tell(0, len(made.disk))
    assert share.cluster_map is not None
    image = shared.image_of(share)
    target = memoryview(bytearray(4096))
    host, length = packed_place(share.cluster_map[0], 16)
    chunk = (host + length - 1) // CHUNK
    assert not image.read_into(target, 0, 4096)
    assert served(image, 0, 4096) == made.disk[:4096]
    assert image.read_into(target, 100, 4196), "and is kept"
    shared.file.age_all()
    assert served(image, 0, 4096) is None, "the server notes its use"
    for index in range(-(-len(made.data) // CHUNK)):
        shared.file.mark_ready(index)
    assert image.read_into(target, 0, 4096)
    shared.file.mark_not_ready(chunk)
    shared.file.mark_ready(chunk)
    assert not image.read_into(target, 0, 4096), "it may have been another's in between"
    assert served(image, 0, 4096) == made.disk[:4096]
    shared.view._memory.forget(shared.view._number)
    assert served(image, 0, 4096) is None
    await shared.read_and_tell(0, len(made.disk))
    assert not image.read_into(target, 0, 4096)
    assert served(image, 0, 4096) == made.disk[:4096]
    image.close()
    shared.close()


async def test_a_stream_that_makes_no_cluster_is_left_to_the_server(tmp_path: Path) -> None:
    made = Writer(Shape(), [Cluster(kind="packed", seed=1), Cluster(kind="packed", seed=2), Cluster(kind="data")])
    first = made.file.index(packed_bytes(Cluster(kind="packed", seed=1).content(CLUSTER), "zlib"))
    made.file[first] |= 6  # a block of no type
    shared = Shared(tmp_path, bytes(made.file))
    share = await shared.read_and_tell(2 * CLUSTER, 4096)
    image = shared.image_of(share)
    for _ in range(2):
        assert image.is_packed(0, 4096)
        assert served(image, 0, 4096) is None
        assert served(image, CLUSTER - 1, CLUSTER + 1) is None
        assert served(image, CLUSTER, CLUSTER + 1) == made.disk[CLUSTER : CLUSTER + 1]
    image.close()
    shared.close()


FLAWS = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)), max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=files(), places=READS, entries=FLAWS, anywhere=FLAWS)
def test_readers_serve_what_the_server_shows_whatever_the_file_says(
    file: Writer, places: list[tuple[int, int]], entries: list[tuple[int, int]], anywhere: list[tuple[int, int]]
) -> None:
    data = bytearray(file.file)
    count = -(-len(file.disk) // (1 << file._shape.cluster_bits))
    for at, flaw in entries:
        data[file.entry_at(at % count) + at % 8] ^= flaw
    for at, flaw in anywhere:
        data[HEADER_BYTES + at % (len(data) - HEADER_BYTES)] ^= flaw

    async def check(directory: Path) -> None:
        shared = Shared(directory, bytes(data))
        image: Image | None = None
        for offset, size in places * 2:
            offset %= len(file.disk)
            end = min(len(file.disk), offset + size)
            try:
                shown = await read(shared.view, offset, size)
            except errors.ImageDamagedError:
                shown = None
            found = None if image is None else served(image, offset, end)
            assert found is None or found == shown
            share = shared.clusters.share(shared.table, offset, size)
            if image is None and share is not None:
                image = shared.image_of(share)
        if image is not None:
            image.close()
        shared.close()

    with tempfile.TemporaryDirectory() as directory:
        trio.run(check, Path(directory))


async def test_a_chunk_that_is_not_ready_and_tables_that_may_be_wrong_are_left_to_the_server(tmp_path: Path) -> None:
    made = Writer(Shape(), [Cluster(kind="data", seed=1), Cluster(kind="zero"), Cluster(kind="data", seed=2)])
    shared = Shared(tmp_path, made.data)
    share = await shared.read_and_tell(0, len(made.disk))
    assert share.cluster_map is not None
    image = shared.image_of(share)
    target = memoryview(bytearray(4096))
    assert image.read_into(target, 0, 4096)
    assert share.cluster_map[1] == ZEROS
    shared.file.mark_not_ready(share.cluster_map[0] // CHUNK)
    assert not image.read_into(target, 0, 4096)
    assert image.read_into(target, 2 * CLUSTER, 2 * CLUSTER + 4096)
    assert target == made.disk[2 * CLUSTER : 2 * CLUSTER + 4096]
    shared.view._memory.forget(shared.view._number)
    assert list(share.cluster_map) == [UNKNOWN] * 3
    assert not image.read_into(target, CLUSTER, CLUSTER + 4096)
    await shared.read_and_tell(0, len(made.disk))
    assert image.read_into(target, CLUSTER, CLUSTER + 4096)
    image.close()
    shared.close()


async def test_nothing_is_told_before_a_read_nor_of_a_disk_that_is_too_large(tmp_path: Path) -> None:
    shared = Shared(tmp_path, Writer(Shape(), [Cluster(kind="data", seed=1)]).data)
    assert shared.clusters.share(shared.table, 0, 10) is None
    shared.close()
