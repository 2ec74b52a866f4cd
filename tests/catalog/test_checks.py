"""The checks refuse what nova refuses at download, whatever the bytes, and never fail themselves."""

import json
import os
import struct
import subprocess
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basefs.catalog.checks import HEADER_BYTES_MAX, content_verdict, disk_verdict, metadata_verdict
from basefs.catalog.qemu_probe import format_seen_by_qemu
from basefs.catalog.records import ImageRecord, Verdict

MIB = 1024 * 1024
RECORD = ImageRecord(
    image_id="7d6b3c2e-0000-4000-8000-000000000000",
    name="disk",
    size=4 * MIB,
    disk_format="raw",
    container_format="bare",
    status="active",
    visibility="public",
    os_hidden=False,
    owner="o",
    created_at="2026-11-22T00:00:00Z",
    updated_at="2026-11-22T00:00:00Z",
    checksum=None,
    os_hash_algo=None,
    os_hash_value=None,
    is_signed=False,
)


def verdict_of(data: bytes, disk_format: str = "raw", *, view: str = "raw"):
    record = replace(RECORD, size=len(data), disk_format=disk_format)
    return content_verdict(record, data[:HEADER_BYTES_MAX], view=view)


def mbr(*partitions: bytes, size: int = MIB) -> bytes:
    table = b"".join(partitions).ljust(64, b"\0")
    return (b"\0" * 446 + table + b"\x55\xaa").ljust(size, b"\0")


def partition(kind: int, *, boot: int = 0x80, start: int = 2048, chs: bytes = b"\0\2\0") -> bytes:
    return struct.pack("<B3sB3sII", boot, chs, kind, b"\xff\xff\xff", start, 100_000)


PROTECTIVE = partition(0xEE, boot=0, start=1)


def iso(front: bytes = b"") -> bytes:
    volume = b"\1CD001\1".ljust(2048, b"\0")
    return front.ljust(32 * 1024, b"\0") + volume + b"\0" * MIB


# --- metadata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk_format", ["raw", "iso", "ami", "aki", "ari", "qcow2"])
@pytest.mark.parametrize("container_format", ["bare", "ami", "aki", "ari"])
def test_metadata_leave_the_decision_to_the_content(disk_format, container_format):
    record = replace(RECORD, disk_format=disk_format, container_format=container_format, is_signed=True)
    assert metadata_verdict(record, verify_signatures=False).state == "unchecked"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *[({"status": status}, status) for status in ("queued", "saving", "importing", "deactivated", "killed", "")],
        ({"size": None}, "size"),
        ({"size": 0}, "empty"),
        *[({"disk_format": f}, f) for f in ("vmdk", "vdi", "vhd", "vhdx", "ploop", "gpt", "luks", "qed", "RAW")],
        ({"disk_format": None}, "None"),
        *[({"container_format": c}, c) for c in ("ova", "ovf", "docker", "compressed")],
        ({"container_format": None}, "None"),
        ({"is_signed": True}, "signed"),
    ],
)
def test_metadata_refuse_with_a_reason(changes, reason):
    verdict = metadata_verdict(replace(RECORD, **changes), verify_signatures=True)
    assert verdict.state == "refused"
    assert reason in verdict.reason


# --- content ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "formats"),
    [
        (b"\0" * MIB, ["raw", "ami", "aki", "ari"]),
        (b"x", ["raw", "ami"]),
        (os.urandom(MIB), ["raw", "ami"]),
        (b"plain text\n" * 100_000, ["raw", "aki"]),
        (mbr(partition(0x83)), ["raw", "ami"]),
        (mbr(PROTECTIVE), ["raw", "ami"]),
        (iso(), ["iso", "ami"]),
        (iso(mbr(PROTECTIVE, size=512)), ["iso", "ami"]),
        (iso(mbr(partition(0x17, boot=0x80), size=512)), ["iso"]),
    ],
)
def test_what_nova_accepts_is_servable(data, formats):
    for disk_format in formats:
        assert verdict_of(data, disk_format) == verdict_of(b"\0" * MIB), disk_format


