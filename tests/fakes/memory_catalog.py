"""What the catalog talks to, without threads, so that tests may use trio's mock clock."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry, ImageRecord
from basefs.core.names import base_name_of
from tests.fakes.memory_glance import MemoryGlance


class MemoryMetadata:
    """`ImageMetadata` over a `MemoryGlance`. `before` is called (and may raise) before each answer."""

    def __init__(self) -> None:
        self.glance = MemoryGlance()
        self.lists: list[str | None] = []
        """`updated_since` of each list asked for."""
        self.shows: list[str] = []
        self.error: errors.BasefsError | None = None
        self.hold: trio.Event | None = None
        """While set, answers wait for it; what they say was looked up before."""
        self.hidden_from_lists: set[str] = set()
        self.before: Callable[[], None] | None = None

    async def list_images(self, *, updated_since: str | None = None) -> list[Mapping[str, Any]]:
        self.lists.append(updated_since)
        found = [
            dict(image)
            for image in self.glance.images.values()
            if image["updated_at"] >= (updated_since or "") and image["id"] not in self.hidden_from_lists
        ]
        await self._answer()
        return found

    async def show_image(self, image_id: str) -> Mapping[str, Any]:
        self.shows.append(image_id)
        image = self.glance.images.get(image_id)
        await self._answer()
        if image is None:
            raise errors.ImageNotFoundError(f"image {image_id}: Glance answered 404")
        return dict(image)

    async def _answer(self) -> None:
        error = self.error
        if self.hold is not None:
            await self.hold.wait()
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error


class MemoryStore:
    """`CatalogStore` in memory; a new one with the old one's `rows` is the next life."""

    def __init__(self, before: "MemoryStore | None" = None) -> None:
        self.rows: dict[str, ImageEntry] = {} if before is None else before.rows
        self.stored_values: dict[str, str] = {} if before is None else before.stored_values
        self.next_number = 1 if before is None else before.next_number
        self.touched: list[str] = []
        self.error: errors.CacheError | None = None

    async def load(self) -> list[ImageEntry]:
        return [
            ImageEntry(
                number=row.number, base_name=row.base_name, record=row.record, verdict=row.verdict, is_gone=row.is_gone
            )
            for row in self.rows.values()
        ]

    async def values(self) -> Mapping[str, str]:
        return dict(self.stored_values)

    async def upsert(self, records: Sequence[ImageRecord], values: Mapping[str, str]) -> Mapping[str, int]:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        numbers = {}
        for record in records:
            row = self.rows.get(record.image_id)
            if row is None:
                row = ImageEntry(number=self.next_number, base_name=base_name_of(record.image_id), record=record)
                self.next_number += 1
                self.rows[record.image_id] = row
            row.record = record
            numbers[record.image_id] = row.number
        self.stored_values.update(values)
        return numbers

    def touch(self, entry: ImageEntry) -> None:
        row = self.rows[entry.image_id]
        row.verdict, row.is_gone = entry.verdict, entry.is_gone
        self.touched.append(entry.image_id)

    async def forget(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        self.rows = {image_id: row for image_id, row in self.rows.items() if row.number != number}
