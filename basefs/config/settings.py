"""The checked configuration, as one frozen value that is handed out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from basefs.config.source_options import FileLocationSettings, HttpLocationSettings
from basefs.config.store_options import RbdSettings, S3Settings, SwiftSettings
from basefs.config.volume_options import VolumeLinkingSettings

Handler = Literal["auto", "downloading", "volume-linking"]
View = Literal["raw", "stored"]
TraceShare = Literal["none", "glance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`[basefs]`, `[trace]` and the sections of volumes and stores in the configuration files, checked together.

    Paths are absolute, without links or `..`.
    Names and bounds are those of `options.py`; `*_s` are seconds, `*_bytes` bytes.
    """

    mountpoint: Path
    cache_dir: Path
    control_socket: Path
    instances_path: Path
    nova_user: str
    template_image_handler: Handler
    source_order: tuple[str, ...]
    view: View
    verify_glance_signatures: bool
    chunk_bytes: int
    cache_max_bytes: int
    cache_min_free_bytes: int
    fetch_threads_max: int
    fetch_request_bytes_max: int
    read_ahead_bytes: int
    max_background: int
    readers: int
    catalog_refresh_s: float
    catalog_full_refresh_s: float
    lookup_deadline_s: float
    guest_io_deadline_s: float
    other_io_deadline_s: float
    scrub_bytes_s: int
    scrub_interval_s: float
    hydrate_concurrency_max: int
    hydrate_max_bytes_s: int
    hydrate_delay_s: float
    require_verified: bool
    graduate: bool
    metrics_listen: str
    watchdog_s: float
    upgrade_deadline_s: float
    trace_share: TraceShare
    volume_linking: VolumeLinkingSettings
    http_location: HttpLocationSettings
    file_location: FileLocationSettings
    rbd: RbdSettings | None
    s3: S3Settings | None
    swift: SwiftSettings | None