@pytest.mark.parametrize(
    ("data", "disk_format", "reason"),
    [
        (iso(), "raw", "content is iso"),
        (b"\0" * MIB, "iso", "content is raw"),
        (mbr(partition(0x83)), "iso", "content is gpt"),
        (mbr(PROTECTIVE, partition(0x83)), "raw", "mbr: GPT MBR defines invalid extra partitions"),
        (mbr(partition(0x83, boot=0x7F)), "raw", "mbr: MBR PTE 0 has invalid boot flag"),
        (mbr(), "raw", "mbr: GPT MBR has no partitions defined"),
        (b"QFI\xfb".ljust(MIB, b"\0"), "raw", "safety check"),
        (b"QED\0".ljust(MIB, b"\0"), "raw", "banned"),
        (b"LUKS\xba\xbe\0\1".ljust(MIB, b"\0"), "raw", "luks|safety"),
        (b"conectix".ljust(MIB, b"\0"), "raw", "vhd"),
        (b"\0" * 64 + b"\x7f\x10\xda\xbe" + b"\0" * MIB, "raw", "vdi"),
        (b"vhdxfile".ljust(MIB, b"\0"), "raw", ""),
        (b"KDMV\1\0\0\0".ljust(MIB, b"\0"), "raw", ""),
        (b"COWD".ljust(MIB, b"\0"), "raw", "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\n".ljust(MIB, b"\n"), "raw", ""),
        (b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\n'.ljust(MIB, b"#"), "raw", ""),
        (b"\n \n# x\nVersion=3\n".ljust(MIB, b"\0"), "raw", "vmdk"),
        (b"WithoutFreeSpace".ljust(MIB, b"\0"), "raw", "parallels"),
        (b"Bochs Virtual HD Image\0".ljust(MIB, b"\0"), "raw", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$1".ljust(MIB, b"\0"), "raw", "cloop"),
        (iso(b"QFI\xfb\0\0\0\3"), "iso", "several formats at once: iso, qcow2"),
        (iso(b"QFI\xfb\0\0\0\3"), "raw", "several formats"),
    ],
)
def test_what_nova_refuses_is_refused_with_the_reason(data, disk_format, reason):
    verdict = verdict_of(data, disk_format)
    assert verdict.state == "refused"
    assert any(part in verdict.reason for part in reason.split("|"))
    if disk_format == "raw":
        assert verdict_of(data, "ami").state == "refused" or "iso" in reason


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES_MAX - 1])
def test_a_header_that_is_not_all_there_is_refused(length):
    assert content_verdict(RECORD, b"\0" * length, view="raw").reason == f"only {length} bytes of its header are there"


