"""What the transfers of all images share, for tests: over a directory and any source."""

from collections.abc import Callable
from pathlib import Path

import trio

from basefs.cache.disk_health import DiskHealth
from basefs.cache.evictor import EvictionCounters, Evictor
from basefs.cache.fetch_services import FetchCounters, FetchServices
from basefs.cache.link_meter import LinkMeter
from basefs.cache.pace import Pace
from basefs.cache.space import CacheLimits, CacheSpace
from basefs.cache.trace_store import TraceStore
from basefs.cache.unstored import UnstoredChunks
from basefs.catalog.records import ImageEntry
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.concurrency.threads import BlockingCalls
from basefs.sources.base import ImageSource

NO_LIMITS = CacheLimits()


def make_services(
    nursery: trio.Nursery,
    source: ImageSource,
    directory: Path,
    *,
    limits: CacheLimits = NO_LIMITS,
    counters: FetchCounters | None = None,
    changed: Callable[[ImageEntry], None] = lambda _entry: None,
    pace: Pace | None = None,
    link: LinkMeter | None = None,
) -> FetchServices:
    """Services whose accountant has counted `directory`. The evictor's task is not started.

    Without a `link` of the test's nothing is measured, so requests are made alike however fast the machine is.
    """
    disk = BlockingCalls("disk", threads_max=4)
    space = CacheSpace(directory, directory, limits)
    space.count()
    health = DiskHealth(directory, nursery, disk)
    evictor = Evictor(space, disk, EvictionCounters())
    health.relieve = evictor.relieve
    return FetchServices(
        nursery=nursery,
        source=source,
        slots=PrioritySlots(4, reserved=2),
        stream_slots=PrioritySlots(2, reserved=0),
        disk=disk,
        request_bytes_max=1 << 20,
        jitter=lambda: 0.5,
        changed=changed,
        counters=counters or FetchCounters(),
        space=space,
        health=health,
        evictor=evictor,
        unstored=UnstoredChunks(),
        traces=TraceStore(directory / "traces", disk),
        pace=pace or Pace(),
        link=link or LinkMeter(clock=lambda: 0.0),
    )
