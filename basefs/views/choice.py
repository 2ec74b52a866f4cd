"""Which view an image is shown through: the raw one of a qcow2 image with `view = raw`, the stored bytes else."""

from basefs.catalog.checks import View
from basefs.catalog.records import ImageEntry
from basefs.views.qcow2 import Qcow2View
from basefs.views.qcow2_clusters import ClusterReader
from basefs.views.qcow2_memory import Qcow2Memory
from basefs.views.stored import ByteSource, StoredView


class Views:
    """Makes views; they share one memory. `view` is the option of that name."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._memory = Qcow2Memory()
        self._clusters = ClusterReader(self._memory)

    def of(self, entry: ImageEntry, stored: ByteSource) -> StoredView | Qcow2View:
        """The image's view over its stored bytes."""
        if self._view == "raw" and entry.record.disk_format == "qcow2":
            return Qcow2View(stored, entry, self._memory, self._clusters)
        return StoredView(stored)

    def forget(self, entry: ImageEntry) -> None:
        """Some stored bytes that were read may have been wrong: keep nothing that was made of them."""
        self._memory.forget(entry.number)
