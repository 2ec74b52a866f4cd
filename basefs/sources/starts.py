"""The first bytes of images as they were had first: what another source says they are is compared with that.

So no location of one image serves another by mistake. It is no proof: that is the hash over the whole image.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

START_BYTES = 256 * 1024
"""The content check wants as many (`catalog/checks`), and disks that were made alike differ in them: partition tables
have ids, tables of a qcow2 the places of its clusters."""
IMAGES_MAX = 10_000

KeptStart = Callable[[str, int], Awaitable[bytes | None]]
"""`await kept_start(image_id, length)`: the image's first bytes, if all of them are in the cache."""


class Starts:
    """Digests of the first `min(size, START_BYTES)` bytes. Owned by the trio loop."""

    def __init__(self, kept_start: KeptStart) -> None:
        self._kept_start = kept_start
        self._known: OrderedDict[str, bytes] = OrderedDict()

    async def agrees(self, image_id: str, start: bytes) -> bool:
        """Whether the image begins so, as far as is known; what is known of none is taken for known from here."""
        digest = _digest(start)
        if image_id not in self._known:
            kept = await self._kept_start(image_id, len(start))
            self._note(image_id, digest if kept is None else _digest(kept))
        return self._known[image_id] == digest

    def note(self, image_id: str, header: bytes, *, size: int) -> None:
        """Glance gave these first bytes: its word counts, whatever was known."""
        length = min(size, START_BYTES)
        if len(header) >= length:
            self._note(image_id, _digest(header[:length]))

    def forget(self, image_id: str) -> None:
        """What was had of the image was wrong."""
        self._known.pop(image_id, None)

    def _note(self, image_id: str, digest: bytes) -> None:
        self._known[image_id] = digest
        self._known.move_to_end(image_id)
        if len(self._known) > IMAGES_MAX:
            self._known.popitem(last=False)


def _digest(start: bytes) -> bytes:
    return hashlib.sha256(start).digest()
