"""Volume-linking over the service's objects; none of it where nothing is linked and nothing is left of a link."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from basefs.cache.state_db import StateDatabase
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.config import Settings
from basefs.core.escrow import HeldFd
from basefs.handlers.base import TemplateImageHandler
from basefs.handlers.lending import LEASE_PREFIX
from basefs.handlers.link import LinkSettings
from basefs.handlers.link_steps import CONNECTION_PREFIX, FD_PREFIX, LinkSteps
from basefs.handlers.links import Links
from basefs.handlers.volume_linking import VolumeLinkingTemplateImageHandler
from basefs.service.cache_parts import CacheParts
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.last_config import Loaded
from basefs.sources.access import GlanceAccess
from basefs.sources.locations import GlanceLocations
from basefs.volumes.links import open_volume_links


class Linking:
    """What the service holds of it. `handler` is what images are prepared by; `links` is None without linking."""

    def __init__(
        self, handler: TemplateImageHandler, links: Links | None, held: list[HeldFd], nursery: trio.Nursery
    ) -> None:
        self.handler = handler
        self.links = links
        self._held = held
        self._nursery = nursery

    async def begin(self) -> None:
        """Go on with what earlier servers linked; who has what open is known by now."""
        if self.links is not None:
            await self.links.restore(self._held)
            self._nursery.start_soon(self.links.run)

    def is_linked(self, entry: ImageEntry) -> bool:
        """See `Links.is_linked`."""
        return self.links is not None and self.links.is_linked(entry)

    def bring(self, entry: ImageEntry, otherwise: Callable[[], object]) -> None:
        """Have the image linked, or have its bytes brought by `otherwise()` where it has no volume; returns at once."""
        if self.links is None:
            otherwise()
        else:
            self._nursery.start_soon(self._bring, self.links, entry, otherwise)

    async def _bring(self, links: Links, entry: ImageEntry, otherwise: Callable[[], object]) -> None:
        """Ends when the image is linked, or cannot be now."""
        links.want(entry)
        if await links.wait_settled(entry) != "linked":
            otherwise()

    def status(self) -> dict[str, Any]:
        """What `basefs status` tells: images by how they stand to their volumes."""
        if self.links is None:
            return {}
        states = self.links.states()
        linking = sum(states[state] for state in ("finding", "linking", "reopening"))
        return {
            "images_linked": states["linked"],
            "images_linking": linking,
            "images_link_refused": states["refused"],
            "images_link_broken": states["broken"],
            "images_detaching": states["detaching"],
        }

    def distrust(self, entry: ImageEntry) -> None:
        """See `Links.distrust`."""
        if self.links is not None:
            self.links.distrust(entry)

    def wakes(self, hydrator_wake: Callable[[], None], cache: CacheParts) -> None:
        """Have the hydrator woken when links change, and the links when overlays were looked at."""
        links = self.links
        if links is None:
            return
        links.tasks.changed = hydrator_wake

        def looked() -> None:
            hydrator_wake()
            links.look()

        cache.uses.overlays.looked = looked

    def stored_by(self, database: StateDatabase) -> Callable[[ImageEntry], Awaitable[None]]:
        """`database.stored` for who makes images lower files: what became one is detached."""

        async def stored(entry: ImageEntry) -> None:
            await database.stored(entry)
            if self.links is not None:
                self.links.look(entry)

        return stored


def build_linking(
    loaded: Loaded,
    settings: Settings,
    catalog: Catalog,
    cache: CacheParts,
    handler: TemplateImageHandler,
    access: GlanceAccess,
    channel: KeeperChannel,
    database: StateDatabase,
    nursery: trio.Nursery,
) -> Linking:
    """By `template_image_handler` and `source_order`; what an earlier server linked is detached where nothing is.

    `handler` prepares what is not linked.

    Raises:
        ConfigError: `[cinder]` is not usable.
    """
    held = [one for prefix in (FD_PREFIX, CONNECTION_PREFIX, LEASE_PREFIX) for one in channel.take(prefix)]
    is_on = settings.template_image_handler != "downloading" and "volume" in settings.source_order
    if not is_on and not held and not any(entry.local.link for entry in catalog.entries()):
        return Linking(handler, None, held, nursery)
    options = settings.volume_linking
    link_settings = LinkSettings(
        is_on=is_on,
        attach_deadline_s=options.attach_deadline_s,
        detach_idle_s=options.detach_idle_s,
        concurrency_max=options.attach_concurrency_max,
        require_verified=settings.require_verified,
        view=settings.view,
    )
    volumes = open_volume_links(loaded.conf, options, GlanceLocations(access).locations, nursery=nursery)
    steps = LinkSteps(volumes, cache.handler, cache.views, channel, link_settings, stored=database.stored)
    links = Links(steps, cache.uses, channel, link_settings, nursery, catalog.entries)
    return Linking(VolumeLinkingTemplateImageHandler(handler, links), links, held, nursery)
