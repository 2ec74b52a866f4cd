"""What the transfers of all images share: built once by the composition root."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from basefs.cache.disk_health import DiskHealth
from basefs.cache.evictor import Evictor
from basefs.cache.space import CacheSpace
from basefs.cache.unstored import UnstoredChunks
from basefs.catalog.records import ImageEntry
from basefs.concurrency.outage import Outage
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.concurrency.threads import BlockingCalls
from basefs.sources.base import ImageSource


@dataclass(slots=True)
class FetchCounters:
    """What happened to all images since the server began."""

    damaged_chunks: int = 0
    """Cached chunks whose bytes did not fit their checksum; they were fetched again."""


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
    forget_pages: Callable[[ImageEntry], None] = lambda _entry: None
    """Have the kernel throw away what it keeps of the image: some of it was wrong."""
    outage: Outage = field(default_factory=Outage)
