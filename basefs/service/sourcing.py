"""Where images are read from, over the service's objects."""

from collections.abc import Callable

import trio

from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.config import Settings
from basefs.core.location_kinds import SOURCE_NAMES
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.service.cache_parts import STREAMS_MAX
from basefs.sources.access import GlanceAccess
from basefs.sources.choice import SourceChoice
from basefs.sources.glance import GlanceSource
from basefs.sources.locations import GlanceLocations
from basefs.sources.stores import open_stores


class Sourcing:
    """`source` is what images are read through; `glance` is the part of it that is Glance's."""

    def __init__(
        self,
        access: GlanceAccess,
        settings: Settings,
        catalog: Catalog,
        nursery: trio.Nursery,
        handler: Callable[[], DownloadingTemplateImageHandler],
    ) -> None:
        """`handler()` gives the handler that keeps what was read, once something is read.

        Raises:
            ConfigError: a store's section is not usable.
        """
        self._catalog = catalog
        self._handler = handler
        self.glance = GlanceSource(access, threads_max=settings.fetch_threads_max + STREAMS_MAX)
        self.source = SourceChoice(
            self.glance,
            open_stores(settings, threads_max=settings.fetch_threads_max),
            GlanceLocations(access).locations,
            order=sorted(set(SOURCE_NAMES) & set(settings.source_order), key=settings.source_order.index),
            nursery=nursery,
            kept_start=self._kept_start,
            is_blamed=self._is_blamed,
            reads_from=self._reads_from,
        )

    async def _kept_start(self, image_id: str, length: int) -> bytes | None:
        entry = self._catalog.by_id(image_id)
        return None if entry is None else await self._handler().kept_start(entry, length)

    def _is_blamed(self, image_id: str) -> bool:
        entry = self._catalog.by_id(image_id)
        return entry is not None and entry.local.glance_only

    def _reads_from(self, image_id: str, reason: str) -> None:
        entry = self._catalog.by_id(image_id)
        if entry is not None:
            entry.local.source_kind, entry.local.source_reason = "ranged", reason
            self._catalog.touch(entry)

    def blame(self, entry: ImageEntry) -> None:
        """The image's bytes have another hash than Glance tells: it is read through Glance from here."""
        if not entry.local.glance_only and self.source.blame(entry.image_id):
            entry.local.glance_only = True
            self._catalog.touch(entry)
