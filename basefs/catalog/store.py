"""Where the catalog is kept over restarts; `cache/state_db.py` implements it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from basefs.catalog.records import ImageEntry, ImageRecord


class CatalogStore(Protocol):
    """Entries, their numbers, and a few values by key. Cancellation: a write that has begun is finished."""

    async def load(self) -> list[ImageEntry]:
        """Everything that was stored.

        Raises:
            CacheError: the store cannot be read now.
        """
        ...

    async def values(self) -> Mapping[str, str]:
        """The values by key.

        Raises:
            CacheError: the store cannot be read now.
        """
        ...

    async def upsert(self, records: Sequence[ImageRecord], values: Mapping[str, str]) -> Mapping[str, int]:
        """Store the records and the values, all or nothing; every image's number by its id.

        A new image gets a number > 0 that no image had before, and keeps it.

        Raises:
            CacheError: nothing was stored.
        """
        ...

    def touch(self, entry: ImageEntry) -> None:
        """Note that verdict, local state or `is_gone` changed; written within about a second, and at close."""
        ...

    async def forget(self, number: int) -> None:
        """Remove the image; its number is not used again.

        Raises:
            CacheError: it was not removed.
        """
        ...
