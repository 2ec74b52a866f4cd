"""Every metric that basefs has: name, kind, labels, and what it means. docs/OPERATIONS.md says what to do about it."""

from dataclasses import dataclass
from typing import Literal

from basefs.core.histogram import DurationHistogram

Sample = tuple[str, tuple[str, ...], float | DurationHistogram]
"""Name of the metric, values of its labels, value."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `help` is what Prometheus shows beside it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


_SERVER = (
    Metric("basefs_build_info", "gauge", "Always 1; what runs.", ("version", "python", "kernel")),
    Metric("basefs_start_time_seconds", "gauge", "When this server began to serve, in seconds of Unix time."),
    Metric("basefs_serving", "gauge", "1 while the kernel's requests are answered."),
    Metric("basefs_server_restarts_total", "counter", "Servers that were started again since the mount was made."),
    Metric("basefs_server_start_info", "gauge", "Always 1; why this server was started.", ("reason", "last_death")),
    Metric("basefs_keeper_connected", "gauge", "1 while the keeper, which starts the next server, lives."),
    Metric("basefs_readers", "gauge", "Processes that answer reads of cached images by themselves."),
    Metric("basefs_reader_hits_total", "counter", "Reads that they answered; counted in basefs_cache_hits_total, too."),
    Metric("basefs_reader_attributes_total", "counter", "Times that they told the attributes of an image."),
    Metric("basefs_reader_forwarded_total", "counter", "Requests that they handed on to the server."),
    Metric("basefs_log_records_total", "counter", "Records of basefs of WARNING and above.", ("level",)),
    Metric("basefs_log_records_lost_total", "counter", "Records that the log did not take."),
    Metric("basefs_bugs_total", "counter", "Exceptions that nobody foresaw; each left a traceback in the log."),
    Metric("basefs_loop_delay_seconds", "histogram", "How late a timer of the event loop comes, once a second."),
)
_REQUESTS = (
    Metric(
        "basefs_fuse_request_duration_seconds",
        "histogram",
        "Time to the answer of the kernel's requests, but for reads that were answered at once (cache hits).",
        ("operation",),
    ),
    Metric("basefs_fuse_errors_total", "counter", "Requests answered by an error.", ("operation", "errno")),
    Metric("basefs_fuse_requests_in_flight", "gauge", "Requests that wait for their answer.", ("operation",)),
    Metric("basefs_hung_reads", "gauge", "Reads that have waited for more than 10 s."),
)
_CACHE = (
    Metric("basefs_cache_hits_total", "counter", "Reads of images answered at once."),
    Metric("basefs_cache_misses_total", "counter", "Reads of images that had to wait for Glance or the cache disk."),
    Metric("basefs_cache_hit_bytes_total", "counter", "Bytes answered at once."),
    Metric("basefs_cache_used_bytes", "gauge", "What the cache takes on its disk, in allocated blocks."),
    Metric("basefs_cache_limit_bytes", "gauge", "cache_max_bytes; absent where there is no limit."),
    Metric("basefs_cache_disk_free_bytes", "gauge", "Free on the disk of the cache."),
    Metric("basefs_cache_degraded", "gauge", "1 while the cache disk takes no bytes; they are served from memory."),
    Metric("basefs_cache_full", "gauge", "1 while the limits allow no more and nothing may be evicted."),
    Metric("basefs_cache_evicted_chunks_total", "counter", "Chunks that were evicted to make room."),
    Metric("basefs_cache_evicted_images_total", "counter", "Images that were evicted to make room."),
    Metric("basefs_cache_unstored_bytes_total", "counter", "Bytes that were served and not stored."),
    Metric("basefs_scrub_bytes_total", "counter", "Bytes that the scrub has read and checked."),
    Metric("basefs_scrub_damaged_chunks_total", "counter", "Chunks that the scrub found damaged."),
    Metric("basefs_scrub_round_timestamp_seconds", "gauge", "When the scrub last came to the end of all images."),
    Metric("basefs_cache_damaged_chunks_total", "counter", "Chunks that did not fit their checksum; fetched again."),
    Metric("basefs_hydrated_bytes_total", "counter", "Bytes that were fetched to complete images in use."),
    Metric("basefs_replayed_bytes_total", "counter", "Bytes that were fetched ahead because a boot trace has them."),
    Metric("basefs_hedged_requests_total", "counter", "Second requests for late bytes that a read waited for."),
    Metric("basefs_hedges_won_total", "counter", "Those that were quicker than the first."),
    Metric(
        "basefs_source_first_byte_seconds", "gauge", "How long a request takes to begin, when nothing else is asked."
    ),
    Metric("basefs_source_bytes_per_second", "gauge", "How fast bytes of images come, all requests together."),
    Metric("basefs_fetch_parameters", "gauge", "How requests are made because of these two.", ("parameter",)),
    Metric("basefs_verified_images_total", "counter", "Images found to have the hash that Glance tells."),
    Metric("basefs_hash_mismatches_total", "counter", "Images found to have another; fetched again once."),
)
_GRADUATION = (
    Metric("basefs_graduations_total", "counter", "Images that became files of the lower directory."),
    Metric("basefs_graduation_failures_total", "counter", "Tries at that which failed; each is made again."),
    Metric("basefs_graduated_bytes_total", "counter", "Bytes in those files, in allocated blocks."),
)
_LINKS = (
    Metric("basefs_links", "gauge", "Images by how they stand to their Cinder volumes.", ("state",)),
    Metric("basefs_link_attaches_total", "counter", "Volumes that were attached and read from."),
    Metric("basefs_link_attach_failures_total", "counter", "Tries at that which failed; each is made again."),
    Metric("basefs_link_breaks_total", "counter", "Volumes that failed a read, which went on through Glance."),
    Metric("basefs_link_detaches_total", "counter", "Volumes that were detached."),
    Metric("basefs_link_detach_failures_total", "counter", "Tries at that which failed; each is made again."),
    Metric("basefs_link_attach_duration_seconds", "histogram", "From the wish to the first read from the volume."),
)
_GLANCE = (
    Metric(
        "basefs_glance_requests_total",
        "counter",
        "Requests to Glance and Keystone by status; `none`: no answer came.",
        ("kind", "status"),
    ),
    Metric("basefs_glance_request_duration_seconds", "histogram", "Time to the head of an answer.", ("kind",)),
    Metric("basefs_glance_received_bytes_total", "counter", "Bytes of images that came from Glance."),
    Metric("basefs_glance_reachable", "gauge", "1 when the last contact with Glance succeeded, 0 when it failed."),
    Metric(
        "basefs_cache_tier_requests_total", "counter", "Ranges that the cache tier in front of Glance was asked for."
    ),
    Metric("basefs_cache_tier_received_bytes_total", "counter", "Bytes of images that came from the cache tier."),
    Metric("basefs_cache_tier_failovers_total", "counter", "Ranges that it was asked for, and Glance gave."),
    Metric("basefs_cache_tier_away", "gauge", "1 while the cache tier is not used because it failed."),
    Metric("basefs_endpoint_away", "gauge", "1 while probes of Glance or Keystone fail.", ("endpoint",)),
    Metric("basefs_outage", "gauge", "1 while nothing is fetched: Glance is away, or Keystone and no token is left."),
    Metric("basefs_catalog_refreshed_timestamp_seconds", "gauge", "When the image catalog was last refreshed."),
)
_SOURCES = (
    Metric("basefs_source_requests_total", "counter", "Requests for bytes of images, by source.", ("source",)),
    Metric("basefs_source_received_bytes_total", "counter", "Bytes of images that came, by source.", ("source",)),
    Metric("basefs_images_in_place", "gauge", "Images that are read from Glance's own files on this host."),
    Metric("basefs_in_place_breaks_total", "counter", "Reads that such a file failed; they went on elsewhere."),
    Metric(
        "basefs_store_resting",
        "gauge",
        "1 while a store behind Glance failed and was not seen to answer since; images come from their next source.",
        ("source", "endpoint"),
    ),
)
_IMAGES = (
    Metric("basefs_images", "gauge", "Images by what holds of them; one image may count in several.", ("what",)),
    Metric("basefs_open_handles", "gauge", "Handles on images that the kernel has open."),
    Metric("basefs_image_size_bytes", "gauge", "Size of an image that is used here.", ("image_id",)),
    Metric("basefs_image_cached_bytes", "gauge", "Bytes of an image that are here.", ("image_id",)),
    Metric("basefs_image_open_handles", "gauge", "Handles on an image.", ("image_id",)),
)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*_SERVER, *_REQUESTS, *_CACHE, *_GRADUATION, *_LINKS, *_GLANCE, *_SOURCES, *_IMAGES)
}
