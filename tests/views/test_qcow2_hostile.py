"""Files made to break us: an error that names image and byte, bounded time and memory; other bytes stay right."""

import random
import tracemalloc
import zlib

import pytest

from basefs import errors
from basefs.views.qcow2_inflate import inflate
from tests.cache.conftest import IMAGE_ID
from tests.views.conftest import read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_files import MIB
from tests.views.qcow2_writer import Cluster, Shape, Writer, packed_bytes, zstd

BITS = 12
CLUSTER = 1 << BITS
PER_TABLE = CLUSTER // 8
COMPRESSED = 1 << 62


def a_file(**shape) -> Writer:
    """Two L2 tables: data first, the third cluster packed, data in the second table."""
    clusters = [Cluster(kind="data", seed=1), Cluster(kind="data", seed=2), Cluster(kind="packed", seed=3)]
    clusters += [Cluster()] * (PER_TABLE - 3) + [Cluster(kind="data", seed=4)]
    return Writer(Shape(cluster_bits=BITS, **shape), clusters)


async def broken_at(file: Writer, offset: int, match: str, *, elsewhere: int | None) -> None:
    """The cluster at `offset` is not to be had, ever again; `elsewhere` is."""
    stored = MemoryStored(bytes(file.file))
    view = view_of(stored)
    for _ in range(3):
        with pytest.raises(errors.ImageDamagedError, match=match) as raised:
            await read(view, offset, CLUSTER)
        assert IMAGE_ID in str(raised.value)
        if elsewhere is not None:
            assert await read(view, elsewhere, CLUSTER) == file.disk[elsewhere : elsewhere + CLUSTER]
        stored.warm_up()  # the way of the hits


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (CLUSTER // 2, "L1 entry 0: an L2 table at 2048"),
        (1 << 40, "L1 entry 0: an L2 table at 1099511627776 in a file of"),
        (0x00FF_FFFF_FFFF_F000, "L1 entry 0: an L2 table at"),
        (3 * CLUSTER + 512, "L1 entry 0: an L2 table at 12800"),
    ],
)
async def test_an_l2_table_that_is_nowhere(place, match):
    file = a_file()
    file.put(file.l1_offset, place)
    await broken_at(file, 0, match, elsewhere=PER_TABLE * CLUSTER)


async def test_an_l2_table_that_the_end_of_the_file_cuts_off_goes_on_as_zeros_as_for_qemu():
    file = Writer(Shape(cluster_bits=BITS), [Cluster(kind="data", seed=1)])
    table = file.entry_at(0)
    assert table in (3 * CLUSTER, 4 * CLUSTER)
    if table == 3 * CLUSTER:  # put it last
        file.file += file.file[table : table + CLUSTER]
        table = len(file.file) - CLUSTER
        file.put(file.l1_offset, table)
    view = view_of(MemoryStored(bytes(file.file[: table + 8])))
    assert await read(view, 0, CLUSTER) == file.disk[:CLUSTER]


@pytest.mark.parametrize("what", ["itself", "l1", "header", "data"])
async def test_tables_that_are_something_else_end(what):
    """They are read as tables, once; nothing is followed."""
    file = a_file()
    places = {"itself": file.l2_offsets[0], "l1": file.l1_offset, "header": CLUSTER, "data": file.l2_offsets[1]}
    file.put(file.l1_offset, places[what])
    if what == "itself":
        file.put(file.l2_offsets[0], file.l2_offsets[0])
    stored = MemoryStored(bytes(file.file))
    view = view_of(stored)
    for offset in range(0, len(file.disk), 64 * CLUSTER):
        try:
            found = await read(view, offset, 64 * CLUSTER)
        except errors.ImageDamagedError:
            continue
        assert len(found) == min(64 * CLUSTER, len(file.disk) - offset)
    assert len(stored.reads) < 100


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (1 << 40, "L2 entry of byte 4096: a cluster at 1099511627776"),
        (3 * CLUSTER + 512, "L2 entry of byte 4096: a cluster at 12800, which is none"),
        (3 * CLUSTER + 512 | 1, "L2 entry of byte 4096: a cluster at 12800, which is none"),
        (COMPRESSED | 17, "L2 entry of byte 4096: a cluster at 17"),
        (COMPRESSED | 1 << 50, "L2 entry of byte 4096: a cluster at"),
        (COMPRESSED | (1 << 58) - 1, "L2 entry of byte 4096: a cluster at"),
        (COMPRESSED | 2 * CLUSTER, "the compressed cluster at byte 8192: "),
    ],
)
async def test_a_cluster_that_is_nowhere(entry, match):
    file = a_file()
    file.put(file.entry_at(1), entry)
    await broken_at(file, CLUSTER, match, elsewhere=0)
    await broken_at(file, CLUSTER, match, elsewhere=2 * CLUSTER)


