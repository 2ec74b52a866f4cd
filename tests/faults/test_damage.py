"""Damage on the cache disk under a real mount: found on the disk, mended, and no later reader gets an old page."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import MIB
from tests.faults.readers import eventually
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

SIZE = 3 * MIB + 5


def data_file(mount: BasefsMount) -> Path:
    (file,) = (mount.cache_dir / "chunks").glob("*.data")
    return file


def spoil(file: Path, offset: int) -> None:
    """Change a byte on the disk and in its page cache."""
    with open(file, "r+b") as chunks:
        chunks.seek(offset)
        byte = chunks.read(1)
        chunks.seek(offset)
        chunks.write(bytes([byte[0] ^ 0xFF]))
        chunks.flush()
        os.fsync(chunks.fileno())


def verify(mount: BasefsMount, *which: str) -> "subprocess.CompletedProcess[str]":
    return mount.cli("image", "verify", *which, check=False)


def test_verify_finds_damage_that_was_served_mends_it_and_no_reader_gets_the_old_pages(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data, other = os.urandom(SIZE), os.urandom(SIZE)
    image_id, other_id = front.glance.add(data), front.glance.add(other)
    mount = basefs_mount(front.conf_lines())
    path = mount.path(image_id)
    assert path.read_bytes() == data
    done = verify(mount, image_id)
    assert done.returncode == 0, done.stderr
    assert "0 chunks were damaged" in done.stdout
    # Whatever the kernel keeps of the image is thrown away, so that the damage is served once.
    os.posix_fadvise(fd := os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    spoil(data_file(mount), MIB + 7)
    with open(path, "rb") as reader:
        assert reader.read() != data, "this test's own damage was seen"
        assert mount.path(other_id).read_bytes() == other
        expected_warnings(f"image {image_id}: 1 cached chunks .* damaged")
        done = verify(mount, "--all")
        assert done.returncode == 1
        assert f"{image_id}: 3.0 MiB checked, 1 chunks were damaged, 1 of them fetched again" in done.stdout
        assert f"{other_id}: 3.0 MiB checked\n" in done.stdout
        assert "2 images, 6.0 MiB checked, 1 chunks were damaged" in done.stdout
        eventually(lambda: os.pread(reader.fileno(), SIZE, 0) == data)
        os.close(fd)
    assert path.read_bytes() == data
    assert verify(mount, "--all").returncode == 0
    assert mount.status()["damaged_chunks"] == 1


def test_the_scrub_finds_damage_by_itself(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(SIZE)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), {"scrub_bytes_s": 100 * MIB, "scrub_interval_s": 1})
    assert mount.path(image_id).read_bytes() == data
    expected_warnings(f"image {image_id}: 1 cached chunks .* damaged")
    spoil(data_file(mount), 2 * MIB + 7)
    eventually(lambda: mount.status()["scrub_damaged_chunks"] == 1)
    assert mount.path(image_id).read_bytes() == data
    assert mount.status()["scrubbed_bytes"] > 0
    eventually(lambda: data_file(mount).read_bytes() == data)


def test_a_scrub_that_is_switched_off_reads_nothing(front: MisbehavingFront, basefs_mount: MountFactory) -> None:
    mount = basefs_mount(front.conf_lines(), {"scrub_bytes_s": 0})
    assert mount.status()["scrub"] == "off"


def test_verify_of_an_image_that_is_not_there_or_has_nothing_here(
    front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    front.glance.add(b"x" * 4096)
    mount = basefs_mount(front.conf_lines())
    assert verify(mount, "nothing").returncode == 1
    assert verify(mount, "--all").stdout == "0 images, 0 B checked, 0 chunks were damaged\n"
