"""docs/SEMANTICS.md, section 18: qcow2 images as the disks in them."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import errno_of, front_mount, opened, report
from tests.views.qcow2_files import MIB, converted_by_qemu, create, io, made
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

FILES = ("v2-compressed", "snapshots", "dirty", "bitmaps", "partly-compressed-zstd", "clusters-512", "clusters-2M-zstd")


@pytest.fixture(scope="module")
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


@pytest.fixture(scope="module")
def mount(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    with front_mount(
        front, tmp_path_factory.mktemp("raw-view") / "basefs", {}, (r"read answered EIO: image .* L2 entry of byte",)
    ) as mounted:
        yield mounted


def read_anyhow(path: Path, disk: bytes, seed: int) -> None:
    """Reads of any place and size, some with O_DIRECT, side by side."""
    rng = Random(seed)
    places = [(rng.randrange(len(disk)), rng.choice((1, 512, 4096, 70_000, MIB))) for _ in range(60)]

    def read(flags: int, offset: int, size: int) -> None:
        with opened(path, os.O_RDONLY | flags) as fd:
            found = os.pread(fd, size, offset)
        assert found == disk[offset : offset + size], (path, offset, size, flags)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read, rng.choice((0, os.O_DIRECT)), offset, size) for offset, size in places]
        for job in jobs:
            job.result()


def test_a_qcow2_is_the_disk_in_it(front: MisbehavingFront, mount: BasefsMount, tmp_path: Path) -> None:
    """[S1801] A qcow2 image is shown as the disk in it: `st_size` is the disk's size, and the bytes are those that
    `qemu-img convert -O raw` makes of it.
    [S1803] Disks of qcow2 images as qemu makes them are shown: version 2 and 3, any cluster size, zlib and zstd, zero
    clusters, internal snapshots, bitmaps, the dirty bit.
    """
    for seed, name in enumerate(FILES):
        data, disk = made(tmp_path, name)
        image = front.glance.add(data, disk_format="qcow2")
        path = mount.path(image)
        assert path.stat().st_size == len(disk)
        read_anyhow(path, disk, seed)
        assert path.read_bytes() == disk
        read_anyhow(path, disk, seed + 100)
        assert (report(mount, image)["size"], report(mount, image)["shown_size"]) == (len(data), len(disk))


def test_only_what_is_read_is_fetched(front: MisbehavingFront, mount: BasefsMount, tmp_path: Path) -> None:
    """[S1802] Only what is read of a disk is fetched: its part of the tables, and the clusters that hold it."""
    data, disk = made(tmp_path, "full")
    image = front.glance.add(data, disk_format="qcow2")
    mount.path(image).stat()
    before = report(mount, image)["fetched_bytes"]
    assert before <= 1.3 * MIB, "the header, and what of the disk's first 256 KiB is not in it"
    with opened(mount.path(image), os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.pread(fd, 4096, len(disk) - 4096) == disk[-4096:]
    assert report(mount, image)["fetched_bytes"] - before <= 256 * 1024


def test_a_file_that_ends_within_a_cluster(front: MisbehavingFront, mount: BasefsMount, tmp_path: Path) -> None:
    """[S1804] What a data cluster lacks because the file ends before it are zeros, as for qemu."""
    path = tmp_path / "image"
    create(path)
    io(path, "write -P 1 0 64k", "write -P 2 64k 64k")
    path.write_bytes(path.read_bytes()[:-30_000])
    disk = converted_by_qemu(path, tmp_path / "raw")
    assert disk[100_000:131_072].count(0) > 1000
    image = front.glance.add(path.read_bytes(), disk_format="qcow2")
    assert mount.path(image).read_bytes() == disk


def test_a_table_that_cannot_be(front: MisbehavingFront, mount: BasefsMount, tmp_path: Path) -> None:
    """[S1805] A read that meets a table or a cluster that cannot be answers EIO; what is elsewhere on the disk is read
    as ever.
    """
    path = tmp_path / "image"
    create(path)
    io(path, "write -P 1 0 64k", "write -P 2 2M 64k", "write -P 3 4M 64k")
    data = bytearray(path.read_bytes())
    entry = 0x40000 + 8 * 32  # of the cluster at 2 MiB
    data[entry : entry + 8] = (1 << 63 | 1 << 40).to_bytes(8, "big")
    image = front.glance.add(bytes(data), disk_format="qcow2")
    with opened(mount.path(image), os.O_RDONLY | os.O_DIRECT) as fd:
        assert errno_of(lambda: os.pread(fd, 4096, 2 * MIB)) == "EIO"
        assert os.pread(fd, 4096, 4 * MIB) == b"\3" * 4096
        assert os.pread(fd, 4096, 0) == b"\1" * 4096
