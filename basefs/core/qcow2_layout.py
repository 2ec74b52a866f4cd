"""Where the bytes of the disk in a qcow2 file are (qemu: docs/interop/qcow2.txt, block/qcow2-cluster.c).

The tables are read and kept in pieces of at most TABLE_BYTES_MAX: *L1 blocks*, and *slices* of L2 tables. Anybody may
have written them: an entry is a place in the file, zeros, or Qcow2TableError. Nothing follows chains, so nothing loops.
"""

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

SECTOR = 512
TABLE_BYTES_MAX = 64 * 1024
"""A whole L2 table at qemu's default cluster size; one of 2 MiB clusters would be 2 MiB for one read."""
_ENTRY_BYTES = 8

_COMPRESSED = 1 << 62
_ZERO = 1
_NOT_PLAIN = _COMPRESSED | _ZERO
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SUBCLUSTER_BITS = 5
_ALL_ALLOCATED = 0xFFFF_FFFF

ZEROS: Final = 0
DATA: Final = 1
PACKED: Final = 2


class Qcow2TableError(ValueError):
    """A table holds what cannot be; the message ("L2 entry of byte ...") names the byte of the disk and the place."""


class Extent(NamedTuple):
    """`length` bytes of the disk, the next ones of the range that was asked for.

    ZEROS; DATA: at `host` in the file, all of them in it; PACKED: in the cluster whose compressed bytes are at
    `[host, host + packed_length)`, from its byte `at` on.
    """

    kind: int
    length: int
    host: int = 0
    packed_length: int = 0
    at: int = 0


