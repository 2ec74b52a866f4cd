"""What the first bytes of a qcow2 file say (docs/interop/qcow2.txt and block/qcow2.c: qcow2_do_open of qemu).

Anybody may have written the file: whatever it holds, the answer is a backing file's name, a layout, or ValueError.
"""

import re
import struct
from dataclasses import dataclass

from basefs.core.qcow2_layout import SECTOR, Qcow2Layout

MAGIC = b"QFI\xfb"
HEADER_BYTES = 72
"""Of version 2; later versions begin with the same fields."""
VERSION_MIN, VERSION_MAX = 2, 3
CLUSTER_BITS_MIN, CLUSTER_BITS_MAX = 9, 21
NAME_BYTES_MAX = 1023
"""qemu's own limit."""
LAYOUT_HEADER_BYTES = 4096
"""As much as `qcow2_layout_of` wants of a file to decide; more only names features that are unknown."""

L1_BYTES_MAX = 32 << 20
_REFCOUNT_TABLE_BYTES_MAX = 8 << 20
_SNAPSHOTS_MAX = 65536
_REFCOUNT_ORDER_MAX = 6
"""These four are qemu's limits (block/qcow2.h)."""
_SUBCLUSTERS = 32

# magic, version, backing_file_offset, backing_file_size, cluster_bits
_HEADER = struct.Struct(">4sIQII")
# crypt_method, l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset
_TABLES = struct.Struct(">IIQQIIQ")
_SIZE = struct.Struct(">Q")
_SIZE_AT, _TABLES_AT, _VERSION_3_AT = 24, 32, HEADER_BYTES
# incompatible_features, compatible_features, autoclear_features, refcount_order, header_length
_VERSION_3 = struct.Struct(">QQQII")
_VERSION_3_BYTES = 104
_COMPRESSION_AT = 104
_EXTENSION = struct.Struct(">II")
_FEATURE_NAMES = 0x6803F857
_FEATURE_NAME = struct.Struct(">BB46s")
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _SUBCLUSTER_TABLES = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _SUBCLUSTER_TABLES
_ZLIB, _ZSTD = 0, 1
_ENCRYPTIONS = {1: "AES", 2: "LUKS"}
_BASE_NAME = re.compile(rb"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class BackingName:
    """Where in the file the backing file's name is: 0 < `length` <= NAME_BYTES_MAX."""

    offset: int
    length: int


def backing_name(header: bytes) -> BackingName | None:
    """Where the name of the backing file is; None where the file is no qcow2 or has no backing file.

    Raises:
        ValueError: it says that it is qcow2, and cannot be.
    """
    if not header.startswith(MAGIC):
        return None
    if len(header) < HEADER_BYTES:
        raise ValueError("shorter than its header")
    _, version, offset, length, cluster_bits = _HEADER.unpack_from(header)
    if not VERSION_MIN <= version <= VERSION_MAX:
        raise ValueError(f"version {version}")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ValueError(f"clusters of 2**{cluster_bits} bytes")
    if not offset:
        return None
    if not 0 < length <= NAME_BYTES_MAX or not HEADER_BYTES <= offset <= (1 << cluster_bits) - length:
        raise ValueError(f"a backing file's name of {length} bytes at {offset}")
    return BackingName(offset, length)


def base_names_in(name: bytes) -> set[str]:
    """The names of nova's bases in a backing file's name: its last component, or anywhere in a `json:` description.

    The `<sha1>_<digits>` of old novas counts as `<sha1>`.
    """
    text = name if name.startswith(b"json:") else name.rsplit(b"/", 1)[-1]
    return {found.decode() for found in _BASE_NAME.findall(text)}


def qcow2_layout_of(header: bytes, *, stored_size: int) -> Qcow2Layout:
    """Where the disk in a qcow2 file is, from the first `min(stored_size, LAYOUT_HEADER_BYTES)` bytes or more of it.

    Raises:
        ValueError: it has no raw view; the message ("it ...") says why. So are what qemu does not open, a file that
            needs another file or a key, one that is marked as corrupt, and one that does not hold its L1 table.
    """
    if not header.startswith(MAGIC):
        raise ValueError("it is no qcow2 file")
    if backing_name(header) is not None:
        raise ValueError("it has a backing file")
    version, cluster_bits = header[7], header[23]
    incompatible, compression = _features(header, version, 1 << cluster_bits)
    (disk_bytes,) = _SIZE.unpack_from(header, _SIZE_AT)
    crypt_method, l1_entries, l1_offset, *others = _TABLES.unpack_from(header, _TABLES_AT)
    if crypt_method:
        raise ValueError(f"it is encrypted ({_ENCRYPTIONS.get(crypt_method, f'method {crypt_method}')})")
    layout = Qcow2Layout(
        version=version,
        cluster_bits=cluster_bits,
        # qemu counts sectors: what is left over at the end is not shown (qcow2_do_open: total_sectors).
        size=disk_bytes // SECTOR * SECTOR,
        stored_size=stored_size,
        l1_offset=l1_offset,
        has_subclusters=bool(incompatible & _SUBCLUSTER_TABLES),
        compression="zstd" if compression == _ZSTD else "zlib",
    )
    if not layout.size:
        raise ValueError(f"its disk has {disk_bytes} bytes")
    _check_l1(layout, disk_bytes, l1_entries)
    _check_other_tables(layout, *others)
    return layout


def _features(header: bytes, version: int, cluster_bytes: int) -> tuple[int, int]:
    """The incompatible features and the compression type.

    Raises:
        ValueError: one of them rules out a raw view.
    """
    if version < VERSION_MAX:
        return 0, _ZLIB
    if len(header) < _COMPRESSION_AT + 1:
        raise ValueError("it is shorter than its header")
    incompatible, _, _, refcount_order, length = _VERSION_3.unpack_from(header, _VERSION_3_AT)
    if not _VERSION_3_BYTES <= length <= cluster_bytes:
        raise ValueError(f"its header says that it has {length} bytes")
    if unknown := incompatible & ~_KNOWN:
        raise ValueError(f"it has unknown incompatible features: {_feature_names(header, length, unknown)}")
    if incompatible & _CORRUPT:
        raise ValueError("it is marked as corrupt")
    if incompatible & _DATA_FILE:
        raise ValueError("it has an external data file")
    if refcount_order > _REFCOUNT_ORDER_MAX:
        raise ValueError(f"its refcounts have 2**{refcount_order} bits")
    compression = header[_COMPRESSION_AT] if length > _COMPRESSION_AT else _ZLIB
    if compression not in (_ZLIB, _ZSTD) or (compression == _ZSTD) != bool(incompatible & _COMPRESSION):
        raise ValueError(f"its compression type is {compression}, which its incompatible features do not fit")
    if incompatible & _SUBCLUSTER_TABLES and cluster_bytes < SECTOR * _SUBCLUSTERS:
        raise ValueError(f"it has subclusters in clusters of {cluster_bytes} bytes")
    return incompatible, compression


def _feature_names(header: bytes, start: int, unknown: int) -> str:
    """What the file itself calls the incompatible features `unknown` (its feature name table), else their bits."""
    names = {bit: f"bit {bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1}
    while start + _EXTENSION.size <= len(header):
        kind, length = _EXTENSION.unpack_from(header, start)
        start += _EXTENSION.size
        if not kind:
            break
        table = header[start : start + length] if kind == _FEATURE_NAMES else b""
        for at in range(0, len(table) - _FEATURE_NAME.size + 1, _FEATURE_NAME.size):
            which, bit, name = _FEATURE_NAME.unpack_from(table, at)
            if which == 0 and bit in names:
                names[bit] = f"{name.rstrip(bytes(1)).decode('ascii', 'replace')!r} (bit {bit})"
        start += length + -length % 8
    return ", ".join(names.values())


def _check_l1(layout: Qcow2Layout, disk_bytes: int, l1_entries: int) -> None:
    """Raises ValueError where the L1 table is not what qemu takes, or not in the file."""
    if l1_entries * 8 > L1_BYTES_MAX:
        raise ValueError(f"its L1 table has {l1_entries} entries")
    # qemu: "L1 table is too small"; so no table is shorter than the disk.
    if l1_entries < -(-disk_bytes // layout.l2_table_covers):
        raise ValueError(f"its L1 table has {l1_entries} entries, too few for a disk of {disk_bytes} bytes")
    _check_place(layout, "L1 table", layout.l1_offset)
    if layout.l1_offset < layout.cluster_bytes or layout.l1_offset + layout.l1_bytes > layout.stored_size:
        raise ValueError(
            f"its L1 table at {layout.l1_offset} is not between its header and its end at {layout.stored_size}"
        )


def _check_other_tables(
    layout: Qcow2Layout, refcounts_offset: int, refcount_clusters: int, snapshots: int, snapshots_offset: int
) -> None:
    """Raises ValueError where qemu would not open the file for tables that the raw view does not need."""
    if not 0 < refcount_clusters <= _REFCOUNT_TABLE_BYTES_MAX >> layout.cluster_bits:
        raise ValueError(f"its refcount table has {refcount_clusters} clusters")
    _check_place(layout, "refcount table", refcounts_offset)
    if snapshots > _SNAPSHOTS_MAX:
        raise ValueError(f"it has {snapshots} snapshots")
    if snapshots:
        _check_place(layout, "snapshot table", snapshots_offset)


def _check_place(layout: Qcow2Layout, what: str, offset: int) -> None:
    if offset % layout.cluster_bytes or offset >= 1 << 63:
        raise ValueError(f"its {what} is at {offset}, which is no cluster")
