"""A cache disk that fails under a mount: it costs speed, never a byte, and it heals by itself.

The disk comes first in the arguments of a test, so that it goes last.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from basefs.keeper_setup import lock_holder
from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faultfs import FaultFs
from tests.faults.conftest import MIB
from tests.faults.readers import eventually, opened, pread, reader_threads
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

PART = 64 * 1024
SIZE = 3 * MIB + 7
FAILURES = (("EIO", ["read"]), ("EIO", ["write"]), ("ENOSPC", ["write", "create"]))
PATIENT = {"lookup_deadline_s": 30, "other_io_deadline_s": 60, "cache_min_free_bytes": 0}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultFs]:
    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "faulty") as mounted:
        yield mounted


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[FaultFs]]:
    """One for each of FAILURES."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(FaultFs(backing=tmp_path / f"disk-{n}", path=tmp_path / f"faulty-{n}"))
            for n in range(len(FAILURES))
        ]


def patient_mount(front: MisbehavingFront, basefs_mount: MountFactory, cache_dir: Path) -> BasefsMount:
    return basefs_mount(front.conf_lines(), PATIENT | {"cache_dir": cache_dir})


def is_right(path: Path, data: bytes) -> bool:
    """Every byte, past the kernel's pages."""
    with opened(path) as fd:
        got = b"".join(pread(fd, offset, MIB) for offset in range(0, len(data), MIB))
    assert got == data
    return True


def is_cached(front: MisbehavingFront, path: Path, data: bytes) -> bool:
    """Whether a read needs no Glance."""
    asked = front.count("/file")
    is_right(path, data)
    return front.count("/file") == asked


def kill_server(cache_dir: Path) -> None:
    os.kill(int(lock_holder(cache_dir)["server_pid"]), signal.SIGKILL)


def test_chunk_files_that_fail_are_gone_round_and_used_again_when_they_are_well(
    disks: list[FaultFs], front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """Each failure on a disk of its own: all of them are well again at about the same time, ten seconds later."""
    data, later = os.urandom(SIZE), os.urandom(SIZE)
    first, second = front.glance.add(data), front.glance.add(later)
    mounts = []
    for disk, (error, ops) in zip(disks, FAILURES, strict=True):
        options = PATIENT | {"cache_dir": disk.path / "cache"}
        mount = basefs_mount(front.conf_lines(), options, name=disk.path.name + "-mount")
        mounts.append(mount)
        assert is_right(mount.path(first), data)
        expected_warnings("serving round the cache|serving it round the cache")
        rule = disk.fail(error, ops=ops, names="cache/chunks/*")
        assert is_right(mount.path(first), data)
        assert is_right(mount.path(second), later)
        assert disk.seen(rule) > 0
        disk.lift()
    for mount in mounts:
        paths = mount.path(first), mount.path(second)
        eventually(lambda paths=paths: is_cached(front, paths[0], data) and is_cached(front, paths[1], later))


def test_a_disk_that_turns_read_only_and_a_server_that_is_killed_on_it(
    disk: FaultFs, front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data, later = os.urandom(SIZE), os.urandom(SIZE)
    first, second = front.glance.add(data), front.glance.add(later)
    cache_dir = disk.path / "cache"
    mount = patient_mount(front, basefs_mount, cache_dir)
    assert is_right(mount.path(first), data)
    with opened(mount.path(first)) as fd:
        disk.read_only()
        for pattern in ("round the cache", "died", "Read-only|cannot|damaged|memory"):
            expected_warnings(pattern)
        assert is_right(mount.path(second), later)
        kill_server(cache_dir)
        assert pread(fd, MIB, PART) == data[MIB:][:PART]
        assert is_right(mount.path(second), later)
        disk.lift()
    eventually(lambda: is_cached(front, mount.path(second), later))


def test_a_read_that_hangs_in_the_disk_holds_up_nobody_else(
    disk: FaultFs, front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    data, other = os.urandom(SIZE), os.urandom(SIZE)
    first, second = front.glance.add(data), front.glance.add(other)
    mount = patient_mount(front, basefs_mount, disk.path / "cache")
    assert is_right(mount.path(first), data)
    (chunks,) = (disk.path / "cache" / "chunks").glob("*.data")
    rule = disk.hang(ops=["read"], names=f"cache/chunks/{chunks.name}")
    with reader_threads(1) as pool:
        hung = pool.submit(is_right, mount.path(first), data)
        eventually(lambda: disk.seen(rule) > 0)
        assert is_right(mount.path(second), other)
        assert mount.path(first).stat().st_size == SIZE
        assert mount.path(second).name in os.listdir(mount.mountpoint)
        assert mount.status()["state"] == "serving"
        assert not hung.done()
        disk.lift()
        assert hung.result()


def test_an_ext4_that_makes_itself_read_only_costs_no_byte(
    ext4: Path, front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """It throws away pages that it had not written yet: the checksums find that, those bytes are fetched again."""
    data, unwritten, later = (os.urandom(SIZE) for _ in range(3))
    first, second, third = (front.glance.add(content) for content in (data, unwritten, later))
    mount = patient_mount(front, basefs_mount, ext4 / "cache")
    assert is_right(mount.path(first), data)
    eventually(lambda: mount.image(first)["cached_bytes"] == SIZE)
    subprocess.run(["sync", "-f", str(ext4)], check=True)
    assert is_right(mount.path(second), unwritten)
    (device,) = (line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if f" {ext4} " in line)
    Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("a test")
    subprocess.run(["sync", "-f", str(ext4)], check=False)  # so that the pages are thrown away now
    expected_warnings(f"round the cache|image {second}: .* cached chunks .* are damaged")
    expected_warnings("Read-only|readonly|cannot be stored|was not stored")
    assert is_right(mount.path(first), data)
    assert is_right(mount.path(second), unwritten)
    assert is_right(mount.path(third), later)
    assert lock_holder(ext4 / "cache")["server_pid"] == mount.status()["server_pid"], "the server lives"
