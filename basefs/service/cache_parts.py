"""The cache's objects, built together: accountant, evictor, disk health, overlays, and the handler over them."""

import dataclasses
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from basefs import errors
from basefs.cache.disk_health import DISK_RETRY_S, DiskHealth
from basefs.cache.evictor import EvictionCounters, Evictor
from basefs.cache.fetch_services import FetchCounters, FetchServices
from basefs.cache.overlays import OverlayWatch
from basefs.cache.pace import Pace
from basefs.cache.reader_table import ReaderTable
from basefs.cache.space import CacheLimits, CacheSpace
from basefs.cache.trace_sharing import Publish, TraceSharing
from basefs.cache.trace_store import TraceStore
from basefs.cache.unstored import UnstoredChunks
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.concurrency.outage import Outage
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.concurrency.threads import BlockingCalls
from basefs.config import Settings
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.evictable import HandlerContents
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.uses import ImageUses
from basefs.sources.choice import SourceChoice
from basefs.views.choice import Views

log = logging.getLogger(__name__)

DISK_THREADS_MAX = 16
STREAMS_MAX = 8
"""Images that come as one stream at a time; apart from `fetch_threads_max`, for a stream takes minutes."""
BACKGROUND_RESERVE = 2
"""Request slots that background work leaves to readers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheParts:
    """What the service holds of the cache."""

    handler: DownloadingTemplateImageHandler
    uses: ImageUses
    space: CacheSpace
    health: DiskHealth
    evictor: Evictor
    services: FetchServices
    views: Views

    def status(self) -> dict[str, Any]:
        """What `basefs status` says of the cache. `cache_state`: ok, full (nothing may be evicted), degraded (disk)."""
        limits, seen, counters = self.space.limits, self.space.report(), self.evictor.counters
        degraded = not self.health.is_usable
        return {
            "cache_state": "degraded" if degraded else "full" if self.evictor.is_full else "ok",
            "cache_reason": self.health.reason,
            "cache_allocated_bytes": seen.allocated_bytes,
            "cache_max_bytes": limits.max_bytes,
            "cache_disk_free_bytes": seen.free_bytes,
            "cache_min_free_bytes": limits.min_free_bytes,
            "evicted_chunks": counters.chunks,
            "evicted_images": counters.images,
            "unstored_bytes": counters.unstored_bytes,
            "planner": self._planner(),
        }

    def _planner(self) -> dict[str, Any]:
        """What is known of the way to the source, how requests are made because of it, and how many were hedged."""
        estimate, hedges = self.services.link.estimate, self.services.hedges
        return {
            "first_byte_s": None if estimate.first_byte_s is None else round(estimate.first_byte_s, 6),
            "bytes_s": None if estimate.bytes_s is None else int(estimate.bytes_s),
            **dataclasses.asdict(estimate.parameters),
            "hedged": hedges.hedged,
            "hedges_won": hedges.won,
        }


async def build_cache(
    nursery: trio.Nursery,
    source: SourceChoice,
    catalog: Catalog,
    counters: FetchCounters,
    settings: Settings,
    *,
    outage: Outage,
    forget_pages: Callable[[ImageEntry], None],
    blame: Callable[[ImageEntry], None],
    is_first: bool,
    graduated: GraduatedImages,
    publish_trace: Publish,
    reader_table: ReaderTable,
) -> CacheParts:
    """The parts, at work in the service nursery. What is there already is counted meanwhile; only writes wait for it.

    Raises:
        CacheError: the cache directory cannot be used, and no server has served the mount yet (`is_first`).
    """
    chunks_dir = settings.cache_dir / "chunks"
    limits = CacheLimits(max_bytes=settings.cache_max_bytes, min_free_bytes=settings.cache_min_free_bytes)
    disk = BlockingCalls("disk", threads_max=DISK_THREADS_MAX)
    space = CacheSpace(settings.cache_dir, chunks_dir, limits)
    health = DiskHealth(chunks_dir, nursery, disk)
    evictor = Evictor(space, disk, EvictionCounters())
    health.relieve = evictor.relieve
    views = Views(settings.view)

    sharing = None if settings.trace_share == "none" else TraceSharing(publish_trace, nursery, random.random)

    def forget(entry: ImageEntry) -> None:
        views.forget(entry)
        forget_pages(entry)

    services = FetchServices(
        nursery=nursery,
        source=source,
        slots=PrioritySlots(settings.fetch_threads_max, reserved=BACKGROUND_RESERVE),
        stream_slots=PrioritySlots(STREAMS_MAX, reserved=0),
        disk=disk,
        request_bytes_max=settings.fetch_request_bytes_max,
        jitter=random.random,
        changed=catalog.touch,
        counters=counters,
        space=space,
        health=health,
        evictor=evictor,
        unstored=UnstoredChunks(),
        traces=TraceStore(settings.cache_dir / "traces", disk, sharing),
        good_at=source.good_at,
        blame=blame,
        outage=outage,
        forget_pages=forget,
        reader_table=reader_table,
        pace=Pace(concurrency_max=max(1, settings.hydrate_concurrency_max), bytes_s=settings.hydrate_max_bytes_s),
    )
    handler = DownloadingTemplateImageHandler(chunks_dir, settings.chunk_bytes, services, views, graduated=graduated)
    known = {entry.number: entry for entry in catalog.entries()}
    if is_first:
        await handler.init()
        await handler.tidy_up(known)
    uses = ImageUses(handler, OverlayWatch(settings.instances_path, settings.mountpoint))
    # The mount waits for a later server, and a cache disk that fails or hangs by now is no reason not to serve.
    nursery.start_soon(_settle_in, handler, None if is_first else known, space, health, disk)
    nursery.start_soon(services.traces.load)
    nursery.start_soon(uses.overlays.run)
    nursery.start_soon(evictor.run, HandlerContents(handler, catalog.entries, uses, space))
    return CacheParts(
        handler=handler, uses=uses, space=space, health=health, evictor=evictor, services=services, views=views
    )


async def _settle_in(
    handler: DownloadingTemplateImageHandler,
    known: Mapping[int, ImageEntry] | None,
    space: CacheSpace,
    health: DiskHealth,
    disk: BlockingCalls,
) -> None:
    """Ends when the cache directory is tidied up (but for images in `known`) and what is in it is counted."""
    if known is not None:
        try:
            await handler.init()
            await handler.tidy_up(known)
        except (errors.CacheError, OSError) as exc:
            log.warning("the cache directory was not tidied up: %s", exc)
    while True:
        try:
            await disk.run(space.count)
        except errors.CacheError as exc:
            health.failed(exc)
            await trio.sleep(DISK_RETRY_S)
        else:
            return
