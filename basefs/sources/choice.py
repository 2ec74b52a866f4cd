"""An `ImageSource` over Glance and the stores behind it: each image is read where the operator's order says.

A source that fails, refuses or is slow is left for the next one in the same fetch: what it delivered counts, the rest
comes from the next. It rests then, and is read from again only after a try of ours went well, so no reader waits for a
source twice. Glance is the last resort and the only one that knows whether an image exists; its breaker and the
stores' rests know nothing of each other. Without a store nothing is asked but what Glance is asked anyway.
"""

import logging
import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from basefs import errors
from basefs.core.location_kinds import SourceName
from basefs.observability import ConditionLog
from basefs.sources.base import Deliver, Digest, ImageSource, ProbeResult
from basefs.sources.delivery import Delivery
from basefs.sources.glance import RANGED_REASON
from basefs.sources.image_ways import ImageWays, Refusal, StoreEndpoints, late_last, pairs
from basefs.sources.known_locations import KnownLocations
from basefs.sources.starts import START_BYTES, KeptStart, Starts
from basefs.sources.store import Store
from basefs.sources.store_reads import StoreReads
from basefs.sources.ways import Way

log = logging.getLogger(__name__)

IMAGES_MAX = 10_000
OPEN_OBJECTS_MAX = 128


class SourceChoice:
    """See the module. `order` is that of the sources; Glance comes last where it is left out."""

    def __init__(
        self,
        glance: ImageSource,
        stores: Sequence[Store],
        ask_locations: Callable[[str], Awaitable[Sequence[str]]],
        *,
        order: Sequence[SourceName],
        nursery: trio.Nursery,
        kept_start: KeptStart,
        is_blamed: Callable[[str], bool],
        reads_from: Callable[[str, str], None] = lambda _image_id, _reason: None,
        kept_locations: Callable[[str], tuple[str, ...]] = lambda _image_id: (),
        keep_locations: Callable[[str, tuple[str, ...]], None] = lambda _image_id, _locations: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`is_blamed(image_id)`: a store gave wrong bytes of it once, so it is read through Glance only.

        `reads_from(image_id, reason)` is told when an image's bytes come from another source than before.
        `keep_locations(image_id, locations)` is given where it may be read, without a secret, to be kept for the next
        server, whom `kept_locations(image_id)` gives it.
        """
        self.glance = glance
        self.stores: Mapping[SourceName, Store] = {store.name: store for store in stores}
        self._order = (*order, *(() if "glance" in order else ("glance",)))
        self._nursery = nursery
        self._is_blamed = is_blamed
        self._reads_from = reads_from
        self._kept_locations = kept_locations
        self._keep_locations = keep_locations
        self._locations = KnownLocations(ask_locations, nursery, kept=kept_locations)
        self._starts = Starts(kept_start)
        self._reads = StoreReads(nursery, refresh=self._locations.refresh, jitter=jitter)
        self._images: OrderedDict[str, ImageWays] = OrderedDict()
        self._recent: OrderedDict[Way, None] = OrderedDict()
        """Ways that may have an object open, the last used last."""
        self._endpoints = StoreEndpoints()
        self._told = ConditionLog(log, clock=trio.current_time)

    @property
    def requests(self) -> int:
        """See `ImageSource`; of all sources."""
        return self.glance.requests + sum(store.requests for store in self.stores.values())

    @property
    def received_bytes(self) -> int:
        """See `ImageSource`; of all sources."""
        return self.glance.received_bytes + sum(store.received_bytes for store in self.stores.values())

    # --- ImageSource ------------------------------------------------------------------------------------

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        """See `ImageSource.probe`."""
        length = min(size, header_bytes)
        for way in await self._ways(image_id, size):
            if way is None:
                probe = await self.glance.probe(image_id, size=size, header_bytes=header_bytes)
                self._starts.note(image_id, probe.header, size=size)
                return probe
            header = bytearray()
            delivery = Delivery(0, length, partial(_add_to, header))
            is_start = length >= min(size, START_BYTES)
            if await self._reads.take(way, delivery, length, header if is_start else None):
                self._note(way)
                return ProbeResult(kind="ranged", reason=_reason(way), header=bytes(header))
        raise AssertionError("Glance is always asked")

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_range`."""
        if not self.stores:
            await self.glance.fetch_range(
                image_id, size=size, offset=offset, length=length, piece_bytes=piece_bytes, deliver=deliver
            )
            return
        delivery, span = Delivery(offset, length, deliver), range(offset, offset + length)
        error: errors.SourceError | None = None
        for way in late_last(await self._ways(image_id, size), span):
            if way is not None:
                with way.fetching(span):
                    is_taken = await self._reads.take(way, delivery, piece_bytes)
                if is_taken:
                    self._note(way)
                    return
                continue
            try:
                await self._take_from_glance(image_id, size, delivery, piece_bytes)
            except errors.SourceError as exc:
                if delivery.is_over:
                    raise
                error = exc
            else:
                return
        assert error is not None, "Glance is always asked"
        raise error

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_stream`: Glance's own, for whoever answers ranges is never streamed."""
        await self.glance.fetch_stream(image_id, size=size, piece_bytes=piece_bytes, digest=digest, deliver=deliver)

    # --- what others see, and say -----------------------------------------------------------------------

    def good_at(self, image_id: str) -> float:
        """When the image can be read without Glance (trio's clock): -inf now, inf never, as far as is known."""
        image = self._images.get(image_id)
        if self._is_blamed(image_id):
            return math.inf
        if image is not None:
            return image.good_at()
        # Nobody read it yet in this life.
        found = pairs(image_id, self._kept_locations(image_id), self.stores, self._order)
        return math.inf if all(isinstance(one, Refusal) for one in found) else -math.inf

    def report(self, image_id: str) -> dict[str, Any]:
        """By which source the image was read last, and what there is of the others, as JSON values. No secret."""
        image = self._images.get(image_id)
        ways = [] if image is None else image.report()
        if self._is_blamed(image_id):
            ways.append(
                {
                    "source": "glance",
                    "endpoint": "",
                    "state": "only",
                    "reason": "a store gave bytes without the hash that Glance tells",
                    "received_bytes": 0,
                }
            )
        return {"read_from": None if image is None else image.last, "sources": ways}

    def stores_report(self) -> list[dict[str, Any]]:
        """The stores that are configured and where they were read, as JSON values. No secret."""
        return self._endpoints.report(self.stores)

    def counts(self) -> dict[SourceName, tuple[int, int]]:
        """Requests for image bytes and bytes that came, by source."""
        by_store = {name: (store.requests, store.received_bytes) for name, store in self.stores.items()}
        return {**by_store, "glance": (self.glance.requests, self.glance.received_bytes)}

    async def locations(self, image_id: str) -> tuple[str, ...]:
        """The image's locations, as `KnownLocations.of`. They may hold secrets."""
        return await self._locations.of(image_id)

    def has_before(self, image_id: str, name: SourceName) -> bool:
        """Whether the operator's order has a source that reads the image now before `name`."""
        if name not in self._order:
            return True
        before = self._order[: self._order.index(name)]
        image = self._images.get(image_id)
        is_read = image is not None and any(way.is_good and way.name in before for way in image.ways)
        return "glance" in before or (is_read and not self._is_blamed(image_id))

    def blame(self, image_id: str) -> bool:
        """The image's bytes had another hash than Glance tells: whether some may have come from a store.

        If so the caller has `is_blamed` say so from here.
        """
        image = self._images.get(image_id)
        if not self.stores or (image is not None and not image.ways):
            return False
        self._starts.forget(image_id)
        ways = [] if image is None else image.ways
        titles = sorted({way.endpoint.title for way in ways if way.delivered_bytes})
        log.warning(
            "image %s: its bytes had another hash than Glance tells, and some may have come from %s: it is read "
            "through Glance only from now on",
            image_id, ", ".join(titles) or "a store, through a server before this one",
        )  # fmt: skip
        for way in ways:
            way.drop()
        return True

    async def close(self) -> None:
        """Close what is open. No fetch is under way any more."""
        for image in self._images.values():
            for way in image.ways:
                await way.close()
        for store in self.stores.values():
            await store.close()

    # --- ways -------------------------------------------------------------------------------------------

    async def _ways(self, image_id: str, size: int) -> list[Way | None]:
        """What may be read from now, in order; None is Glance. Others that may be good again are tried meanwhile."""
        if not self.stores or self._is_blamed(image_id):
            return [None]
        locations = await self._locations.of(image_id)
        image = self._images.get(image_id)
        if image is None or image.locations != locations:
            image = self._new_ways(image_id, size, locations, image)
        self._images.move_to_end(image_id)
        now = trio.current_time()
        for way in image.ways:
            if way.is_due(now):
                self._reads.try_again(way)
        chosen: list[Way | None] = []
        for name in self._order:
            chosen += [None] if name == "glance" else [way for way in image.ways if way.name == name and way.is_good]
        return chosen

    def _new_ways(self, image_id: str, size: int, locations: tuple[str, ...], before: ImageWays | None) -> ImageWays:
        """The image's ways by these locations; what is known of those that stay is kept."""
        image = before or ImageWays(image_id=image_id)
        kept = {way.location: way for way in image.ways}
        image.locations, image.ways, image.refusals = locations, [], []
        for found in pairs(image_id, locations, self.stores, self._order):
            if isinstance(found, Refusal):
                image.refusals.append(found)
                key = (image_id, found.name, found.reason)
                self._told.begins(
                    key, logging.INFO, "image %s is not read from %s: %s", image_id, found.name, found.reason
                )
                continue
            store, location = found
            way = kept.pop(location, None) or Way(
                store,
                location,
                image_id=image_id,
                size=size,
                endpoint=self._endpoints.of(store.name, location),
                starts=self._starts,
                nursery=self._nursery,
            )
            image.ways.append(way)
        for way in kept.values():
            way.retire()
        self._keep_locations(image_id, image.to_keep())
        self._images[image_id] = image
        while len(self._images) > IMAGES_MAX:
            _, oldest = self._images.popitem(last=False)
            for way in oldest.ways:
                way.retire()
        return image

    async def _take_from_glance(self, image_id: str, size: int, delivery: Delivery, piece_bytes: int) -> None:
        begun_at = delivery.at
        try:
            await self.glance.fetch_range(
                image_id,
                size=size,
                offset=begun_at,
                length=delivery.left,
                piece_bytes=piece_bytes,
                deliver=delivery.turn(lambda: None),
            )
        finally:
            delivery.leave()
            if delivery.at > begun_at:
                self._note_from(image_id, "glance", RANGED_REASON)

    def _note(self, way: Way) -> None:
        """Bytes came by this way. What was not read from for longest is closed, beyond OPEN_OBJECTS_MAX."""
        self._note_from(way.image_id, way.name, _reason(way))
        self._recent[way] = None
        self._recent.move_to_end(way)
        if len(self._recent) > OPEN_OBJECTS_MAX:
            self._recent.popitem(last=False)[0].drop()

    def _note_from(self, image_id: str, name: SourceName, reason: str) -> None:
        image = self._images.get(image_id)
        if image is not None and image.last != name:
            image.last = name
            self._reads_from(image_id, reason)


def _reason(way: Way) -> str:
    return f"{way.endpoint.title} answered a Range with exactly its bytes"


def _add_to(header: bytearray, _offset: int, piece: memoryview) -> bool:
    header.extend(piece)
    return True
