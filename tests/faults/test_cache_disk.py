"""A cache directory that is full, cannot be written, is damaged, or belongs to another basefs."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from basefs.keeper_setup import CacheLock, lock_holder
from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import MIB
from tests.faults.readers import eventually, opened, pread, read_at
from tools.mount import BasefsMount, base_name

pytestmark = pytest.mark.mount

PART = 64 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 2 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes all the space there is."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def refusal(mount: BasefsMount) -> str:
    """What `basefs mount` says when it does not mount: one line, and no mount is left."""
    done = mount.cli("mount", "--background", check=False)
    assert done.returncode == 1
    assert not mount.is_mounted
    assert "Traceback" not in done.stderr
    return done.stderr


def test_on_a_full_disk_every_byte_is_right_and_it_heals_when_there_is_space(
    front: MisbehavingFront, basefs_mount: MountFactory, small_disk: Path, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(6 * MIB + 1)
    image_id = front.glance.add(data)
    expected_warnings("serving round the cache.*No space left")
    mount = basefs_mount(front.conf_lines(), {"cache_dir": small_disk / "cache", "cache_min_free_bytes": 0})
    path = mount.mountpoint / base_name(image_id)
    assert path.stat().st_size == len(data)
    ballast = fill(small_disk)
    assert path.read_bytes() == data
    with opened(path) as fd:
        for offset in range(0, len(data), MIB):
            assert pread(fd, offset, PART) == data[offset:][:PART]
        server_pid = lock_holder(small_disk / "cache")["server_pid"]
        os.kill(server_pid, signal.SIGKILL)
        expected_warnings("server .* died|state of images cannot be stored on the disk")
        assert pread(fd, 5 * MIB, PART) == data[5 * MIB :][:PART], "another server works on a full disk, too"
        ballast.unlink()

        def is_cached() -> bool:
            asked = front.count("/file")
            assert pread(fd, 3 * MIB, PART) == data[3 * MIB :][:PART]
            return front.count("/file") == asked

        eventually(is_cached)


def test_a_start_on_a_full_disk_is_refused_with_its_reason(
    front: MisbehavingFront, basefs_mount: MountFactory, small_disk: Path, expected_warnings: ExpectedWarnings
) -> None:
    mount = basefs_mount(
        front.conf_lines(), {"cache_dir": small_disk / "cache", "cache_min_free_bytes": 0}, start=False
    )
    fill(small_disk)
    expected_warnings("No space left|disk is full|full")
    said = refusal(mount)
    assert str(small_disk / "cache") in said, said


def test_a_cache_directory_that_cannot_be_written_is_refused(
    front: MisbehavingFront, basefs_mount: MountFactory, small_disk: Path, expected_warnings: ExpectedWarnings
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    mount = basefs_mount(
        front.conf_lines(), {"cache_dir": small_disk / "cache", "cache_min_free_bytes": 0}, start=False
    )
    expected_warnings("Read-only file system")
    said = refusal(mount)
    assert str(small_disk / "cache") in said
    assert "Read-only file system" in said


def test_a_second_basefs_on_a_cache_directory_is_refused_and_the_first_lives_on(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(2 * MIB)
    image_id = front.glance.add(data)
    first = basefs_mount(front.conf_lines(), name="first")
    assert read_at(first.mountpoint / base_name(image_id), 0, PART) == data[:PART]
    second = basefs_mount(front.conf_lines(), {"cache_dir": first.cache_dir}, name="second", start=False)
    expected_warnings("is in use by another basefs")
    said = refusal(second)
    for fact in (str(first.cache_dir), str(first.mountpoint), str(lock_holder(first.cache_dir)["keeper_pid"])):
        assert fact in said
    assert read_at(first.mountpoint / base_name(image_id), MIB, PART) == data[MIB:][:PART]


def test_a_lock_file_that_cannot_be_written_does_not_end_a_keeper_that_serves(
    tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    """A disk that the kernel made read-only after an error: the next server must be started all the same."""
    expected_warnings("cannot note server 123 in the lock file")
    with CacheLock(str(tmp_path), "/mnt") as lock:
        os.close(lock.fd)
        lock.fd = os.open(tmp_path / "lock", os.O_RDONLY)
        lock.note_server(123)


def test_damaged_chunks_are_fetched_again_and_told(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(2 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines())
    path = mount.mountpoint / base_name(image_id)
    assert path.read_bytes() == data
    mount.unmount()
    (file,) = (mount.cache_dir / "chunks").glob("*.data")
    with open(file, "r+b") as chunks:
        chunks.seek(MIB + 12345)
        chunks.write(b"damage")
        chunks.truncate(len(data) - 10)
    mount.start()
    expected_warnings(f"image {image_id}: .* cached chunks .* damaged")
    asked = front.count("/file")
    assert path.read_bytes() == data
    assert front.count("/file") - asked <= 2
    assert mount.status()["damaged_chunks"] == 2
