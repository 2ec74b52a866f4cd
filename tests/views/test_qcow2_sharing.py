"""What readers are told of a raw view gives the disk's bytes, or leaves them to the server."""

import os
import random
from pathlib import Path

import pytest

from basefs.cache.chunk_file import ChunkFile, open_chunk_file
from basefs.cache.reader_table import ReaderTable, Share, new_table
from basefs.core.chunk_map import ChunkMapHeader
from basefs.reader_images import Image
from basefs.reader_layout import UNKNOWN, ZEROS
from basefs.views.qcow2_sharing import NEIGHBOURS, SharedClusters
from tests.views.conftest import read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_writer import Cluster, Shape, Writer

KINDS = ("data", "zero", "packed", "zero-allocated", "data", "absent")
CLUSTER = 65536
CHUNK = 65536


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
            self.table.words, share.entry, share.serial, share.size, share.chunk_shift, fds, share.cluster_bits
        )

    def close(self) -> None:
        self.file.close()
        os.close(self.table.fd)


async def test_a_reader_serves_what_it_was_told_and_nothing_compressed(tmp_path: Path) -> None:
    chance = random.Random(5)
    kinds = [chance.choice(KINDS) for _ in range(80)]
    made = Writer(Shape(), [Cluster(kind=kind, seed=seed) for seed, kind in enumerate(kinds)])
    shared = Shared(tmp_path, made.data)
    share = await shared.read_and_tell(40 * CLUSTER, 4096)
    assert share.cluster_map is not None
    assert share.size == len(made.disk)
    image = shared.image_of(share)
    told = [word != UNKNOWN for word in share.cluster_map]
    assert told == [at // NEIGHBOURS == 40 // NEIGHBOURS and kind != "packed" for at, kind in enumerate(kinds)]
    await shared.read_and_tell(0, len(made.disk))
    assert [word != UNKNOWN for word in share.cluster_map] == [kind != "packed" for kind in kinds]
    served = 0
    for _ in range(300):
        offset = chance.randrange(len(made.disk))
        end = min(len(made.disk), offset + chance.choice([1, 4096, CLUSTER, 5 * CLUSTER]))
        target = memoryview(bytearray(end - offset))
        is_whole = "packed" not in kinds[offset // CLUSTER : -(-end // CLUSTER)]
        assert image.read_into(target, offset, end) is is_whole
        assert not is_whole or target == made.disk[offset:end]
        served += is_whole
    assert served
    image.close()
    shared.close()


async def test_reads_of_compressed_clusters_look_at_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Writer(Shape(), [Cluster(kind="packed", seed=seed) for seed in range(40)])
    shared = Shared(tmp_path, made.data)
    looked_at: list[int] = []
    known_extents = shared.view.known_extents
    monkeypatch.setattr(shared.view, "known_extents", lambda at: looked_at.append(at) or known_extents(at))
    for _ in range(3):
        await shared.read_and_tell(5 * CLUSTER, 2 * CLUSTER)
    assert looked_at == [5 * CLUSTER, 6 * CLUSTER] * 3
    shared.close()


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
