"""docs/SEMANTICS.md, section 11: which images are shown, with either `view`."""

import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import errno_of, front_mount, report
from tests.semantics.test_quotes import DOCUMENT
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

_ROW = re.compile(
    r"^\| (\w+) \| (\w+) \| (the stored bytes|the disk in it|refused) \| (the stored bytes|refused) \|$", re.MULTILINE
)
ROWS = [row.groups() for row in _ROW.finditer(DOCUMENT.read_text(encoding="utf-8"))]
RAW = Random(8).randbytes(300_000)


def iso() -> bytes:
    data = bytearray(400_000)
    data[32768:32775] = b"\x01CD001\x01"
    return bytes(data)


def gpt() -> bytes:
    """A protective MBR and what follows it."""
    data = bytearray(RAW)
    data[:512] = bytes(512)
    data[446:462] = struct.pack("<BBBBBBBBII", 0, 0, 2, 0, 0xEE, 255, 255, 255, 1, 0xFFFFFFFF)
    data[510:512] = b"\x55\xaa"
    data[512:520] = b"EFI PART"
    return bytes(data)


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("qcow2") / "image"
    raw = path.with_suffix(".raw")
    raw.write_bytes(RAW)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def front(qcow2: bytes) -> Iterator[MisbehavingFront]:
    contents = {"qcow2": qcow2, "iso": iso()}
    with MisbehavingFront() as running:
        for disk_format, container_format, _, _ in ROWS:
            data = contents.get(disk_format, RAW)
            running.glance.add(
                data,
                id=image_id(disk_format, container_format),
                disk_format=disk_format,
                container_format=container_format,
            )
        running.glance.add(qcow2, id="a-raw-that-is-a-qcow2")
        running.glance.add(RAW, id="a-qcow2-that-is-raw", disk_format="qcow2")
        running.glance.add(RAW, id="an-iso-that-is-raw", disk_format="iso")
        running.glance.add(gpt(), id="a-raw-that-is-a-gpt-disk")
        running.glance.add(RAW, id="signed", img_signature="c2lnbmVk", img_signature_hash_method="SHA-256")
        for status in ("queued", "saving", "deactivated", "killed", "pending_delete", "importing"):
            running.glance.add(RAW, id=f"is-{status}", status=status)
        running.glance.add(b"", id="is-empty")
        yield running


def image_id(disk_format: str, container_format: str) -> str:
    return f"{disk_format}-in-{container_format}"


