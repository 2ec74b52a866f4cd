"""Writes qcow2 files of any layout that the format allows, which qemu would never write like that."""

import random
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Kind = Literal["absent", "zero", "zero-allocated", "data", "packed"]
_COPIED = 1 << 63
_COMPRESSED = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of the disk: `seed` makes its bytes. `data_subclusters` and `zero_subclusters` are masks of 32 bits."""

    kind: Kind = "absent"
    seed: int = 0
    data_subclusters: int = 0xFFFF_FFFF
    zero_subclusters: int = 0

    def content(self, cluster_bytes: int) -> bytes:
        """What is stored of it."""
        rng = random.Random(self.seed)
        return (rng.randbytes(97) * (cluster_bytes // 97 + 1))[:cluster_bytes]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the file is laid out; `seed` shuffles what may stand anywhere."""

    cluster_bits: int = 16
    version: int = 3
    compression: Literal["zlib", "zstd"] = "zlib"
    has_subclusters: bool = False
    tail_bytes: int = 0
    """The disk ends so many bytes (of whole sectors) before its last cluster does."""
    seed: int = 0


def packed_bytes(content: bytes, compression: str) -> bytes:
    """A cluster as it is stored compressed."""
    if compression == "zstd":
        return zstd.compress(content)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -12)
    return deflate.compress(content) + deflate.flush()


class Writer:
    """Builds a file: `data`, and the `disk` in it. `places` tells where tables and clusters went."""

    def __init__(self, shape: Shape, clusters: Sequence[Cluster]) -> None:
        self._shape = shape
        self._bytes = 1 << shape.cluster_bits
        self._rng = random.Random(shape.seed)
        entry_bytes = 16 if shape.has_subclusters else 8
        per_table = self._bytes // entry_bytes
        self.size = len(clusters) * self._bytes - shape.tail_bytes
        tables = -(-len(clusters) // per_table)
        l1_clusters = -(-tables * 8 // self._bytes)
        stored = [index for index, cluster in enumerate(clusters) if cluster.kind in ("data", "zero-allocated")]
        packed = {
            index: packed_bytes(cluster.content(self._bytes), shape.compression)
            for index, cluster in enumerate(clusters)
            if cluster.kind == "packed"
        }
        packed_clusters = sum(-(-len(raw) // self._bytes) for raw in packed.values())
        # Cluster 0 is the header's, 1 the refcount table's; L1 wants neighbours.
        free = list(range(2 + l1_clusters, 2 + l1_clusters + tables + len(stored) + packed_clusters))
        last = free[-1]
        self._rng.shuffle(free)
        self.file = bytearray((last + 1) * self._bytes)
        self._header(tables)
        self._clusters, self._per_table, self._entry_bytes = clusters, per_table, entry_bytes
        self.l1_offset = 2 * self._bytes
        self.l2_offsets = [free.pop() * self._bytes for _ in range(tables)]
        for index, offset in enumerate(self.l2_offsets):
            if any(cluster.kind != "absent" for cluster in clusters[index * per_table : (index + 1) * per_table]):
                self.put(self.l1_offset + 8 * index, offset | _COPIED)
        for index in stored:
            self._store(index, free.pop() * self._bytes)
        self._pack(packed, free)
        for index, cluster in enumerate(clusters):
            if cluster.kind == "zero":
                self._entry(index, 0 if shape.has_subclusters else 1, 0xFFFF_FFFF << 32)
            if cluster.kind == "absent" and shape.has_subclusters:
                self._entry(index, 0, cluster.zero_subclusters << 32)
        self.data = bytes(self.file)
        self.disk = b"".join(self._shown(index) for index in range(len(clusters)))[: self.size]

    def put(self, at: int, value: int) -> None:
        """A table entry."""
        self.file[at : at + 8] = value.to_bytes(8, "big")

    def entry_at(self, index: int) -> int:
        """Where the L2 entry of the disk's cluster `index` is in the file."""
        table, at = divmod(index, self._per_table)
        return self.l2_offsets[table] + at * self._entry_bytes

    def _entry(self, index: int, value: int, bitmap: int = 0) -> None:
        self.put(self.entry_at(index), value)
        if self._shape.has_subclusters:
            self.put(self.entry_at(index) + 8, bitmap)

    def _header(self, tables: int) -> None:
        shape, size = self._shape, self.size
        header = struct.pack(
            ">4sIQIIQIIQQIIQ",
            *(
                b"QFI\xfb",
                shape.version,
                0,
                0,
                shape.cluster_bits,
                size,
                0,
                tables,
                2 * self._bytes,
                self._bytes,
                1,
                0,
                0,
            ),
        )
        if shape.version == 3:
            incompatible = 8 * (shape.compression == "zstd") + 16 * shape.has_subclusters
            header += (
                struct.pack(">QQQII", incompatible, 0, 0, 4, 112) + bytes([shape.compression == "zstd"]) + bytes(7)
            )
        self.file[: len(header)] = header

    def _store(self, index: int, offset: int) -> None:
        cluster = self._clusters[index]
        self.file[offset : offset + self._bytes] = cluster.content(self._bytes)
        if self._shape.has_subclusters:
            allocated = cluster.data_subclusters & ~cluster.zero_subclusters if cluster.kind == "data" else 0
            zeros = cluster.zero_subclusters if cluster.kind == "data" else 0xFFFF_FFFF
            self._entry(index, offset | _COPIED, zeros << 32 | allocated)
        else:
            self._entry(index, offset | (1 if cluster.kind == "zero-allocated" else _COPIED))

    def _pack(self, packed: dict[int, bytes], free: list[int]) -> None:
        """One after the other, as qemu does, over as many neighbouring clusters as there are in `free`."""
        order = list(packed)
        self._rng.shuffle(order)
        free.sort()
        runs: list[list[int]] = []
        for cluster in free:
            if runs and cluster == runs[-1][-1] + 1:
                runs[-1].append(cluster)
            else:
                runs.append([cluster])
        for index in order:
            raw = packed[index]
            needed = -(-len(raw) // self._bytes)
            run = next((run for run in runs if len(run) >= needed), None)
            if run is None:  # no room in one piece: at the file's end
                at = len(self.file)
                self.file += bytes(needed * self._bytes)
            else:
                at = run[0] * self._bytes
                del run[:needed]
            at += self._rng.randrange(0, needed * self._bytes - len(raw) + 1)
            self.file[at : at + len(raw)] = raw
            sectors = (at + len(raw) - 1) // 512 - at // 512
            shift = 62 - (self._shape.cluster_bits - 8)
            self._entry(index, _COMPRESSED | sectors << shift | at)

    def _shown(self, index: int) -> bytes:
        cluster = self._clusters[index]
        if cluster.kind not in ("data", "packed"):
            return bytes(self._bytes)
        if cluster.kind == "packed":
            return cluster.content(self._bytes)
        (entry,) = struct.unpack_from(">Q", self.file, self.entry_at(index))
        offset = entry & 0x00FF_FFFF_FFFF_FE00
        content = bytearray(self.data[offset : offset + self._bytes])
        if self._shape.has_subclusters:
            step = self._bytes // 32
            for at in range(32):
                if not (cluster.data_subclusters & ~cluster.zero_subclusters) >> at & 1:
                    content[at * step : (at + 1) * step] = bytes(step)
        return bytes(content)
