"""Boot traces go from node to node as a property of their image: `[trace] share = glance`.

To take one costs nothing: the property comes with the image's metadata. To give one is a request: of a guest's boot
only, if Glance has none that is much the same, and of an image once an hour at most. Of many nodes that boot the same
image at the same time nearly all see, before their turn comes, that one of them has done it; of two that do it none
the less the last one's stays.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.core.boot_trace import BootTrace, TracedImage
from basefs.core.trace_property import property_of, trace_of_property
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

AGAIN_S = 3600.0
SPREAD_S = 300.0
"""Within so long after a boot its trace is given: five refreshes of the catalog, by which others' become known."""
SAME_SHARE = 0.9
"""Of the units of both: so many in both, and the trace in Glance does as well."""

Publish = Callable[[str, str], Awaitable[None]]
"""`publish(image_id, text)`: has Glance keep the property; raises a SourceError or ImageNotFoundError."""


class TraceSharing:
    """Takes and gives the traces of all images. Owned by the trio loop; given ones are tasks of the service nursery."""

    def __init__(
        self, publish: Publish, nursery: trio.Nursery, jitter: Callable[[], float], *, spread_s: float = SPREAD_S
    ) -> None:
        self._publish = publish
        self._nursery = nursery
        self._jitter = jitter
        self._spread_s = spread_s
        self._not_before: dict[int, float] = {}
        self._told = ConditionLog(log, clock=trio.current_time)

    def shared(self, entry: ImageEntry, image: TracedImage) -> BootTrace | None:
        """The trace that came with the image's metadata, if one did that is of its bytes."""
        if entry.record.boot_trace is None:
            return None
        try:
            return trace_of_property(entry.record.boot_trace, image)
        except ValueError as exc:
            log.debug("image %s: its property is not used: %s", entry.image_id, exc)
            return None

    def offer(self, entry: ImageEntry, trace: BootTrace) -> None:
        """A boot was recorded, and this is what is known now. Returns at once."""
        now = trio.current_time()
        if self._is_due(entry, trace) and now >= self._not_before.get(entry.number, now):
            self._not_before[entry.number] = now + AGAIN_S
            self._nursery.start_soon(self._give, entry, trace)

    def _is_due(self, entry: ImageEntry, trace: BootTrace) -> bool:
        if not trace.by_guest or entry.is_gone:
            return False
        known = self.shared(entry, trace.image)
        if known is None or not known.by_guest:
            return True
        ours, theirs = set(trace.units()), set(known.units())
        return len(ours & theirs) < SAME_SHARE * len(ours | theirs)

    async def _give(self, entry: ImageEntry, trace: BootTrace) -> None:
        """Ends when it is given, or is not to be; cancelled with the service."""
        await trio.sleep(self._spread_s * self._jitter())
        if not self._is_due(entry, trace):
            return
        try:
            await self._publish(entry.image_id, property_of(trace))
        except (errors.SourceUnavailableError, errors.ImageNotFoundError) as exc:
            log.debug("image %s: its boot trace was not given to Glance: %s", entry.image_id, exc)
        except errors.SourceError as exc:
            self._told.begins(
                type(exc), logging.WARNING, "image %s: its boot trace is not given to other nodes: %s",
                entry.image_id, exc,
            )  # fmt: skip
        else:
            log.info("image %s: its boot trace of %d boots is in Glance now", entry.image_id, trace.boots)
