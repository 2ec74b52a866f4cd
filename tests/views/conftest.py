"""Views over stored bytes in memory."""

from basefs.catalog.records import ImageEntry
from basefs.core.qcow2_header import qcow2_layout_of
from basefs.views.choice import Views
from basefs.views.qcow2 import Qcow2View
from tests.cache.conftest import make_entry
from tests.views.memory_stored import MemoryStored


def entry_of(data: bytes, number: int = 7) -> ImageEntry:
    """A checked qcow2 image."""
    entry = make_entry(len(data), disk_format="qcow2")
    entry.number = number
    entry.local.shown_size = qcow2_layout_of(data, stored_size=len(data)).size
    return entry


def view_of(stored: MemoryStored, entry: ImageEntry | None = None, views: Views | None = None) -> Qcow2View:
    """Its raw view, with a memory of its own unless `views` are given."""
    view = (views or Views("raw")).of(entry or entry_of(stored.data), stored)
    assert isinstance(view, Qcow2View)
    return view


async def read(view: Qcow2View, offset: int, size: int) -> bytes:
    """As the FUSE handlers do it: at once where that is possible."""
    hit = view.hit(offset, size)
    return bytes(await view.read(offset, size, deadline_s=5, patient=False) if hit is None else hit)
