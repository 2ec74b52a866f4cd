"""qemu-img and qemu-io over the mount: what they read is what was uploaded, however they read it."""

import json
import mmap
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.qemu.conftest import Exposed
from tests.qemu.shared_mount import shared_mount
from tools.guest import create_overlay
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]

Expose = Callable[..., Exposed]
SECTOR_BYTES = 512
KIB = 1024
MIB = 1024 * KIB
COMMAND_DEADLINE_S = 60.0
# Around the sector, the page, the chunk, the kernel's largest request, and the 256 KiB that are read at first.
ODD_SIZES = [1, 511, 513, 4095, 4097, 65535, 65537, 256 * KIB + 1, MIB - 1, 3 * MIB + 12345]


def run(*command: str | os.PathLike[str]) -> str:
    """What the command wrote; its complaint when it failed."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def refusal(*command: str | os.PathLike[str]) -> str:
    """What the command complained of; it must fail."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert ended.returncode != 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stderr + ended.stdout


def info_of(path: Path) -> dict[str, object]:
    """`qemu-img info` as nova runs it: the format is probed."""
    info: dict[str, object] = json.loads(run("qemu-img", "info", path, "--force-share", "--output=json"))
    return info


def as_disk(content: bytes) -> bytes:
    """What a guest sees: whole sectors, the last one filled with zeros."""
    return content + bytes(-len(content) % SECTOR_BYTES)


def read_with_qemu_io(path: Path, reads: list[tuple[int, int]], *options: str) -> list[bytes]:
    """The bytes of each (offset, length), out of one qemu-io."""
    commands = [argument for offset, length in reads for argument in ("-c", f"read -v {offset} {length}")]
    said = run("qemu-io", "-r", *options, *commands, path)
    answers, dump = [], ""
    for line in said.splitlines():
        if row := re.match(r"[0-9a-f]{8,}:  ((?:[0-9a-f]{2} )+)", line):
            dump += row[1]
        elif line.startswith("read "):
            answers.append(bytes.fromhex(dump))
            dump = ""
    return answers


@pytest.mark.parametrize("size", ODD_SIZES)
def test_an_image_of_any_size_is_identical_and_raw(expose: Expose, size: int) -> None:
    image = expose(size)
    info = info_of(image.path)
    assert info["format"] == "raw"
    assert info["virtual-size"] == len(as_disk(image.content))
    assert "backing-filename" not in info
    compared = run("qemu-img", "compare", "-f", "raw", "-F", "raw", image.path, image.original)
    assert compared == "Images are identical.\n"


