"""What the metrics are read from: plain counters of the service's objects, looked at when somebody asks.

Nothing here knows Prometheus, and nothing below the service knows metrics. `take` runs in the loop and only copies;
`metrics_text` makes the answer of it in a thread.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import trio

from basefs.cache.fetch_services import FetchCounters
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.core.histogram import DurationHistogram
from basefs.fuse.operations import Operations
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.gate import ServableGate
from basefs.handlers.graduation import Graduator
from basefs.handlers.placed import PlacedImages
from basefs.log_writer import LogWriter
from basefs.service.cache_parts import CacheParts
from basefs.service.integrity import Integrity
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.linking import Linking
from basefs.service.metrics_table import Sample
from basefs.service.readers import Readers
from basefs.sources.access import GlanceAccess
from basefs.sources.choice import SourceChoice
from basefs.sources.glance import GlanceSource
from basefs.sources.request_stats import RequestKind
from basefs.sources.tier import CacheTierSource

IMAGES_MAX = 200
"""Images with series of their own: those used here, the last used first. A node runs fewer; Prometheus keeps each."""
LOOP_PROBE_S = 1.0
# What begins at 0: of a series that comes with its first event, Prometheus' increase() does not see that event.
_NO_ERRORS = {(operation, "EIO"): 0 for operation in ("lookup", "getattr", "open", "read", "readdir", "unlink")}
_NO_REFUSALS: dict[tuple[RequestKind, str], int] = {
    (kind, status): 0 for kind in get_args(RequestKind) for status in ("401", "403")
}


class RecordCounts(logging.Handler):
    """Counts the records of WARNING and above that pass, by level."""

    def __init__(self, writers: Sequence[LogWriter]) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self._writers = writers

    @property
    def lost(self) -> int:
        """Records that the log did not take."""
        return sum(writer.lost for writer in self._writers)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.counts[record.levelname.lower()] += 1


def count_records() -> RecordCounts:
    """The counts of what basefs logs from now on."""
    counts = RecordCounts([handler for handler in logging.getLogger().handlers if isinstance(handler, LogWriter)])
    logging.getLogger("basefs").addHandler(counts)
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsParts:
    """The objects that are looked at."""

    catalog: Catalog
    gate: ServableGate
    handler: DownloadingTemplateImageHandler
    source: SourceChoice
    glance: GlanceSource
    placed: PlacedImages | None
    tier: CacheTierSource | None
    access: GlanceAccess
    operations: Operations
    counters: FetchCounters
    records: RecordCounts
    channel: KeeperChannel
    cache: CacheParts
    integrity: Integrity
    graduator: Graduator
    linking: Linking
    readers: Readers
    is_serving: Callable[[], bool]


class Metrics:
    """`take` what there is to tell. Owned by the loop."""

    def __init__(self, parts: MetricsParts) -> None:
        self._parts = parts
        self._started_at = time.time()
        self._loop_delay = DurationHistogram()

    async def run(self) -> None:
        """Look once a second how late the loop is. Ends when it is cancelled."""
        while True:
            due = trio.current_time() + LOOP_PROBE_S
            await trio.sleep_until(due)
            self._loop_delay.add(trio.current_time() - due)

    def take(self) -> list[Sample]:
        """All samples as they are now; nothing in them changes any more."""
        return [
            *self._server(),
            *self._requests(),
            *self._cache(),
            *self._graduation(),
            *self._links(),
            *self._glance(),
            *self._sources(),
            *self._images(),
        ]

    def _server(self) -> Iterator[Sample]:
        parts = self._parts
        yield "basefs_start_time_seconds", (), self._started_at
        yield "basefs_serving", (), float(parts.is_serving())
        begun = parts.channel.begun
        yield "basefs_server_restarts_total", (), begun.get("restarts", 0)
        yield "basefs_server_start_info", (str(begun.get("reason", "first")), str(begun.get("last_death") or "")), 1
        yield "basefs_keeper_connected", (), float(parts.channel.is_connected)
        by_readers = parts.readers.counts()
        yield "basefs_readers", (), by_readers["readers"]
        yield "basefs_reader_hits_total", (), by_readers["hits"]
        yield "basefs_reader_attributes_total", (), by_readers["attributes"]
        yield "basefs_reader_forwarded_total", (), by_readers["forwarded"]
        for level in ("warning", "error", "critical"):
            yield "basefs_log_records_total", (level,), parts.records.counts[level]
        yield "basefs_log_records_lost_total", (), parts.records.lost
        yield "basefs_bugs_total", (), parts.operations.stats.bugs
        yield "basefs_loop_delay_seconds", (), self._loop_delay.copy()

    def _requests(self) -> Iterator[Sample]:
        stats = self._parts.operations.stats
        for operation, histogram in stats.durations.items():
            yield "basefs_fuse_request_duration_seconds", (operation,), histogram.copy()
        for labels, count in {**_NO_ERRORS, **stats.errors}.items():
            yield "basefs_fuse_errors_total", labels, count
        for operation, count in {"read": 0, **stats.under_way()}.items():
            yield "basefs_fuse_requests_in_flight", (operation,), count
        yield "basefs_hung_reads", (), stats.hung_reads()

    def _cache(self) -> Iterator[Sample]:
        parts = self._parts
        by_readers = parts.readers.counts()
        yield "basefs_cache_hits_total", (), parts.operations.hits + by_readers["hits"]
        yield "basefs_cache_misses_total", (), parts.operations.misses
        yield "basefs_cache_hit_bytes_total", (), parts.operations.hit_bytes + by_readers["hit_bytes"]
        yield "basefs_cache_damaged_chunks_total", (), parts.counters.damaged_chunks
        yield "basefs_replayed_bytes_total", (), parts.counters.replayed_bytes
        yield "basefs_hydrated_bytes_total", (), parts.counters.hydrated_bytes
        yield from self._planner()
        yield "basefs_verified_images_total", (), parts.counters.verified_images
        yield "basefs_hash_mismatches_total", (), parts.counters.mismatches

        yield from self._space()
        if parts.integrity.scrubber is not None:
            scrub = parts.integrity.scrubber.counters
            yield "basefs_scrub_bytes_total", (), scrub.bytes
            yield "basefs_scrub_damaged_chunks_total", (), scrub.damaged_chunks
            if scrub.last_round_at is not None:
                yield "basefs_scrub_round_timestamp_seconds", (), scrub.last_round_at

    def _planner(self) -> Iterator[Sample]:
        services = self._parts.cache.services
        estimate, hedges = services.link.estimate, services.hedges
        yield "basefs_hedged_requests_total", (), hedges.hedged
        yield "basefs_hedges_won_total", (), hedges.won
        if estimate.first_byte_s is not None:
            yield "basefs_source_first_byte_seconds", (), estimate.first_byte_s
        if estimate.bytes_s is not None:
            yield "basefs_source_bytes_per_second", (), estimate.bytes_s
        for name, value in dataclasses.asdict(estimate.parameters).items():
            yield "basefs_fetch_parameters", (name,), value

    def _space(self) -> Iterator[Sample]:
        cache = self._parts.cache
        seen, evicted = cache.space.report(), cache.evictor.counters
        yield "basefs_cache_used_bytes", (), seen.allocated_bytes
        if cache.space.limits.max_bytes:
            yield "basefs_cache_limit_bytes", (), cache.space.limits.max_bytes
        if seen.free_bytes is not None:
            yield "basefs_cache_disk_free_bytes", (), seen.free_bytes
        yield "basefs_cache_degraded", (), float(not cache.health.is_usable)
        yield "basefs_cache_full", (), float(cache.evictor.is_full)
        yield "basefs_cache_evicted_chunks_total", (), evicted.chunks
        yield "basefs_cache_evicted_images_total", (), evicted.images
        yield "basefs_cache_unstored_bytes_total", (), evicted.unstored_bytes

    def _graduation(self) -> Iterator[Sample]:
        counters = self._parts.graduator.counters
        yield "basefs_graduations_total", (), counters.images
        yield "basefs_graduation_failures_total", (), counters.failures
        yield "basefs_graduated_bytes_total", (), counters.bytes

    def _links(self) -> Iterator[Sample]:
        links = self._parts.linking.links
        if links is None:
            return
        states = links.states()
        for state in ("finding", "linking", "reopening", "linked", "refused", "broken", "detaching"):
            yield "basefs_links", (state,), states[state]
        counters = links.steps.counters
        yield "basefs_link_attaches_total", (), counters.attaches
        yield "basefs_link_attach_failures_total", (), counters.attach_failures
        yield "basefs_link_breaks_total", (), counters.breaks
        yield "basefs_link_detaches_total", (), counters.detaches
        yield "basefs_link_detach_failures_total", (), counters.detach_failures
        yield "basefs_link_attach_duration_seconds", (), counters.attach_durations.copy()

    def _glance(self) -> Iterator[Sample]:
        parts = self._parts
        http = parts.access.session.stats
        for (kind, status), count in {**_NO_REFUSALS, **http.counts()}.items():
            yield "basefs_glance_requests_total", (kind, status), count
        for name, histogram in http.durations().items():
            yield "basefs_glance_request_duration_seconds", (name,), histogram
        yield "basefs_glance_received_bytes_total", (), parts.glance.received_bytes
        if parts.tier is not None:
            yield "basefs_cache_tier_requests_total", (), parts.tier.tier.requests
            yield "basefs_cache_tier_received_bytes_total", (), parts.tier.tier.received_bytes
            yield "basefs_cache_tier_failovers_total", (), parts.tier.failovers
            yield "basefs_cache_tier_away", (), float(not parts.tier.is_used)
        if parts.access.contact.reachable is not None:
            yield "basefs_glance_reachable", (), float(parts.access.contact.reachable)
        endpoints = parts.access.endpoints
        for endpoint, report in endpoints.report().items():
            yield "basefs_endpoint_away", (endpoint,), float(report["state"] == "away")
        yield "basefs_outage", (), float(endpoints.outage.is_on)
        if parts.catalog.refreshed_at is not None:
            yield "basefs_catalog_refreshed_timestamp_seconds", (), parts.catalog.refreshed_at

    def _sources(self) -> Iterator[Sample]:
        source = self._parts.source
        for name, (requests, received_bytes) in source.counts().items():
            yield "basefs_source_requests_total", (name,), requests
            yield "basefs_source_received_bytes_total", (name,), received_bytes
        if (placed := self._parts.placed) is not None:
            yield "basefs_images_in_place", (), placed.count()
            yield "basefs_in_place_breaks_total", (), placed.breaks
        for store in source.stores_report():
            yield "basefs_store_resting", (store["source"], store["endpoint"]), float(store["state"] == "resting")

    def _images(self) -> Iterator[Sample]:
        gate, handler = self._parts.gate, self._parts.handler
        entries = self._parts.catalog.entries()
        handles = {entry: opens for entry in entries if (opens := handler.open_handles(entry))}
        used = used_images(entries, handles)
        yield "basefs_images", ("known",), len(entries)
        yield "basefs_images", ("refused",), sum(1 for entry in entries if gate.verdict(entry).state == "refused")
        yield "basefs_images", ("open",), len(handles)
        yield "basefs_images", ("used_here",), len(used)
        yield "basefs_images", ("graduated",), sum(1 for entry in entries if entry.local.is_graduated)
        yield "basefs_images", ("hydrating",), handler.warmer.hydrating
        for whole in ("verified", "refetching", "quarantined"):
            yield "basefs_images", (whole,), sum(1 for entry in entries if entry.local.whole == whole)
        yield "basefs_open_handles", (), sum(handles.values())
        for entry in used[:IMAGES_MAX]:
            labels = (entry.image_id,)
            yield "basefs_image_size_bytes", labels, entry.size
            yield "basefs_image_cached_bytes", labels, entry.local.cached_bytes
            yield "basefs_image_open_handles", labels, handles.get(entry, 0)


def used_images(entries: Iterable[ImageEntry], opened: Iterable[ImageEntry]) -> list[ImageEntry]:
    """The images with local state or open, those that are open first, then the last used ones."""
    is_open = set(opened)
    used = [entry for entry in entries if entry.local.used_at_ns is not None or entry in is_open]
    return sorted(used, key=lambda entry: (entry not in is_open, -(entry.local.used_at_ns or 0)))


async def run_metrics(metrics: Metrics, address: tuple[str, int] | None) -> None:
    """Answer scrapes on `address` until cancelled; nothing without one."""
    if address is None:
        return
    serve_metrics = await trio.to_thread.run_sync(_import_metrics_server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.run)
        nursery.start_soon(serve_metrics, address, metrics.take)


def _import_metrics_server() -> Callable[[tuple[str, int], Callable[[], list[Sample]]], Awaitable[None]]:
    # Late, and in a thread, as the control socket's server: no guest waits for it.
    from basefs.service.metrics_server import serve_metrics

    return serve_metrics
