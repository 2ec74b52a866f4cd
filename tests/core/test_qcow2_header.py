"""Which qcow2 files have a raw view, and why not."""

import struct

import pytest

from basefs.core.qcow2_header import L1_BYTES_MAX, qcow2_layout_of
from tests.views.qcow2_files import create, qemu
from tests.views.qcow2_writer import Cluster, Shape, Writer

GOOD = Writer(Shape(), [Cluster(kind="data")] * 3).data
V2 = Writer(Shape(version=2), [Cluster(kind="data")] * 3).data


def changed(at: int, form: str, value: int, data: bytes = GOOD) -> bytes:
    new = bytearray(data)
    struct.pack_into(form, new, at, value)
    return bytes(new)


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError) as raised:
        qcow2_layout_of(data, stored_size=len(data))
    return str(raised.value)


def test_a_plain_file_has_one():
    for data, version in ((GOOD, 3), (V2, 2)):
        layout = qcow2_layout_of(data, stored_size=len(data))
        assert (layout.version, layout.cluster_bits, layout.size) == (version, 16, 3 * 65536)
        assert (layout.compression, layout.has_subclusters) == ("zlib", False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no qcow2"),
        (b"QFI\xfb", "shorter than its header"),
        (GOOD[:104], "shorter than its header"),
        (changed(4, ">I", 1), "version 1"),
        (changed(4, ">I", 4), "version 4"),
        (changed(20, ">I", 8), r"clusters of 2**8 bytes"),
        (changed(20, ">I", 22), r"clusters of 2**22 bytes"),
        (changed(8, ">Q", 200, changed(16, ">I", 10)), "it has a backing file"),
        (changed(8, ">Q", 1 << 40), "a backing file's name of 0 bytes"),
        (changed(24, ">Q", 0), "its disk has 0 bytes"),
        (changed(24, ">Q", 511), "its disk has 511 bytes"),
        (changed(24, ">Q", (1 << 64) - 1), "too few for a disk of 18446744073709551615 bytes"),
        (changed(24, ">Q", 1 << 40), "its L1 table has 1 entries, too few for a disk of 1099511627776 bytes"),
        (changed(36, ">I", 0), "its L1 table has 0 entries, too few"),
        (changed(36, ">I", L1_BYTES_MAX // 8 + 1), "its L1 table has 4194305 entries"),
        (changed(40, ">Q", 0), "its L1 table at 0 is not between its header and its end"),
        (changed(40, ">Q", 1 << 30), "its L1 table at 1073741824 is not between its header and its end"),
        (changed(40, ">Q", 0x20008), "its L1 table is at 131080, which is no cluster"),
        (changed(40, ">Q", 1 << 63), "which is no cluster"),
        (changed(32, ">I", 1), "it is encrypted (AES)"),
        (changed(32, ">I", 2), "it is encrypted (LUKS)"),
        (changed(32, ">I", 9), "it is encrypted (method 9)"),
        (changed(72, ">Q", 2), "it is marked as corrupt"),
        (changed(72, ">Q", 4), "it has an external data file"),
        (changed(72, ">Q", 1 << 5), "it has unknown incompatible features: bit 5"),
        (changed(72, ">Q", 1 << 63 | 1 << 40), "unknown incompatible features: bit 40, bit 63"),
        (changed(72, ">Q", 8), "its compression type is 0"),
        (changed(104, ">B", 1), "its compression type is 1"),
        (changed(104, ">B", 2), "its compression type is 2"),
        (changed(96, ">I", 7), "its refcounts have 2**7 bits"),
        (changed(100, ">I", 72), "its header says that it has 72 bytes"),
        (changed(100, ">I", 65537), "its header says that it has 65537 bytes"),
        (changed(56, ">I", 0), "its refcount table has 0 clusters"),
        (changed(56, ">I", 129), "its refcount table has 129 clusters"),
        (changed(48, ">Q", 8), "its refcount table is at 8, which is no cluster"),
        (changed(60, ">I", 65537), "it has 65537 snapshots"),
        (changed(64, ">Q", 8, changed(60, ">I", 1)), "its snapshot table is at 8, which is no cluster"),
    ],
)
def test_it_has_none_and_the_reason_is_told(data, reason):
    assert reason in refusal(data)


def test_subclusters_want_clusters_of_16_kib():
    data = Writer(Shape(cluster_bits=13), [Cluster(kind="data")]).data
    assert "subclusters in clusters of 8192 bytes" in refusal(changed(72, ">Q", 16, data))


def test_the_dirty_bit_is_nothing_to_a_reader():
    assert qcow2_layout_of(changed(72, ">Q", 1), stored_size=len(GOOD)).size == 3 * 65536


def test_a_disk_is_whole_sectors_as_for_qemu():
    assert qcow2_layout_of(changed(24, ">Q", 3 * 65536 - 100), stored_size=len(GOOD)).size == 3 * 65536 - 512


def test_the_files_own_names_of_features_are_in_the_reason(tmp_path):
    path = tmp_path / "image"
    create(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"dirty bit")  # the feature name table that qemu writes: name the next bit
    data[at - 1] = 6
    data[79] |= 1 << 6
    assert refusal(bytes(data)) == "it has unknown incompatible features: 'dirty bit' (bit 6)"


@pytest.mark.parametrize("at", range(108, 600, 13))
def test_extensions_of_any_length_are_read_to_their_end(tmp_path, at):
    data = bytearray(changed(72, ">Q", 1 << 7, GOOD))
    data[112:116] = (0x6803F857).to_bytes(4, "big")
    data[at : at + 4] = b"\xff\xff\xff\xf0"
    assert "bit 7" in refusal(bytes(data))


def test_qemu_opens_no_file_whose_l1_table_is_short(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(changed(24, ">Q", 1 << 40))
    with pytest.raises(AssertionError, match="L1 table is too small"):
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
