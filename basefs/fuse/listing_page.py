"""One page of a listing while it is filled, whoever brought the request: pyfuse3, or a reader process."""

import pyfuse3

from basefs.core.fuse_wire import direntplus


class ListingPage:
    """As `pyfuse3.ReaddirToken`, for a request that a reader forwarded; at most `size_max` bytes of entries."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self.data = bytearray()

    def add(self, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
        """False when the entry has no room any more: it is not in the page, nor is what comes after it."""
        entry = direntplus(name, attributes, next_id)
        if len(self.data) + len(entry) > self._size_max:
            return False
        self.data += entry
        return True


Token = pyfuse3.ReaddirToken | ListingPage


def add_entry(token: Token, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
    """Put one entry into the page; see `ListingPage.add`."""
    if isinstance(token, ListingPage):
        return token.add(name, attributes, next_id)
    return pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, next_id)
