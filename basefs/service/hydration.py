"""The hydrator, built and connected to what wakes it."""

from collections.abc import Callable

from basefs.cache.hydrator import Graduation, HydrationSettings, Hydrator
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.concurrency.outage import Outage
from basefs.config import Settings
from basefs.handlers.gate import ServableGate
from basefs.handlers.hydrated import NodeImages
from basefs.service.cache_parts import CacheParts


def build_hydrator(
    cache: CacheParts,
    catalog: Catalog,
    gate: ServableGate,
    settings: Settings,
    outage: Outage,
    *,
    graduation: Graduation,
    is_linked: Callable[[ImageEntry], bool],
) -> Hydrator:
    """The hydrator; its `run` is the caller's to start."""
    hydrator = Hydrator(
        NodeImages(catalog.entries, cache.uses, gate, check_deadline_s=settings.lookup_deadline_s, is_linked=is_linked),
        cache.handler.warmer,
        graduation,
        HydrationSettings(is_on=settings.hydrate_concurrency_max > 0, delay_s=settings.hydrate_delay_s),
        outage,
        catalog.touch,
    )
    cache.handler.uses_changed = cache.uses.overlays.looked = hydrator.wake
    return hydrator