async def test_zero_clusters_are_not_of_version_2():
    file = a_file(version=2)
    for entry in (1, 3 * CLUSTER | 1):
        file.put(file.entry_at(1), entry)
        await broken_at(file, CLUSTER, "a zero cluster in a file of version 2", elsewhere=0)


@pytest.mark.parametrize("bitmap", [1 << 32 | 1, 0xFFFF_FFFF_FFFF_FFFF])
async def test_subclusters_that_are_data_and_zeros(bitmap):
    file = Writer(Shape(cluster_bits=14, has_subclusters=True), [Cluster(kind="data", seed=1)] * 2)
    file.put(file.entry_at(0) + 8, bitmap)
    view = view_of(MemoryStored(bytes(file.file)))
    with pytest.raises(errors.ImageDamagedError, match="L2 entry of byte 0: a cluster at"):
        await read(view, 0, 100)
    assert await read(view, 1 << 14, 1 << 14) == file.disk[1 << 14 :]


async def test_subclusters_of_no_cluster():
    file = Writer(Shape(cluster_bits=14, has_subclusters=True), [Cluster(kind="zero")])
    file.put(file.entry_at(0) + 8, 1)
    with pytest.raises(errors.ImageDamagedError, match="a cluster at 0 with subclusters 0x1"):
        await read(view_of(MemoryStored(bytes(file.file))), 0, 100)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("length", "is_whole"),
    [(CLUSTER - 1, False), (1, False), (CLUSTER, True), (CLUSTER + 1, "zlib"), (8 * MIB, "zlib")],
)
async def test_compressed_bytes_of_more_or_less_than_a_cluster(compression, length, is_whole):
    file = a_file(compression=compression)
    raw = packed_bytes(b"x" * length, compression)
    at = len(file.file)
    file.file += raw.ljust(2 * CLUSTER, b"\0")
    file.put(file.entry_at(2), COMPRESSED | (min(len(raw), CLUSTER) // 512) << 62 - (BITS - 8) | at)
    if is_whole in (True, compression):  # a deflate stream may go on, as for qemu
        assert await read(view_of(MemoryStored(bytes(file.file))), 2 * CLUSTER, CLUSTER) == b"x" * CLUSTER
    else:
        await broken_at(file, 2 * CLUSTER, f"the compressed cluster at byte {at}: ", elsewhere=0)


def test_what_a_few_bytes_could_inflate_to_is_not_inflated():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -12)
    raw = b"".join(bomb.compress(bytes(MIB)) for _ in range(100)) + bomb.flush()
    frame = zstd.compress(bytes(100 * MIB))
    tracemalloc.start()
    assert inflate(raw, CLUSTER, "zlib") == bytes(CLUSTER)
    with pytest.raises(ValueError, match="more than 4096 bytes"):
        inflate(frame, CLUSTER, "zstd")
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_a_distance_beyond_the_window_that_qemu_writes_with_is_taken_as_qemu_takes_it():
    piece = random.Random(9).randbytes(200)
    content = (bytes(20_000) + piece).ljust(40_000, b"\0") + piece
    content = content.ljust(1 << 16, b"\0")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    assert inflate(deflate.compress(content) + deflate.flush(), 1 << 16, "zlib") == content


def test_a_zstd_cluster_of_several_frames_is_one():
    frames = b"".join(zstd.compress(bytes([at]) * (CLUSTER // 4)) for at in range(4))
    assert inflate(frames + b"what follows", CLUSTER, "zstd") == b"".join(
        bytes([at]) * (CLUSTER // 4) for at in range(4)
    )
    with pytest.raises(ValueError, match="3072 bytes instead of 4096"):
        inflate(zstd.compress(bytes(3072)), CLUSTER, "zstd")
    for raw in (b"", b"x", b"\x28\xb5\x2f\xfd", frames[:-1]):
        with pytest.raises(ValueError):
            inflate(raw, CLUSTER, "zstd")


async def test_a_large_l1_table_is_read_by_the_piece():
    """128 GiB in clusters of 512 bytes: an L1 table of 32 MiB, which nobody needs as a whole."""
    small = Writer(Shape(cluster_bits=9), [Cluster(kind="data", seed=1)])
    data = bytearray(small.data.ljust(8 * 512, b"\0"))
    l1_entries = (32 << 20) // 8
    data[24:32] = (l1_entries * 64 * 512).to_bytes(8, "big")
    data[36:40] = l1_entries.to_bytes(4, "big")
    data[40:48] = (8 * 512).to_bytes(8, "big")
    table = bytearray(32 << 20)
    table[-8:] = small.l2_offsets[0].to_bytes(8, "big")
    stored = MemoryStored(bytes(data + table))
    view = view_of(stored)
    last = (l1_entries - 1) * 64 * 512
    assert await read(view, last, 512) == small.disk[:512]
    assert await read(view, 0, MIB) == bytes(MIB)
    assert stored.fetched_bytes < 300_000
