"""What the raw views of all qcow2 images keep in memory: parsed tables and inflated clusters, bounded in bytes.

Owned by the trio loop. Everything kept is of the image's stored bytes, which never change; but a damaged chunk may have
been served: `forget` drops what an image has here, and what is on its way then is not kept (`generation`).
"""

from array import array
from collections.abc import Callable
from weakref import WeakValueDictionary

from cachetools import LRUCache

from basefs.core.qcow2_layout import Qcow2Layout

L1_BYTES_MAX = 8 << 20
SLICES_BYTES_MAX = 64 << 20
"""L2 tables of 512 GiB of disks at the default cluster size."""
CLUSTERS_BYTES_MAX = 64 << 20
Key = tuple[int, int]
"""Image number, and which slice or L1 block."""
ClusterKey = tuple[int, int, int]
"""Image number, and where the compressed bytes are in the file: offset and length."""


class ImageMemory:
    """What is known of one image. `layout` is None until its header was read; `generation` changes with `forget`."""

    def __init__(self) -> None:
        self.layout: Qcow2Layout | None = None
        self.generation = 0
        self.forgotten: Callable[[], None] = _nothing
        """Called when what was read may have been wrong, after `generation` grew."""


class Qcow2Memory:
    """The memory of all images. An empty table in `slices` is a slice of zeros."""

    def __init__(self) -> None:
        self.l1_blocks: LRUCache[Key, array[int]] = LRUCache(L1_BYTES_MAX, _table_bytes)
        self.slices: LRUCache[Key, array[int]] = LRUCache(SLICES_BYTES_MAX, _table_bytes)
        self.clusters: LRUCache[ClusterKey, bytes] = LRUCache(CLUSTERS_BYTES_MAX, len)
        self._images: WeakValueDictionary[int, ImageMemory] = WeakValueDictionary()

    def of(self, number: int) -> ImageMemory:
        """The memory of the image with this number, which all its views share."""
        memory = self._images.get(number)
        if memory is None:
            memory = self._images[number] = ImageMemory()
        return memory

    def forget(self, number: int) -> None:
        """Some bytes of the image that were read may have been wrong: keep nothing that was made of them."""
        memory = self.of(number)
        memory.layout = None
        memory.generation += 1
        memory.forgotten()
        for tables in (self.l1_blocks, self.slices):
            for key in [key for key in tables if key[0] == number]:
                del tables[key]
        for cluster in [cluster for cluster in self.clusters if cluster[0] == number]:
            del self.clusters[cluster]


def _nothing() -> None:
    """Nobody wants to know."""


def _table_bytes(table: "array[int]") -> int:
    return max(64, len(table) * table.itemsize)
