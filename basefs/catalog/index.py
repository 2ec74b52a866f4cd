"""The images that are known, found by base name, id or number. Owned by the trio loop."""

from collections.abc import Collection

from basefs import errors
from basefs.catalog.records import ImageEntry

_IDS_SHOWN_MAX = 10


class CatalogIndex:
    """All entries. An entry's id, base name and number never change."""

    def __init__(self) -> None:
        self._by_base_name: dict[str, ImageEntry] = {}
        self._by_id: dict[str, ImageEntry] = {}
        self._by_number: dict[int, ImageEntry] = {}

    def __len__(self) -> int:
        """Images known, gone ones too."""
        return len(self._by_number)

    def add(self, entry: ImageEntry) -> None:
        """Make `entry` known; its id and number were not."""
        assert entry.image_id not in self._by_id
        assert entry.number not in self._by_number
        self._by_number[entry.number] = entry
        self._by_id[entry.image_id] = entry
        self._by_base_name[entry.base_name] = entry

    def remove(self, entry: ImageEntry) -> None:
        """Make `entry` unknown."""
        del self._by_number[entry.number]
        del self._by_id[entry.image_id]
        del self._by_base_name[entry.base_name]

    def by_base_name(self, base_name: str) -> ImageEntry | None:
        """The image with this base name, if it is known."""
        return self._by_base_name.get(base_name)

    def by_id(self, image_id: str) -> ImageEntry | None:
        """The image with this id, if it is known."""
        return self._by_id.get(image_id)

    def by_number(self, number: int) -> ImageEntry | None:
        """The image with this number, if it is known."""
        return self._by_number.get(number)

    def entries(self) -> Collection[ImageEntry]:
        """All images, in the order in which they became known. Do not await while iterating."""
        return self._by_number.values()

    def find(self, text: str) -> ImageEntry:
        """The image with this id, base name or unique name, as an operator types it.

        Raises:
            ImageNotFoundError: none is known.
            AmbiguousImageError: the name fits several images that are not gone; the message lists their ids.
        """
        exact = self._by_id.get(text) or self._by_base_name.get(text)
        if exact is not None:
            return exact
        named = [entry for entry in self._by_number.values() if entry.record.name == text]
        candidates = [entry for entry in named if not entry.is_gone] or named
        if not candidates:
            raise errors.ImageNotFoundError(f"no image has the id, base name or name {text!r}")
        if len(candidates) > 1:
            ids = [entry.image_id for entry in candidates[:_IDS_SHOWN_MAX]]
            more = ", ..." if len(candidates) > _IDS_SHOWN_MAX else ""
            raise errors.AmbiguousImageError(f"{len(candidates)} images are named {text!r}: {', '.join(ids)}{more}")
        return candidates[0]
