"""Programs that nova and operators let loose on `_base`, on the mount and on what they made."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.lower_mount import LowerMount, LowerSubdirectory

pytestmark = pytest.mark.mount

MIB = 1 << 20


@pytest.fixture(scope="module")
def whole_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowerMount]:
    """One mount for the tests of this file."""
    with LowerMount(tmp_path_factory.mktemp("lower") / "base") as mounted:
        yield mounted


@pytest.fixture
def mount(whole_mount: LowerMount, request: pytest.FixtureRequest) -> Iterator[LowerSubdirectory]:
    """An empty directory of it; at the end everything is forgotten."""
    with LowerSubdirectory(whole_mount, request.node.name) as directory:
        yield directory
    assert whole_mount.forget_all() == [0, 0, 0]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """A qcow2 of 24 MiB, a third of it data."""
    raw, path = tmp_path / "image.raw", tmp_path / "image.qcow2"
    with open(raw, "wb") as file:
        file.truncate(24 * MIB)
        for start in (0, 8 * MIB, 20 * MIB):
            file.seek(start)
            file.write(os.urandom(3 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


@pytest.mark.parametrize("cache", ["none", "writeback", "directsync"])
def test_qemu_img_converts_within_the_mount(mount: LowerSubdirectory, qcow2: Path, cache: str) -> None:
    """As nova does: .part, convert -t none to .converted, unlink, rename."""
    part, converted, name = (mount.path / f"x{end}" for end in (".part", ".converted", ""))
    part.write_bytes(qcow2.read_bytes())
    assert json.loads(run("qemu-img", "info", part, "--force-share", "--output=json"))["format"] == "qcow2"
    run("qemu-img", "convert", "-t", cache, "-O", "raw", "-f", "qcow2", part, converted)
    os.unlink(part)
    assert json.loads(run("qemu-img", "info", converted, "--force-share", "--output=json"))["format"] == "raw"
    os.rename(converted, name)
    assert os.listdir(mount.beneath) == ["x"]
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", name, qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", mount.beneath / "x", qcow2)
    run("qemu-img", "compare", "-T", "none", "-f", "raw", "-F", "qcow2", name, qcow2)


def test_overlay_on_a_lower_base_is_made_and_read(mount: LowerSubdirectory, qcow2: Path, tmp_path: Path) -> None:
    base, overlay = mount.path / "base", tmp_path / "disk"
    run("qemu-img", "convert", "-O", "raw", qcow2, base)
    run("qemu-img", "create", "-f", "qcow2", "-o", f"backing_file={base},backing_fmt=raw", overlay)
    run("qemu-img", "compare", overlay, qcow2)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", "-c", "read -P 7 1M 1M", overlay)
    run("qemu-img", "convert", "-t", "none", "-O", "qcow2", "-f", "qcow2", overlay, tmp_path / "snapshot")


def test_qcow2_lives_and_is_resized_on_the_mount(mount: LowerSubdirectory) -> None:
    disk = mount.path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", disk, "64M")
    for cache in ("none", "writeback"):
        run("qemu-io", "-f", "qcow2", "-t", cache, "-c", "write -P 9 0 8M", "-c", "discard 1M 1M", "-c", "flush", disk)
    run("qemu-img", "resize", "-f", "qcow2", disk, "96M")
    run("qemu-img", "check", "-f", "qcow2", disk)
    run("qemu-img", "check", "-f", "qcow2", mount.beneath / "disk.qcow2")


def test_ephemeral_and_swap_as_nova_makes_them(mount: LowerSubdirectory) -> None:
    ephemeral, swap = mount.path / "ephemeral_1_40d1d2c", mount.path / "swap_64"
    run("qemu-img", "create", "-f", "raw", ephemeral, "1G")
    run("mkfs", "-t", "ext4", "-F", "-L", "ephemeral0", ephemeral)
    run("e2fsck", "-f", "-n", ephemeral)
    run("e2fsck", "-f", "-n", mount.beneath / ephemeral.name)
    run("qemu-img", "create", "-f", "raw", swap, "64M")
    run("mkswap", swap)
    with open(mount.beneath / "swap_64", "rb") as file:
        assert os.pread(file.fileno(), 10, 4086) == b"SWAPSPACE2"
    run("mkfs.vfat", "-n", "EPHEMERAL", "-I", ephemeral)
    run("fsck.vfat", "-n", ephemeral)
    for path in (ephemeral, swap):
        os.utime(path)
        assert json.loads(run("qemu-img", "info", path, "--force-share", "--output=json"))["format"] == "raw"


def test_file_system_in_a_file_is_mounted_and_written(mount: LowerSubdirectory, tmp_path: Path) -> None:
    image, inside = mount.path / "image", tmp_path / "inside"
    inside.mkdir()
    run("truncate", "-s", "64M", image)
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, inside)
    try:
        (inside / "file").write_bytes(b"loop" * MIB)
        os.sync()
    finally:
        run("umount", inside)
    run("e2fsck", "-f", "-n", mount.beneath / "image")


def test_copies_keep_bytes_and_holes(mount: LowerSubdirectory, tmp_path: Path) -> None:
    original = tmp_path / "original"
    with open(original, "wb") as file:
        file.truncate(12 * MIB)
        file.seek(8 * MIB)
        file.write(os.urandom(MIB))
    os.chown(original, 12, 34)
    os.utime(original, ns=(1_600_000_000_000_000_001, 1_700_000_000_000_000_001))
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    run("cp", "-a", "--sparse=always", original, mount.path / "in")
    run("cp", "-r", mount.path / "in", mount.path / "again")
    run("cp", "-a", mount.path / "in", tmp_path / "out")
    run("tar", "-C", mount.path, "-cSf", mount.path / "x.tar", "in")
    run("mkdir", mount.path / "dir")
    run("tar", "-C", mount.path / "dir", "-xSf", mount.path / "x.tar")
    run("dd", f"if={mount.path}/in", f"of={mount.path}/dd", "bs=1M", "oflag=direct", "iflag=direct", "status=none")
    run("mv", mount.path / "dd", mount.path / "dir" / "dd")
    for path in (
        mount.path / "in",
        mount.path / "again",
        tmp_path / "out",
        mount.path / "dir/in",
        mount.path / "dir/dd",
    ):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, path
    for path in (mount.path / "in", tmp_path / "out", mount.path / "dir/in"):
        status = os.stat(path)
        assert (status.st_uid, status.st_gid, status.st_blocks < 4 * MIB // 512) == (12, 34, True), path
    assert os.stat(tmp_path / "out").st_mtime_ns == os.stat(original).st_mtime_ns


def test_fsx_like_mix_of_qemu_io_requests_reads_back(mount: LowerSubdirectory) -> None:
    disk = mount.path / "disk"
    run("truncate", "-s", "32M", disk)
    writes = [f"write -P {n} {n * 37 % 31}M {512 * (n * 7 % 300 + 1)}" for n in range(1, 60)]
    plain = mount.beneath / "plain"
    run("truncate", "-s", "32M", plain)
    for path, cache in ((disk, "none"), (plain, "writeback")):
        run("qemu-io", "-f", "raw", "-t", cache, *[part for write in writes for part in ("-c", write)], path)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, plain)