@pytest.mark.parametrize("size", [1, 511, 65537, MIB - 1])
def test_convert_with_o_direct_copies_each_byte(expose: Expose, size: int, tmp_path: Path) -> None:
    image = expose(size)
    convert = ("qemu-img", "convert", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none")
    run(*convert, image.path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == as_disk(image.content)


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_reads_at_odd_offsets_are_exact_with_each_kind_of_aio(expose: Expose, aio: str, cache: str) -> None:
    if (aio, cache) == ("native", "writeback"):
        cache = "directsync"  # qemu has native aio with O_DIRECT only
    image = expose(2 * MIB + 777)
    dice = Random(7)
    spans = [(dice.randrange(len(image.content)), dice.choice([1, 511, 512, 4096, 65537])) for _ in range(24)]
    reads = [(offset, min(length, len(image.content) - offset)) for offset, length in spans]
    answers = read_with_qemu_io(image.path, reads, "-f", "raw", "-t", cache, "-i", aio)
    assert answers == [image.content[offset : offset + length] for offset, length in reads]


@pytest.mark.parametrize("size", [1, 511, 65537, 3 * 65536 - 1])
def test_a_larger_overlay_reads_zeros_behind_the_end_of_its_base(expose: Expose, size: int, tmp_path: Path) -> None:
    image = expose(size)
    overlay = tmp_path / "overlay"
    create_overlay(image.path, overlay)
    run("qemu-img", "resize", "-q", overlay, str(MIB))
    disk = image.content + bytes(MIB - size)
    reads = [(max(0, size - 700), 1400), (0, 128 * KIB), (size, 1), (MIB - 4096, 4096)]
    answers = read_with_qemu_io(overlay, reads, "-f", "qcow2", "-t", "none")
    assert answers == [disk[offset : offset + length] for offset, length in reads]


def test_an_overlay_names_its_base_as_raw_and_reads_as_it(expose: Expose, tmp_path: Path) -> None:
    image = expose(MIB + 1)
    overlay = tmp_path / "overlay"
    create_overlay(image.path, overlay)
    info = info_of(overlay)
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(image.path), "raw")
    compared = run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", overlay, image.original)
    assert compared == "Images are identical.\n"


def test_a_write_to_an_overlay_copies_what_surrounds_it_out_of_the_base(expose: Expose, tmp_path: Path) -> None:
    image = expose(3 * 65536 + 100)
    overlay = tmp_path / "overlay"
    create_overlay(image.path, overlay)
    spots = [(70000, 3), (65536 * 3, 50), (5, 1000)]
    writes = [argument for offset, length in spots for argument in ("-c", f"write -P 0x5a {offset} {length}")]
    run("qemu-io", "-f", "qcow2", "-t", "none", *writes, overlay)
    expected = bytearray(as_disk(image.content))
    for offset, length in spots:
        expected[offset : offset + length] = b"\x5a" * length
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == expected
    assert image.path.read_bytes() == image.content


def test_nothing_writes_to_a_base(expose: Expose, tmp_path: Path) -> None:
    image = expose(MIB)
    overlay = tmp_path / "overlay"
    create_overlay(image.path, overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 4096", overlay)
    assert "Read-only file system" in refusal("qemu-img", "commit", "-f", "qcow2", overlay)
    assert "Read-only file system" in refusal("qemu-io", "-f", "raw", "-c", "write 0 512", image.path)
    assert "Read-only file system" in refusal("qemu-img", "resize", "-f", "raw", image.path, str(2 * MIB))
    assert image.path.read_bytes() == image.content


def test_many_readers_of_a_cold_image_all_get_all_of_it(expose: Expose, tmp_path: Path) -> None:
    image = expose(4 * MIB + 3)
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", "-T"]
    readers = [
        subprocess.Popen([*compare, cache, image.path, image.original], stdout=subprocess.PIPE, text=True)
        for cache in ("none", "writeback") * 4
    ]
    answers = [reader.communicate(timeout=COMMAND_DEADLINE_S)[0] for reader in readers]
    assert answers == ["Images are identical.\n"] * len(readers)


def test_a_mapping_and_direct_reads_of_one_file_agree(expose: Expose) -> None:
    image = expose(MIB + 5000)
    with image.path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[65530:65550] == image.content[65530:65550]
        answers = read_with_qemu_io(image.path, [(0, 200 * KIB)], "-f", "raw", "-t", "none")
        assert answers == [image.content[: 200 * KIB]]
        assert mapping[:] == image.content


def iso_image() -> bytes:
    """The least that is an ISO 9660 image: a primary volume descriptor and the terminator, then some data."""
    volume = b"\x01CD001\x01" + bytes(73) + (20).to_bytes(4, "little") + (20).to_bytes(4, "big")
    volume += bytes(40) + (2048).to_bytes(2, "little") + (2048).to_bytes(2, "big")
    terminator = b"\xffCD001\x01"
    return bytes(32 * KIB) + volume.ljust(2048, b"\0") + terminator.ljust(2048, b"\0") + Random(1).randbytes(4096)


@pytest.mark.parametrize(
    ("disk_format", "container_format", "content"),
    [
        ("iso", "bare", iso_image()),
        ("ami", "ami", bytes(1080) + b"\x53\xef" + Random(2).randbytes(300_001)),
        ("aki", "aki", b"MZ" + Random(3).randbytes(70_001)),
        ("ari", "ari", b"\x1f\x8b\x08" + Random(4).randbytes(90_001)),
    ],
)
def test_the_formats_shown_as_stored_are_raw_to_qemu(
    expose: Expose, disk_format: str, container_format: str, content: bytes
) -> None:
    image = expose(content, disk_format, container_format)
    assert info_of(image.path)["format"] == "raw"
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image.path, image.original)
    assert image.path.read_bytes() == content


@pytest.fixture(scope="module")
def stored_mount(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """For fleets with force_raw_images=False."""
    with shared_mount(tmp_path_factory.mktemp("stored") / "basefs", rig, {"view": "stored"}) as mounted:
        yield mounted


def test_a_qcow2_shown_as_stored_is_qcow2_and_its_overlay_reads_as_its_disk(
    rig: Rig, mount: BasefsMount, stored_mount: BasefsMount, tmp_path: Path
) -> None:
    disk, packed, overlay = tmp_path / "disk", tmp_path / "packed", tmp_path / "overlay"
    disk.write_bytes(Random(5).randbytes(MIB) + bytes(MIB) + Random(6).randbytes(512))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", disk, packed)
    image_id = rig.upload(packed, "packed", "qcow2")
    path = stored_mount.path(image_id)
    assert info_of(path)["format"] == "qcow2"
    assert path.read_bytes() == packed.read_bytes()
    run("qemu-img", "check", "-f", "qcow2", "-U", path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"backing_file={path},backing_fmt=qcow2", overlay)
    compare = ("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "-T", "none")
    assert "identical" in run(*compare, overlay, disk)
    # Over the same Glance, where the raw view is promised:
    base, overlay = mount.path(image_id), tmp_path / "overlay-on-raw"
    assert info_of(base)["format"] == "raw"
    assert base.stat().st_size == disk.stat().st_size
    create_overlay(base, overlay)
    assert "identical" in run(*compare, overlay, disk)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "-T", "none", base, packed)
