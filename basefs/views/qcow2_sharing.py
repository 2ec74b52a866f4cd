"""What reader processes are told of a disk in a qcow2 image: where its clusters are, as the server found them.

Readers parse nothing: tenants wrote the tables. A cluster that was read here is told with its neighbours, if it is
zeros, lies in the file as it is, or is a deflate stream that readers inflate (`reader_layout.packed_word`). Other
compressed ones, and those that mix data and zeros, stay UNKNOWN: the server answers them, and looks at no neighbour of
them, which cost 0.35 ms at each read.
Owned by the trio loop.
"""

from typing import Protocol

from basefs.cache.reader_table import ReaderTable, Share
from basefs.core.qcow2_layout import DATA, ZEROS, Qcow2Layout, Qcow2TableError
from basefs.reader_layout import MAP_BYTES_MAX, UNKNOWN, packed_word
from basefs.reader_layout import ZEROS as ZEROS_WORD
from basefs.views.qcow2 import Qcow2View

NEIGHBOURS = 32
"""Clusters that are told together: 20 us, once for 2 MiB of a disk at the default cluster size."""
WORD_BYTES = 8


class SharedBytes(Protocol):
    """Stored bytes that readers may have, such as `cache.image_fetcher.ImageFetcher`."""

    def share(self, table: ReaderTable, *, cluster_bits: int, shown_bytes: int) -> Share | None:
        """See `ChunkFile.share`."""

    def forget_clusters(self) -> None:
        """See `ChunkFile.forget_clusters`."""


class SharedClusters:
    """The cluster map of one view."""

    def __init__(self, view: Qcow2View, stored: SharedBytes) -> None:
        self._view = view
        self._stored = stored

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:
        """What readers serve the disk with, now also what is around `[offset, offset + size)`.

        None before it was read, and where the map would be too large.
        """
        layout = self._view.layout
        if layout is None or WORD_BYTES * (-(-layout.size >> layout.cluster_bits)) > MAP_BYTES_MAX:
            return None
        share = self._stored.share(table, cluster_bits=layout.cluster_bits, shown_bytes=layout.size)
        if share is not None and share.cluster_map is not None:
            self._view.when_forgotten(self._stored.forget_clusters)
            bits = layout.cluster_bits
            first, stop = offset >> bits, (offset + size - 1 >> bits) + 1
            if self._tell(share.cluster_map, first, stop, layout):
                self._tell(share.cluster_map, first & -NEIGHBOURS, (stop - 1 | NEIGHBOURS - 1) + 1, layout)
        return share

    def _tell(self, cluster_map: memoryview, first: int, stop: int, layout: Qcow2Layout) -> bool:
        """Write down these clusters; whether something was told that was not before."""
        is_new = False
        for cluster in range(first, min(stop, len(cluster_map))):
            if cluster_map[cluster] == UNKNOWN:
                cluster_map[cluster] = self._word_of(cluster, layout)
                is_new = is_new or cluster_map[cluster] != UNKNOWN
        return is_new

    def _word_of(self, cluster: int, layout: Qcow2Layout) -> int:
        """What the map says of this cluster of the disk."""
        try:
            extents = self._view.known_extents(cluster << layout.cluster_bits)
        except Qcow2TableError:  # a read says so
            return UNKNOWN
        if extents is None or len(extents) != 1:
            return UNKNOWN
        (extent,) = extents
        if extent.kind == ZEROS:
            return ZEROS_WORD
        if extent.kind == DATA:
            return extent.host
        # The standard library has no zstd.
        return (
            packed_word(extent.host, extent.packed_length, layout.cluster_bits)
            if layout.compression == "zlib"
            else UNKNOWN
        )
