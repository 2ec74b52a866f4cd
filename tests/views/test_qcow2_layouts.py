"""Any layout that the format allows, against a model of the disk; and qemu agrees with the model."""

import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.views.conftest import read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_files import converted_by_qemu
from tests.views.qcow2_writer import Cluster, Shape, Writer

MASKS = st.sampled_from([0, 1, 0xFFFF_FFFF, 0x8000_0001, 0x0F0F_00FF]) | st.integers(0, 0xFFFF_FFFF)


@st.composite
def files(draw: st.DrawFn) -> Writer:
    has_subclusters = draw(st.booleans())
    bits = draw(st.integers(14 if has_subclusters else 9, 16))
    version = 3 if has_subclusters else draw(st.sampled_from([2, 3]))
    kinds = ["absent", "data", "packed", *(["zero", "zero-allocated"] if version == 3 else [])]
    cluster = st.builds(
        Cluster,
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 9),
        data_subclusters=MASKS,
        zero_subclusters=MASKS if has_subclusters else st.just(0),
    )
    clusters = draw(st.lists(cluster, min_size=1, max_size=200 if bits < 12 else 12))
    shape = Shape(
        cluster_bits=bits,
        version=version,
        compression=draw(st.sampled_from(["zlib", "zstd"])) if version == 3 else "zlib",
        has_subclusters=has_subclusters,
        tail_bytes=512 * draw(st.integers(0, (1 << bits) // 512 - 1)),
        seed=draw(st.integers(0, 1000)),
    )
    return Writer(shape, clusters)


READS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 18)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=files(), places=READS)
def test_any_layout_is_shown_as_its_disk(file: Writer, places: list[tuple[int, int]]) -> None:
    async def check() -> None:
        view = view_of(MemoryStored(file.data))
        assert view.size == len(file.disk)

        async def one(offset: int, size: int) -> None:
            assert await read(view, offset, size) == file.disk[offset : offset + size]

        async with trio.open_nursery() as nursery:
            for offset, size in places:
                nursery.start_soon(one, offset % len(file.disk), size)
        for offset, size in places:
            await one(offset % len(file.disk), size)
        assert await read(view, 0, len(file.disk)) == file.disk

    trio.run(check)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=files())
def test_qemu_sees_the_same_disk_in_it(file: Writer) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "image"
        path.write_bytes(file.data)
        assert converted_by_qemu(path, Path(scratch) / "raw") == file.disk