@pytest.fixture(scope="module")
def raw_view(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    with front_mount(front, tmp_path_factory.mktemp("raw") / "basefs", {"catalog_refresh_s": 0.2}) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def stored_view(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """Where signatures are verified, too."""
    options = {"view": "stored", "verify_glance_signatures": True}
    with front_mount(front, tmp_path_factory.mktemp("stored") / "basefs", options) as mounted:
        yield mounted


def shown(front: MisbehavingFront, mount: BasefsMount, image: str) -> str:
    """As the table says it."""
    path: Path = mount.path(image)
    if errno_of(path.stat) == "ENOENT":
        assert report(mount, image)["state"] == "refused"
        assert report(mount, image)["refused_reason"]
        return "refused"
    assert report(mount, image)["refused_reason"] is None
    found = path.read_bytes()
    assert report(mount, image)["shown_size"] == len(found) == path.stat().st_size
    if found == front.glance.data[image]:
        return "the stored bytes"
    assert found == RAW + bytes(-len(RAW) % 512)
    return "the disk in it"


def test_the_table(front: MisbehavingFront, raw_view: BasefsMount, stored_view: BasefsMount) -> None:
    """[S1101] Images are shown by their `disk_format` and `container_format` as this table says; the others are
    refused.
    """
    assert len(ROWS) == 15
    seen = []
    for disk_format, container_format, _, _ in ROWS:
        image = image_id(disk_format, container_format)
        seen.append((disk_format, container_format, shown(front, raw_view, image), shown(front, stored_view, image)))
    assert seen == ROWS


def test_a_refusal_says_why(front: MisbehavingFront, raw_view: BasefsMount) -> None:
    """[S1102] A refused image is ENOENT, so nova downloads it by itself, and `basefs image show` says why in
    `refused_reason`.
    """
    image = image_id("vmdk", "bare")
    assert errno_of(raw_view.path(image).stat) == "ENOENT"
    assert "vmdk" in raw_view.image(image)["refused_reason"]
    # nova's own download
    part = raw_view.path(image).with_suffix(".part")
    part.write_bytes(b"converted by nova")
    part.rename(raw_view.path(image))
    assert raw_view.path(image).read_bytes() == b"converted by nova"
    raw_view.path(image).unlink()
    # Not to be had by basefs: its next look-up tries again.
    denied = front.glance.add(RAW, id="denied")
    front.on("/denied/file").respond(answers.status(403))
    assert errno_of(raw_view.path(denied).stat) == "ENOENT"
    assert "403" in raw_view.image(denied)["refused_reason"]
    front.behave()
    assert shown(front, raw_view, denied) == "the stored bytes"


def test_bytes_that_are_not_what_they_are_called(front: MisbehavingFront, raw_view: BasefsMount) -> None:
    """[S1103] An image whose bytes are not its `disk_format` is refused; a raw image may be a GPT disk."""
    for image in ("a-raw-that-is-a-qcow2", "a-qcow2-that-is-raw", "an-iso-that-is-raw"):
        assert shown(front, raw_view, image) == "refused"
    assert shown(front, raw_view, "a-raw-that-is-a-gpt-disk") == "the stored bytes"


def test_bytes_that_are_not_what_they_are_called_with_the_stored_view(
    front: MisbehavingFront, stored_view: BasefsMount
) -> None:
    """[S1103] An image whose bytes are not its `disk_format` is refused; a raw image may be a GPT disk."""
    for image in ("a-raw-that-is-a-qcow2", "a-qcow2-that-is-raw", "an-iso-that-is-raw"):
        assert shown(front, stored_view, image) == "refused"


def test_only_active_images(front: MisbehavingFront, raw_view: BasefsMount) -> None:
    """[S1104] An image that is not active is refused, and shown once it is active."""
    for image in sorted(front.glance.images):
        if image.startswith("is-"):
            assert shown(front, raw_view, image) == "refused"


def test_qcow2_images_without_a_raw_view(front: MisbehavingFront, raw_view: BasefsMount, tmp_path: Path) -> None:
    """[S1107] With `view = raw` a qcow2 image is refused that has a backing file, an external data file, encryption,
    the mark of a corrupt one, or incompatible features that nobody knows.
    """
    secret = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1")
    for name, options in {
        "backing": ("-u", "-b", "/etc/passwd", "-F", "raw"),
        "data": ("-o", "data_file=of-its-own,data_file_raw=on"),
        "encrypted": secret,
        "plain": (),
    }.items():
        path = tmp_path / name
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True, cwd=tmp_path)
    plain = (tmp_path / "plain").read_bytes()
    images = {name: (tmp_path / name).read_bytes() for name in ("backing", "data", "encrypted")}
    images |= {name: plain[:79] + bytes([bits]) + plain[80:] for name, bits in (("corrupt", 2), ("features", 64))}
    for name, data in images.items():
        image = front.glance.add(data, disk_format="qcow2")
        assert shown(front, raw_view, image) == "refused"
        assert name in raw_view.image(image)["refused_reason"]


def test_a_disk_that_is_not_raw(front: MisbehavingFront, raw_view: BasefsMount, tmp_path: Path) -> None:
    """[S1108] With `view = raw` a qcow2 image is refused whose disk qemu would not take for raw, such as a qcow2 in a
    qcow2.
    """
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", inner, "1M"], check=True
    )
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, outer], check=True)
    image = front.glance.add(outer.read_bytes(), disk_format="qcow2")
    assert shown(front, raw_view, image) == "refused"
    assert "the disk in it" in raw_view.image(image)["refused_reason"]


def test_signed_images(front: MisbehavingFront, raw_view: BasefsMount, stored_view: BasefsMount) -> None:
    """[S1105] A signed image is refused where `verify_glance_signatures` is set."""
    assert shown(front, raw_view, "signed") == "the stored bytes"
    assert shown(front, stored_view, "signed") == "refused"
    assert "signed" in report(stored_view, "signed")["refused_reason"]
