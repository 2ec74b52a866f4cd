"""Where images are read from, over the service's objects."""

import os
from collections.abc import Callable
from typing import Any

import trio
from oslo_config import cfg

from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.config import Settings
from basefs.core.escrow import HeldFd
from basefs.core.location_kinds import SOURCE_NAMES
from basefs.handlers.comparing import Comparison
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.file_placing import FilePlacingTemplateImageHandler
from basefs.handlers.placed import PREFIX as PLACED_PREFIX
from basefs.handlers.placed import PlacedImages, PlaceFinder
from basefs.service.cache_parts import STREAMS_MAX, CacheParts
from basefs.service.keeper_channel import KeeperChannel
from basefs.sources.access import GlanceAccess
from basefs.sources.choice import SourceChoice
from basefs.sources.file_locations import FileLocations
from basefs.sources.glance import GlanceSource
from basefs.sources.locations import GlanceLocations
from basefs.sources.stores import open_stores
from basefs.sources.tier import CacheTierSource
from basefs.sources.tier_http import open_tier


class Sourcing:
    """`source` is what images are read through; `glance` and `tier` (None: there is none) are parts of it."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        access: GlanceAccess,
        settings: Settings,
        catalog: Catalog,
        nursery: trio.Nursery,
        handler: Callable[[], DownloadingTemplateImageHandler],
    ) -> None:
        """`handler()` gives the handler that keeps what was read, once something is read.

        Raises:
            ConfigError: the section of a store, or the TLS options of [glance], are not usable.
        """
        self._settings = settings
        self._catalog = catalog
        self._handler = handler
        self.placed: PlacedImages | None = None
        """The images that are read in place; None where none are."""
        self._held: list[HeldFd] = []
        self.glance = GlanceSource(access, threads_max=settings.fetch_threads_max + STREAMS_MAX)
        tier = open_tier(conf, access, threads_max=settings.fetch_threads_max)
        outage = access.endpoints.outage
        self.tier = None if tier is None else CacheTierSource(tier, self.glance, nursery, outage=outage)
        self.source = SourceChoice(
            self.tier or self.glance,
            open_stores(settings, conf, threads_max=settings.fetch_threads_max),
            GlanceLocations(access).locations,
            order=sorted(set(SOURCE_NAMES) & set(settings.source_order), key=settings.source_order.index),
            nursery=nursery,
            kept_start=self._kept_start,
            is_blamed=self._is_blamed,
            reads_from=self._reads_from,
            kept_locations=self._kept_locations,
            keep_locations=self._keep_locations,
        )

    async def place(
        self, cache: CacheParts, channel: KeeperChannel, nursery: trio.Nursery
    ) -> FilePlacingTemplateImageHandler | DownloadingTemplateImageHandler:
        """What images are prepared by, but for volumes: [file_location] decides. `begin` is to follow."""
        options = self._settings.file_location
        self._held = channel.take(PLACED_PREFIX)
        if not options.directories or "file" not in self._settings.source_order:
            for one in self._held:
                if cache.handler.reader_table is not None:
                    cache.handler.reader_table.revoke_inherited(int(one.key.removeprefix(PLACED_PREFIX)))
                os.close(one.fd)
                await channel.drop(one.key)
            return cache.handler
        finder = PlaceFinder(
            files=FileLocations(options.directories, any_name=options.any_name),
            locations=self.source.locations,
            has_before=lambda image_id: self.source.has_before(image_id, "file"),
            require_verified=self._settings.require_verified,
        )
        comparison = Comparison(cache.handler, self._settings.view)
        self.placed = PlacedImages(finder, cache.handler, comparison, cache.views, cache.uses, channel, nursery)
        return FilePlacingTemplateImageHandler(cache.handler, self.placed)

    async def begin(self) -> None:
        """Read on from what earlier servers read in place; who has what open is known by now."""
        if self.placed is not None:
            await self.placed.restore(self._held, self._catalog.entries())

    def is_placed(self, entry: ImageEntry) -> bool:
        """See `PlacedImages.is_placed`."""
        return self.placed is not None and self.placed.is_placed(entry)

    def distrust(self, entry: ImageEntry) -> None:
        """See `PlacedImages.distrust` and `CacheTierSource.pass_by`."""
        if self.tier is not None:
            self.tier.pass_by(entry.image_id)
        if self.placed is not None:
            self.placed.distrust(entry)

    def status(self) -> dict[str, Any]:
        """What `basefs status` tells."""
        in_place = {} if self.placed is None else {"images_in_place": self.placed.count()}
        tier = [] if self.tier is None else [self.tier.report()]
        return {**in_place, "stores": tier + self.source.stores_report()}

    def report(self, entry: ImageEntry) -> dict[str, Any]:
        """By which source the image was read last, and how the others stand."""
        told = self.source.report(entry.image_id)
        placed = [] if self.placed is None else self.placed.report(entry)
        others = [one for one in told["sources"] if not placed or one["source"] != "file"]
        return {**told, "sources": placed + others}

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

    def _kept_locations(self, image_id: str) -> tuple[str, ...]:
        entry = self._catalog.by_id(image_id)
        return () if entry is None else entry.local.locations

    def _keep_locations(self, image_id: str, locations: tuple[str, ...]) -> None:
        entry = self._catalog.by_id(image_id)
        if entry is not None and entry.local.locations != locations:
            entry.local.locations = locations
            self._catalog.touch(entry)

    def blame(self, entry: ImageEntry) -> None:
        """The image's bytes have another hash than Glance tells: it is read through Glance from here."""
        if not entry.local.glance_only and self.source.blame(entry.image_id):
            entry.local.glance_only = True
            self._catalog.touch(entry)
