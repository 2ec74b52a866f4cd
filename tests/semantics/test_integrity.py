"""docs/SEMANTICS.md, section 15: damage on the cache disk is found and mended, and never a wrong byte."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faultfs import FaultFs
from tests.faultfs.disk_image import Recording
from tests.faultfs.log import records
from tests.semantics.conftest import eventually
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 3 * MIB + 5
PATIENT = {"lookup_deadline_s": 30, "other_io_deadline_s": 60}
"""On a machine that has much else to do."""


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


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


def test_stored_bytes_are_checked_before_they_are_served(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S1501] Bytes that an earlier server stored are compared with their checksums before they are served, and
    damaged ones are fetched again.
    """
    data = os.urandom(SIZE)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), PATIENT)
    assert mount.path(image_id).read_bytes() == data
    mount.unmount()
    for offset in (0, MIB + 7, SIZE - 1):
        spoil(data_file(mount), offset)
    mount.start()
    expected_warnings(f"image {image_id}: .* cached chunks .* damaged")
    asked = front.count("/file")
    assert mount.path(image_id).read_bytes() == data
    assert front.count("/file") - asked <= 3
    assert mount.status()["damaged_chunks"] == 3


def test_a_power_cut(
    front: MisbehavingFront, basefs_mount: MountFactory, tmp_path: Path, expected_warnings: ExpectedWarnings
) -> None:
    """[S1502] A power cut at any moment costs fetches, never a wrong byte."""
    # These are whole servers; tests/faults/test_power_cut.py has all moments.
    images = {front.glance.add(data): data for data in (os.urandom(SIZE), os.urandom(SIZE))}
    log = tmp_path / "writes.log"
    with FaultFs(backing=tmp_path / "disk", path=tmp_path / "recorded", log=log) as disk:
        with BasefsMount(tmp_path / "first", front.conf_lines(), PATIENT | {"cache_dir": disk.path / "cache"}) as first:
            for image_id, data in images.items():
                assert first.path(image_id).read_bytes() == data
    recording = Recording(list(records(log)))
    rng = Random(1)
    may_be_damaged = 0
    for turn, share in enumerate((0.6, 1.0)):
        recording.scattered(int(share * len(recording.records)), rng).write_to(tmp_path / f"cut-{turn}")
        mount = basefs_mount(
            front.conf_lines(), PATIENT | {"cache_dir": tmp_path / f"cut-{turn}" / "cache"}, name=f"after-{turn}"
        )
        for image_id, data in images.items():
            assert mount.path(image_id).read_bytes() == data
        may_be_damaged += mount.status()["damaged_chunks"]
        mount.unmount()
    if may_be_damaged:
        expected_warnings("cached chunks .* damaged")


def test_verify(front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings) -> None:
    """[S1503] `basefs image verify` reads what is here from the disk, says what is damaged, and has it fetched again
    where the image is open or was complete.

    [S1504] Once a damage is found, no read gets a page that the kernel kept from before.
    """
    data, other = os.urandom(SIZE), os.urandom(SIZE)
    image_id, other_id = front.glance.add(data), front.glance.add(other)
    mount = basefs_mount(front.conf_lines(), PATIENT | {"scrub_bytes_s": 0})  # which would find it first
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


def test_the_scrub(front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings) -> None:
    """[S1505] What is here is read from the disk and checked again and again, at most `scrub_bytes_s` a second."""
    data = os.urandom(SIZE)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), PATIENT | {"scrub_bytes_s": 100 * MIB, "scrub_interval_s": 1})
    assert mount.path(image_id).read_bytes() == data
    expected_warnings(f"image {image_id}: 1 cached chunks .* damaged")
    spoil(data_file(mount), 2 * MIB + 7)
    eventually(lambda: mount.status()["scrub_damaged_chunks"] == 1)
    assert mount.path(image_id).read_bytes() == data
    assert mount.status()["scrubbed_bytes"] > 0
    eventually(lambda: data_file(mount).read_bytes() == data)
