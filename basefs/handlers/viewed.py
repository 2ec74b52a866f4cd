"""A prepared image that is a view over stored bytes, wherever those come from."""

from collections.abc import Callable

from basefs.cache.reader_table import ReaderTable, Share
from basefs.handlers.base import Patience
from basefs.views.qcow2 import Qcow2View
from basefs.views.stored import StoredView


class ViewedImage:
    """See `PreparedImage`."""

    def __init__(self, view: StoredView | Qcow2View) -> None:
        self._view = view
        self.hit: Callable[[int, int], memoryview | bytes | None] = view.hit

    @property
    def size(self) -> int:
        """See `PreparedImage.size`."""
        return self._view.size

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:  # noqa: ARG002 (see those that have some)
        """See `PreparedImage.share`."""
        return None

    async def read(self, offset: int, size: int, patience: Patience) -> bytes | memoryview:
        """See `PreparedImage.read`."""
        return await self._view.read(offset, size, deadline_s=patience.deadline_s, patient=patience.is_guest)
