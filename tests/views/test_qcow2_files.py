"""What qemu made is shown as qemu shows it: any read, cold and warm, of files with every feature."""

import random

import pytest
import trio

from tests.views.conftest import read, view_of
from tests.views.memory_stored import MemoryStored
from tests.views.qcow2_files import MAKERS, converted_by_qemu, create, io, made


def assert_same(found: bytes, wanted: bytes, what: object) -> None:
    assert len(found) == len(wanted), what
    if found != wanted:
        at = next(at for at, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        raise AssertionError(f"{what}: byte {at} is {found[at]}, not {wanted[at]}")


@pytest.mark.parametrize("name", MAKERS)
async def test_a_file_of_qemu_is_shown_as_the_disk_that_qemu_converts_it_to(tmp_path, name):
    data, disk = made(tmp_path, name)
    stored = MemoryStored(data)
    view = view_of(stored)
    assert view.size == len(disk)
    rng = random.Random(name)

    async def reader() -> None:
        for _ in range(40):
            size = rng.choice((1, 512, 4096, 4097, 65536, 200_000, 1 << 20))
            offset = rng.randrange(len(disk))
            assert_same(await read(view, offset, size), disk[offset : offset + size], (name, offset, size))

    async with trio.open_nursery() as nursery:  # side by side, cold
        for _ in range(4):
            nursery.start_soon(reader)
    for offset in range(0, len(disk), 1 << 20):
        assert_same(await read(view, offset, 1 << 20), disk[offset : offset + (1 << 20)], (name, offset))
    stored.reads.clear()
    await reader()
    for offset in range(0, len(disk), 65536):  # all is here: no read waits, and nearly none leaves the fast path
        hit = view.hit(offset, 65536)
        if hit is not None:
            assert_same(bytes(hit), disk[offset : offset + 65536], (name, offset))
        else:
            assert "512" in name, (name, offset)
    assert view.hit(len(disk), 100) == b""
    assert await view.read(len(disk), 100, deadline_s=1, patient=False) == b""


@pytest.mark.parametrize("cut", [1, 30_000, 65_535])
async def test_a_data_cluster_that_the_end_of_the_file_cuts_off_goes_on_as_zeros(tmp_path, cut):
    path = tmp_path / "image"
    create(path)
    io(path, "write -P 1 0 64k", "write -P 2 64k 64k")
    path.write_bytes(path.read_bytes()[:-cut])
    disk = converted_by_qemu(path, tmp_path / "raw")
    assert disk[2 * 65536 - cut : 2 * 65536] == bytes(cut)
    view = view_of(MemoryStored(path.read_bytes()))
    for _ in range(2):
        assert_same(await read(view, 0, 1 << 20), disk[: 1 << 20], cut)
        assert_same(await read(view, 2 * 65536 - 1, 1), disk[2 * 65536 - 1 : 2 * 65536], cut)


@pytest.mark.parametrize("options", [("cluster_size=2M",), ("cluster_size=2M", "extended_l2=on")])
async def test_large_l2_tables_are_read_by_the_slice(tmp_path, options):
    path = tmp_path / "image"
    create(path, *options, size=40 << 30)
    places = {0: 1, 9: 2, 17: 3, 33: 4}  # GiB: in different slices of one table
    io(path, *(f"write -P {value} {at}G 64k" for at, value in places.items()))
    stored = MemoryStored(path.read_bytes())
    view = view_of(stored)
    for at, value in places.items():
        assert await read(view, at << 30, 4096) == bytes([value]) * 4096
    assert await read(view, 25 << 30, 4096) == bytes(4096)
    assert stored.fetched_bytes < 1_000_000
