"""Images that go, are closed or turn out to be something else, before and while somebody has them open."""

import errno
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings
from tests.fakes import answers
from tests.faults.conftest import HEADER_BYTES, MIB, Site
from tests.faults.readers import errno_of, eventually, opened, pread, read_at

pytestmark = pytest.mark.mount

PART = 64 * 1024


def test_an_image_deleted_while_open_keeps_what_is_here_and_the_rest_is_eio(
    site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    with opened(image.path) as fd:
        assert pread(fd, 2 * MIB, PART) == image.part(2 * MIB, PART)
        site.front.glance.delete(image.image_id)
        expected_warnings(f"image {image.image_id}.*404")
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        assert pread(fd, 2 * MIB, PART) == image.part(2 * MIB, PART)
        assert os.fstat(fd).st_size == len(image.data)
    eventually(lambda: errno_of(image.path.stat) == errno.ENOENT)
    assert image.path.name not in os.listdir(site.mount.mountpoint)


def test_an_image_deleted_once_it_is_whole_here_is_served_on(site: Site) -> None:
    image = site.add()
    assert image.path.read_bytes() == image.data
    eventually(lambda: os.stat(image.path).st_blocks * 512 >= len(image.data))
    site.front.glance.delete(image.image_id)
    assert read_at(image.path, 0, len(image.data)) == image.data


def test_an_image_deactivated_while_open_is_eio_where_bytes_are_missing_and_comes_back(
    site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    with opened(image.path) as fd:
        site.front.glance.change(image.image_id, status="deactivated")
        expected_warnings(f"image {image.image_id}.*deactivated")
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        assert pread(fd, 0, PART) == image.part(0, PART)
        site.front.glance.change(image.image_id, status="active")
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
    assert read_at(image.path, 2 * MIB, PART) == image.part(2 * MIB, PART)


def test_an_image_deactivated_before_anybody_used_it_is_not_shown(site: Site) -> None:
    image = site.add(status="deactivated")
    assert errno_of(image.path.stat) == errno.ENOENT
    assert image.path.name not in os.listdir(site.mount.mountpoint)
    site.front.glance.change(image.image_id, status="active")
    eventually(lambda: read_at(image.path, 0, PART) == image.part(0, PART))


def test_a_404_that_was_a_mistake_does_not_hide_an_image_for_long(
    site: Site, expected_warnings: ExpectedWarnings
) -> None:
    """Glance's own, with its request id: its list of changes will never name the image again."""
    image = site.add()
    for _ in range(30):  # later changes of others, so that the next list does not overlap this image's
        site.front.glance.change(site.front.glance.add(b"x" * 4096), name="other")
    with opened(image.path) as fd:
        site.front.on(f"/{image.image_id}").respond(answers.not_found())
        expected_warnings(f"image {image.image_id}.*404")
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        site.front.behave()
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
    eventually(lambda: read_at(image.path, 2 * MIB, PART) == image.part(2 * MIB, PART))


@pytest.mark.parametrize("fault", [answers.status(404), answers.not_found()], ids=["of a proxy", "of Glance"])
def test_a_404_for_an_image_that_glance_knows_reaches_no_reader_when_the_next_try_succeeds(
    fault: answers.Fault, site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    with opened(image.path) as fd:
        site.front.on(image.file_path).respond(fault, times=1)
        expected_warnings(f"image {image.image_id}.*answered 404")
        assert pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART)
    assert read_at(image.path, 2 * MIB, PART) == image.part(2 * MIB, PART)


# --- bytes that are not their disk_format ------------------------------------------------------------


def qcow2(directory: Path, *options: str) -> bytes:
    path = directory / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "4M"], check=True)
    return path.read_bytes()


def padded(data: bytes) -> bytes:
    return data.ljust(2 * MIB, b"\0")


def iso() -> bytes:
    return padded(bytes(0x8000) + b"\x01CD001\x01" + b" " * 2041 + b"\xffCD001\x01")


def mbr() -> bytes:
    return padded(
        bytes(446) + struct.pack("<B3sB3sII", 0x80, b"\0\x02\0", 0x83, b"\xff" * 3, 1, 1000) + bytes(48) + b"\x55\xaa"
    )


def vmdk_text() -> bytes:
    return padded(b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\nRW 8192 FLAT "/etc/shadow" 0\n')


def refused_reason(site: Site, image_id: str) -> str:
    report = (site.mount.mountpoint / ".basefs" / "images" / f"{image_id}.json").read_text()
    return report[report.index('"refused_reason"') :].splitlines()[0]


@pytest.mark.parametrize("disk_format", ["raw", "iso", "ami", "aki", "ari"])
def test_a_qcow2_with_a_backing_file_is_hidden_whatever_it_says_it_is(
    disk_format: str, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * MIB))
    data = qcow2(tmp_path, "-b", str(tmp_path / "secret"), "-F", "raw")
    container = disk_format if disk_format.startswith("a") else "bare"
    image = site.add(data, disk_format=disk_format, container_format=container)
    for _ in range(2):
        assert errno_of(image.path.stat) == errno.ENOENT
        assert errno_of(image.path.open) == errno.ENOENT
    assert image.path.name not in os.listdir(site.mount.mountpoint)
    by_id = site.mount.mountpoint / ".basefs" / "by-id" / image.image_id
    assert errno_of(by_id.read_bytes) == errno.ENOENT
    assert "null" not in refused_reason(site, image.image_id)
    told = re.compile(rf"{image.image_id}.*is not shown|is not shown.*{image.image_id}")
    eventually(lambda: told.search(site.mount.log_text))
    assert len(told.findall(site.mount.log_text)) == 1, "told once"


@pytest.mark.parametrize(
    ("disk_format", "data", "is_shown"),
    [
        ("raw", iso(), False),
        ("raw", mbr(), True),
        ("raw", vmdk_text(), False),
        ("raw", padded(b"QFI\xfb\0\0\0\x03"), False),
        ("raw", padded(b"LUKS\xba\xbe\0\x01"), False),
        ("iso", iso(), True),
        ("iso", mbr(), False),
        ("iso", padded(b"nothing"), False),
        ("ami", padded(b"a file system"), True),
        ("ami", iso(), True),
        ("ari", padded(b"KDMV\x01\0\0\0"), False),
        ("aki", padded(b"conectix"), False),
        ("vmdk", padded(b"KDMV\x01\0\0\0"), False),
        ("qcow2", padded(b"plain"), False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_image_is_shown_if_its_bytes_are_what_it_says(
    disk_format: str, data: bytes, is_shown: bool, site: Site
) -> None:
    container = disk_format if disk_format in ("ami", "aki", "ari") else "bare"
    image = site.add(data, disk_format=disk_format, container_format=container)
    if is_shown:
        assert image.path.read_bytes() == data
    else:
        assert errno_of(image.path.stat) == errno.ENOENT
        assert image.path.name not in os.listdir(site.mount.mountpoint)
        assert "null" not in refused_reason(site, image.image_id)


def test_an_image_smaller_in_the_store_than_in_glance_is_not_shown(site: Site) -> None:
    image = site.add(is_new=True)
    site.front.glance.change(image.image_id, size=len(image.data) + 4096)
    assert errno_of(image.path.stat) == errno.ENOENT
    eventually(lambda: "the store has" in site.mount.log_text)
