"""What the transfers of all images share: built once by the composition root."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from basefs.cache.disk_health import DiskHealth
from basefs.cache.evictor import Evictor
from basefs.cache.link_meter import LinkMeter
from basefs.cache.pace import Pace
from basefs.cache.reader_table import ReaderTable
from basefs.cache.space import CacheSpace
from basefs.cache.trace_store import TraceStore
from basefs.cache.unstored import UnstoredChunks
from basefs.cache.waiting_readers import WaitingReaders
from basefs.catalog.records import ImageEntry
from basefs.concurrency.outage import Outage
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.concurrency.threads import BlockingCalls
from basefs.core.hedging import Hedges
from basefs.sources.base import ImageSource


@dataclass(slots=True)
class FetchCounters:
    """What happened to all images since the server began."""

    damaged_chunks: int = 0
    """Cached chunks whose bytes did not fit their checksum; they were fetched again."""
    hydrated_bytes: int = 0
    """Fetched by hydration."""
    replayed_bytes: int = 0
    """Fetched ahead of readers, because a boot trace says so."""
    verified_images: int = 0
    """Images whose bytes had the hash that Glance tells."""
    mismatches: int = 0
    """Images whose bytes had another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchServices:
    """What every image's transfers share: built once by the service."""

    nursery: trio.Nursery
    source: ImageSource
    slots: PrioritySlots
    stream_slots: PrioritySlots
    disk: BlockingCalls
    request_bytes_max: int
    jitter: Callable[[], float]
    changed: Callable[[ImageEntry], None]
    counters: FetchCounters
    space: CacheSpace
    health: DiskHealth
    evictor: Evictor
    unstored: UnstoredChunks
    traces: TraceStore
    forget_pages: Callable[[ImageEntry], None] = lambda _entry: None
    """Have the kernel throw away what it keeps of the image: some of it was wrong."""
    good_at: Callable[[str], float] = lambda _image_id: math.inf
    """When an image can be read without Glance, see `SourceChoice.good_at`."""
    blame: Callable[[ImageEntry], None] = lambda _entry: None
    """The image's bytes have not the hash that Glance tells: have them come from elsewhere from here."""
    reader_table: ReaderTable | None = None
    """What readers look at before they serve an image; None where there are none."""
    outage: Outage = field(default_factory=Outage)
    readers: WaitingReaders = field(default_factory=WaitingReaders)
    pace: Pace = field(default_factory=Pace)
    link: LinkMeter = field(default_factory=LinkMeter)
    hedges: Hedges = field(default_factory=Hedges)
    hashes: BlockingCalls = field(default_factory=lambda: BlockingCalls("hashes", threads_max=1))
    """One at a time: hashing takes all of a core, which the guests may want."""
