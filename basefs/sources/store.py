"""What a store behind Glance promises: an image's stored bytes, at a location that Glance tells.

One module a store; `tests/contract/test_stores.py` runs on all of them, real and faulty. A store knows nothing of
catalogs, caches or other stores: which of them an image is read from is `sources/choice`'s affair.
"""

from typing import Literal, Protocol

from basefs.sources.base import Deliver

StoreName = Literal["rbd", "s3", "swift", "http"]


class StoreObject(Protocol):
    """One image's bytes where they are stored, open for reading. Calls from many tasks at once.

    What is read is the object that was opened: one that was replaced since is an error, never other bytes.
    """

    size: int
    """Bytes, as the store said when it was opened."""

    async def fetch_range(self, *, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        """Deliver exactly `[offset, offset + length)` in order, as `ImageSource.fetch_range` does.

        Cancellation: as soon as the thread or the library lets go of it; nothing is delivered after that.

        Raises:
            StoreGoneError: the object is not there any more, or is another one now.
            SourceForbiddenError: the store refuses us.
            SourceUnavailableError: it could not be asked, or the answer broke off.
            RangeNotHonouredError: it answers no ranges.
            SourceCorruptError: the answer contradicts itself or what was asked.
        """
        ...

    async def close(self) -> None:
        """Let go of the object once no call is inside. May be called more than once."""
        ...


class Store(Protocol):
    """A kind of store, with what the operator configured for it. `requests` and `received_bytes` as `ImageSource`."""

    name: StoreName
    requests: int
    received_bytes: int

    missing: str | None
    """Why nothing can be read here: what is not installed on this host, and how to get it; else None."""

    def refusal(self, image_id: str, location: str) -> str | None:
        """Why the location is not to be used for that image; None: `open` may be tried.

        Locations are data from users: an address that is not allowed, an object that by its name is another
        image's, a scheme that is not ours. Asks nobody. The reason has no part of the location that may be a secret.
        """
        ...

    async def open(self, location: str, *, image_id: str, size: int) -> StoreObject:
        """The object at a location that `refusal` allows; its size is compared with `size`.

        Raises:
            StoreGoneError, SourceForbiddenError, SourceUnavailableError, RangeNotHonouredError: as `fetch_range`.
            SourceCorruptError: the object has another size.
        """
        ...

    async def close(self) -> None:
        """Close connections. Objects that are open were closed before."""
        ...