def table_of(raw: bytes) -> "array[int]":
    """The entries of an L1 block or of a slice."""
    table = array("Q", raw)
    if sys.byteorder == "little":
        table.byteswap()
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Layout:
    """How to find what is in a qcow2 file of `stored_size` bytes; `size` > 0 are the disk's; see `qcow2_header`."""

    version: int
    cluster_bits: int
    size: int
    stored_size: int
    l1_offset: int
    has_subclusters: bool
    compression: Literal["zlib", "zstd"]
    slice_shift: int = field(init=False)
    """`offset >> slice_shift` is the number of the slice that a byte of the disk is in."""
    _table_shift: int = field(init=False)

    def __post_init__(self) -> None:
        entry_bits = 4 if self.has_subclusters else 3
        slice_bits = min(self.cluster_bits, TABLE_BYTES_MAX.bit_length() - 1)
        object.__setattr__(self, "slice_shift", self.cluster_bits + slice_bits - entry_bits)
        object.__setattr__(self, "_table_shift", self.cluster_bits + self.cluster_bits - entry_bits)

    @property
    def cluster_bytes(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice in the file."""
        return min(self.cluster_bytes, TABLE_BYTES_MAX)

    @property
    def l2_table_covers(self) -> int:
        """Bytes of the disk that one L2 table tells of."""
        return 1 << self._table_shift

    @property
    def l1_bytes(self) -> int:
        """Bytes of the L1 table that are used."""
        return _ENTRY_BYTES * (-(-self.size >> self._table_shift))

    def slices(self, offset: int, end: int) -> range:
        """The slices that tell of the disk's `[offset, end)`."""
        return range(offset >> self.slice_shift, (end - 1 >> self.slice_shift) + 1)

    def l1_block(self, slice_number: int) -> tuple[int, int]:
        """Offset and length in the file of the L1 block with the slice's entry."""
        at = self._l1_index(slice_number) * _ENTRY_BYTES // TABLE_BYTES_MAX * TABLE_BYTES_MAX
        return self.l1_offset + at, min(TABLE_BYTES_MAX, self.l1_bytes - at)

    def slice_place(self, slice_number: int, l1_block: "array[int]") -> int | None:
        """The slice's offset in the file; None: all zeros. Past the file's end it is zeros, as in qemu.

        Raises:
            Qcow2TableError: the L2 table is not in the file, not at a cluster, or at its header.
        """
        l1_index = self._l1_index(slice_number)
        table = l1_block[l1_index % (TABLE_BYTES_MAX // _ENTRY_BYTES)] & _OFFSET
        if not table:
            return None
        if table & self.cluster_bytes - 1 or not self.cluster_bytes <= table < self.stored_size:
            raise Qcow2TableError(f"L1 entry {l1_index}: an L2 table at {table} in a file of {self.stored_size} bytes")
        slices = 1 << self._table_shift - self.slice_shift
        return table + slice_number % slices * self.slice_bytes

    def _l1_index(self, slice_number: int) -> int:
        return slice_number << self.slice_shift >> self._table_shift

    def plain_host(self, table: "array[int]", offset: int) -> int:
        """Where the disk's byte `offset` is in the file, if all of its cluster is in it as it is; 0 if not.

        For most reads: 0.5 us, `extents` takes 4.
        """
        mask = (1 << self.cluster_bits) - 1
        entry = table[offset >> self.cluster_bits & len(table) - 1] if not self.has_subclusters else _COMPRESSED
        host = entry & _OFFSET
        if entry & _NOT_PLAIN or host & mask or not mask < host <= self.stored_size - mask - 1:
            return 0
        return host + (offset & mask)

    def extents(self, table: "array[int]", offset: int, end: int) -> list[Extent]:
        """Where the disk's `[offset, end)` is, which lies in one slice, that of `table`; neighbours are one extent.

        0 <= offset < end <= size.

        Raises:
            Qcow2TableError: an entry cannot be.
        """
        found: list[Extent] = []
        pieces = self._subclusters if self.has_subclusters else self._clusters
        kind, host, length, after = -1, 0, 0, 0
        for piece in pieces(table, offset, end):
            if piece[0] == kind and (kind == ZEROS or (kind == DATA and piece[2] == after)):
                length += piece[1]
            else:
                if length and kind != PACKED:
                    self._add(found, kind, length, host)
                kind, length, host = piece[0], piece[1], piece[2]
                if kind == PACKED:
                    found.append(piece)
            after = piece[2] + piece[1]
        if length and kind != PACKED:
            self._add(found, kind, length, host)
        return found

    def _add(self, found: list[Extent], kind: int, length: int, host: int) -> None:
        """Data that the file's end cuts off go on as zeros: so qemu reads them."""
        if kind == ZEROS:
            found.append(Extent(ZEROS, length))
            return
        here = min(length, max(0, self.stored_size - host))
        if here:
            found.append(Extent(DATA, here, host))
        if here < length:
            found.append(Extent(ZEROS, length - here))

    def _clusters(self, table: "array[int]", offset: int, end: int) -> Iterator[Extent]:
        """As `extents`, a cluster each."""
        bits = self.cluster_bits
        mask = (1 << bits) - 1
        index_mask = len(table) - 1
        while offset < end:
            entry = table[offset >> bits & index_mask]
            at = offset & mask
            length = min(mask + 1 - at, end - offset)
            if entry & _COMPRESSED:
                yield self._packed(entry, offset, length, at)
            elif host := entry & _OFFSET:
                # A zero cluster, too: qemu takes a place that is no cluster for corruption.
                if host & mask:
                    raise Qcow2TableError(f"L2 entry of byte {offset}: a cluster at {host}, which is none")
                if entry & _ZERO:
                    self._check_zeros(offset)
                    yield Extent(ZEROS, length)
                else:
                    self._check_host(offset, host)
                    yield Extent(DATA, length, host + at)
            else:
                if entry & _ZERO:
                    self._check_zeros(offset)
                yield Extent(ZEROS, length)
            offset += length

    def _subclusters(self, table: "array[int]", offset: int, end: int) -> Iterator[Extent]:
        """As `extents`, a subcluster each (extended L2 entries: the second half of an entry tells of 32)."""
        bits = self.cluster_bits
        mask = (1 << bits) - 1
        piece_bits = bits - _SUBCLUSTER_BITS
        index_mask = len(table) // 2 - 1
        while offset < end:
            index = offset >> bits & index_mask
            entry, bitmap = table[2 * index], table[2 * index + 1]
            at = offset & mask
            if entry & _COMPRESSED:
                length = min(mask + 1 - at, end - offset)
                yield self._packed(entry, offset, length, at)
                offset += length
                continue
            host = entry & _OFFSET
            if host & mask or (bitmap >> 32 & bitmap & _ALL_ALLOCATED) or (not host and bitmap & _ALL_ALLOCATED):
                raise Qcow2TableError(f"L2 entry of byte {offset}: a cluster at {host} with subclusters {bitmap:#x}")
            length = min((1 << piece_bits) - (at & (1 << piece_bits) - 1), end - offset)
            if bitmap >> (at >> piece_bits) & 1:
                self._check_host(offset, host)
                yield Extent(DATA, length, host + at)
            else:
                yield Extent(ZEROS, length)
            offset += length

    def _packed(self, entry: int, offset: int, length: int, at: int) -> Extent:
        """A compressed cluster: an offset of `62 - (cluster_bits - 8)` bits, and how many sectors follow its first."""
        shift = 62 - (self.cluster_bits - 8)
        host = entry & (1 << shift) - 1
        sectors = (entry & _COMPRESSED - 1) >> shift
        self._check_host(offset, host)
        packed_length = min((sectors + 1) * SECTOR - host % SECTOR, self.stored_size - host)
        return Extent(PACKED, length, host, packed_length, at)

    def _check_host(self, offset: int, host: int) -> None:
        if not self.cluster_bytes <= host < self.stored_size:
            raise Qcow2TableError(
                f"L2 entry of byte {offset}: a cluster at {host}, which is not between the header and the end of "
                f"a file of {self.stored_size} bytes"
            )

    def _check_zeros(self, offset: int) -> None:
        if self.version < 3:
            raise Qcow2TableError(f"L2 entry of byte {offset}: a zero cluster in a file of version {self.version}")