# --- real files of qemu-img --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files as qemu-img makes them, by name."""
    directory = tmp_path_factory.mktemp("images")
    made = {}

    def create(name: str, *argv: str) -> None:
        path = directory / name
        subprocess.run(["qemu-img", "create", "-q", *argv, str(path), "8M"], check=True, cwd=directory)
        made[name] = path

    create("raw", "-f", "raw")
    create("qcow2", "-f", "qcow2")
    create("qcow2-v2", "-f", "qcow2", "-o", "compat=0.10")
    create("qcow2-subclusters", "-f", "qcow2", "-o", "extended_l2=on")
    create("qcow2-backed", "-f", "qcow2", "-b", "raw", "-F", "raw")
    create("qcow2-data-file", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on")
    create(
        "qcow2-luks",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1",
    )
    create("luks", "-f", "luks", "--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=1")
    for kind in ("qcow", "qed", "vdi", "vpc", "vhdx", "vmdk", "parallels"):
        create(kind, "-f", kind)
    for kind in ("streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse"):
        create(f"vmdk-{kind}", "-f", "vmdk", "-o", f"subformat={kind}")
    unknown = bytearray(made["qcow2"].read_bytes())
    unknown[0x48] |= 0x40  # an incompatible feature that nobody knows
    made["qcow2-unknown-feature"] = directory / "qcow2-unknown-feature"
    made["qcow2-unknown-feature"].write_bytes(unknown)
    return made


NOT_RAW = [
    *("qcow2", "qcow2-v2", "qcow2-backed", "qcow2-data-file", "qcow2-luks", "qcow2-unknown-feature", "luks", "qcow"),
    "qcow2-subclusters",  # an unknown feature for the inspectors: nova refuses such an image, too
    *("qed", "vdi", "vpc", "vhdx", "vmdk", "parallels"),
    *("vmdk-streamOptimized", "vmdk-monolithicFlat", "vmdk-twoGbMaxExtentSparse"),
]


@pytest.mark.parametrize("name", NOT_RAW)
@pytest.mark.parametrize("disk_format", ["raw", "iso", "ami", "aki", "ari"])
def test_nothing_that_qemu_does_not_take_for_raw_is_shown_as_raw(images, name, disk_format):
    assert verdict_of(images[name].read_bytes(), disk_format).state == "refused"


@pytest.mark.parametrize("name", ["qcow2", "qcow2-v2"])
def test_a_plain_qcow2_is_servable_as_it_is_stored(images, name):
    assert verdict_of(images[name].read_bytes(), "qcow2", view="stored").state == "servable"


@pytest.mark.parametrize("name", ["raw", *NOT_RAW])
def test_only_a_plain_qcow2_is_servable_as_one(images, name):
    # nova too accepts LUKS inside qcow2: the overlay's user brings the key.
    expected = "servable" if name in ("qcow2", "qcow2-v2", "qcow2-luks") else "refused"
    assert verdict_of(images[name].read_bytes(), "qcow2", view="stored").state == expected


@pytest.mark.parametrize("name", ["raw", *NOT_RAW])
def test_only_a_plain_qcow2_has_a_raw_view(images, name):
    verdict = verdict_of(images[name].read_bytes(), "qcow2", view="raw")
    if name in ("qcow2", "qcow2-v2"):
        assert (verdict.state, verdict.shown_size) == ("servable", 8 * MIB)
        assert disk_verdict(verdict, b"\0" * HEADER_BYTES_MAX) == verdict
    else:
        assert verdict.state == "refused"
    if name == "qcow2-luks":
        assert verdict.reason == "its qcow2 has no raw view: it is encrypted (LUKS)"


@pytest.mark.parametrize("name", NOT_RAW)
def test_a_qcow2_whose_disk_qemu_would_not_take_for_raw_is_refused(images, name):
    # nova converts and then asks `qemu-img info`: what it would not have as a base is not shown.
    servable = Verdict(state="servable", shown_size=1 << 30)
    first = images[name].read_bytes()[:HEADER_BYTES_MAX].ljust(HEADER_BYTES_MAX, b"\0")
    verdict = disk_verdict(servable, first)
    assert verdict.state == "refused"
    assert "the disk in it" in verdict.reason


@pytest.mark.parametrize("disk", [b"\0" * 4096, mbr(partition(0x83)), mbr(PROTECTIVE), iso(), os.urandom(MIB)])
def test_a_qcow2_whose_disk_nova_takes_for_raw_is_servable(disk):
    servable = Verdict(state="servable", shown_size=len(disk))
    assert disk_verdict(servable, disk[:HEADER_BYTES_MAX]) is servable


@pytest.mark.parametrize("name", ["qcow2-backed", "qcow2-data-file", "qcow2-unknown-feature"])
def test_the_reason_says_what_is_wrong_with_a_qcow2(images, name):
    reason = verdict_of(images[name].read_bytes(), "qcow2", view="stored").reason
    assert {
        "qcow2-backed": "backing_file",
        "qcow2-data-file": "data_file",
        "qcow2-unknown-feature": "unknown_features",
    }[name] in reason


def test_the_table_of_magics_agrees_with_qemu(images):
    for name, path in images.items():
        out = subprocess.run(
            ["qemu-img", "info", "-U", "--output=json", str(path)], capture_output=True, text=True, check=False
        ).stdout
        seen = json.loads(out)["format"] if out else name.partition("-")[0]
        found = format_seen_by_qemu(path.read_bytes()[:4096])
        assert (found or "raw") == {"qcow": "qcow2"}.get(seen, seen), name


# --- hostile bytes -------------------------------------------------------------------------------------------

MAGICS = [
    *(b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"QED\0", b"KDMV\1\0\0\0", b"KDMV\3\0\0\0", b"COWD", b"conectix"),
    *(b"vhdxfile", b"LUKS\xba\xbe\0\1", b"LUKS\xba\xbe\0\2", b"# Disk DescriptorFile\nversion=1\n", b'createType="x"'),
    *(b"\x7f\x10\xda\xbe", b"\1CD001\1", b"\x55\xaa", b"regi", b"\xff" * 8, b"\0" * 8, b"head", b"metadata"),
]
OFFSETS = [0, 64, 446, 510, 512, 4096, 32 * 1024, 64 * 1024, 192 * 1024, 192 * 1024 + 16, 256 * 1024 - 8]
PLANTED = st.lists(
    st.tuples(st.sampled_from(OFFSETS) | st.integers(0, 300_000), st.sampled_from(MAGICS) | st.binary(max_size=600)),
    max_size=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    planted=PLANTED,
    fill=st.sampled_from([b"\0", b"\xff", b"a", b"\n", b"\x80"]),
    size=st.integers(1, 300_000) | st.sampled_from([511, 512, 4096, HEADER_BYTES_MAX, HEADER_BYTES_MAX + 1]),
    disk_format=st.sampled_from(["raw", "iso", "ami", "qcow2", "vmdk"]),
    view=st.sampled_from(["raw", "stored"]),
)
def test_hostile_bytes_get_a_verdict_soon_and_only_raw_ones_are_shown_as_raw(planted, fill, size, disk_format, view):
    data = bytearray(fill * size)
    for offset, magic in planted:
        data[offset : offset + len(magic)] = magic
    data = bytes(data[:size])
    began = time.process_time()
    verdict = verdict_of(data, disk_format, view=view)
    assert time.process_time() - began < 1.0
    assert verdict.state in ("servable", "refused")
    assert (verdict.reason is None) == (verdict.state == "servable")
    if verdict.state == "servable":
        assert (verdict.shown_size is not None) == (disk_format == "qcow2" and view == "raw")
        assert format_seen_by_qemu(data) == ("qcow2" if disk_format == "qcow2" else None)


@settings(max_examples=60, deadline=None)
@given(head=st.binary(max_size=4096) | st.text(alphabet="#\n versionVERSION=123 abc", max_size=300).map(str.encode))
def test_the_table_of_magics_never_takes_for_raw_what_qemu_does_not(tmp_path_factory, head):
    path = tmp_path_factory.mktemp("probe") / "file"
    path.write_bytes(head.ljust(8192, b"\0"))
    if format_seen_by_qemu(path.read_bytes()) is None:
        out = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
        assert json.loads(out)["format"] == "raw"
