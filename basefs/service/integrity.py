"""What checks the cache: `basefs image verify`, the scrub, and the pages of the kernel that turned out wrong."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import trio

from basefs import errors
from basefs.cache.image_check import CheckedImages, CheckProgress, check_image
from basefs.cache.scrub import Scrubber, ScrubSettings
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.catalog.store import CatalogStore
from basefs.config import Settings
from basefs.control.api import PROGRESS_INTERVAL_S
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.uses import ImageUses


class Integrity:
    """Checks of what is here; `scrubber` is None where the scrub is switched off."""

    def __init__(
        self,
        catalog: Catalog,
        handler: DownloadingTemplateImageHandler,
        uses: ImageUses,
        store: CatalogStore,
        settings: Settings,
    ) -> None:
        self._catalog = catalog
        self._handler = handler
        self._images = CheckedImages(
            open=handler.checked_image,
            is_used=lambda entry: bool(uses.why_in_use(entry)),
            refetch_deadline_s=settings.other_io_deadline_s,
        )
        self.scrubber: Scrubber | None = None
        if settings.scrub_bytes_s:
            pace = ScrubSettings(bytes_s=settings.scrub_bytes_s, interval_s=settings.scrub_interval_s)
            self.scrubber = Scrubber(self._images, store, self.stored, handler.readers_wait, pace)

    async def run(self) -> None:
        """Scrub, if that is wanted. Ends when it is cancelled."""
        if self.scrubber is not None:
            await self.scrubber.run()

    def status(self) -> dict[str, Any]:
        """What `basefs status` shows of the scrub."""
        if self.scrubber is None:
            return {"scrub": "off"}
        counters = self.scrubber.counters
        return {
            "scrubbed_bytes": counters.bytes,
            "scrub_damaged_chunks": counters.damaged_chunks,
            "scrub_last_round_at": counters.last_round_at,
        }

    async def stored(self) -> list[ImageEntry]:
        """The images that have a chunk file, by number."""
        numbers = await self._handler.stored_numbers()
        return [entry for number in sorted(numbers) if (entry := self._catalog.by_number(number)) is not None]

    async def verify(self, ref: str | None) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.verify`."""
        for entry in [self._catalog.find(ref)] if ref is not None else await self.stored():
            last = CheckProgress(image_id=entry.image_id, size=entry.size, cached_bytes=entry.local.cached_bytes)
            told_at = trio.current_time()
            try:
                async with aclosing(check_image(entry, self._images)) as steps:
                    async for last in steps:
                        if trio.current_time() >= told_at + PROGRESS_INTERVAL_S:
                            told_at = trio.current_time()
                            yield {**asdict(last), "state": "checking"}
            except errors.CacheError as exc:
                yield {**asdict(last), "state": "failed", "error": str(exc)}
            else:
                yield {**asdict(last), "state": "checked"}
        yield {"state": "ended"}
