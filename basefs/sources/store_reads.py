"""Reads through one way to an image, and what follows from how they end: rests, records, tries.

Invariants: a reader waits for a way that fails once, FIRST_PIECE_S at most; what rests is tried by a task of its own:
an endpoint until it answers, an image at one that does when the image is wanted. Owned by the trio loop.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from basefs import errors
from basefs.concurrency.guarded import guarded
from basefs.observability import ConditionLog
from basefs.sources.delivery import Delivery
from basefs.sources.starts import START_BYTES
from basefs.sources.ways import OpenedObject, Way

log = logging.getLogger(__name__)

FIRST_PIECE_S = 5.0
"""A store that gives nothing for so long is left for the next source. Longer than a Ceph client takes to find another
OSD it knows of; a third of what a reader with the default `other_io_deadline_s` waits, and lost once: then it rests."""
SILENCE_S = 8.0
"""The same in the middle of a body; as `sources/access.BODY_SILENCE_S` for Glance."""


class StoreReads:
    """`refresh(image_id)`: have its locations asked for again. Tries run in `nursery`."""

    def __init__(self, nursery: trio.Nursery, *, refresh: Callable[[str], None], jitter: Callable[[], float]) -> None:
        self._nursery = nursery
        self._refresh = refresh
        self._jitter = jitter
        self._told = ConditionLog(log, clock=trio.current_time)

    async def take(self, way: Way, delivery: Delivery, piece_bytes: int, header: bytearray | None = None) -> bool:
        """Have what is left of the delivery from this way; False: the rest is to come from elsewhere.

        `header`: what is delivered goes there, and is the image's beginning, so that need not be read to be compared.

        Cancellation: as `StoreObject.fetch_range`; it says nothing of the way.
        """
        begun_at = delivery.at
        try:
            with trio.move_on_after(FIRST_PIECE_S) as limit:

                def alive() -> None:
                    limit.deadline = trio.current_time() + SILENCE_S

                async with self._reading(way, compares=header is None) as opened:
                    await opened.found.fetch_range(
                        offset=delivery.at, length=delivery.left, piece_bytes=piece_bytes, deliver=delivery.turn(alive)
                    )
                    if header is not None and not opened.is_compared:
                        await way.compare(opened, bytes(header[:START_BYTES]))
            if not delivery.is_over:
                text = f"nothing came for {FIRST_PIECE_S if delivery.at == begun_at else SILENCE_S:g} s"
                raise errors.SourceUnavailableError(text, may_be_away=True)
        except errors.SourceError as exc:
            self._failed(way, exc)
            # One that fails after its last byte has given all; but a header is good only once it was compared.
            return delivery.is_over and header is None
        finally:
            delivery.leave()
            way.delivered_bytes += delivery.at - begun_at
        self._answered(way)
        return True

    @asynccontextmanager
    async def _reading(self, way: Way, *, compares: bool) -> AsyncIterator[OpenedObject]:
        """As `Way.reading`; a bug in the store's code, which was logged, is a failure of the store."""
        title = way.endpoint.title
        try:
            with guarded(log, "bug in %s, for image %s", title, way.image_id, foreseen=(errors.BasefsError,)) as guard:
                async with way.reading(compares=compares) as opened:
                    yield opened
        except errors.InternalError as exc:
            raise errors.SourceUnavailableError(str(exc), may_be_away=True) from exc
        if guard.bug is not None:
            raise errors.SourceUnavailableError(f"a bug: {type(guard.bug).__name__}", may_be_away=True)

    def try_again(self, way: Way) -> None:
        """Find out, in a task of its own, if the way, whose endpoint answers, is good again."""
        if not way.is_tried:
            way.is_tried = True
            self._nursery.start_soon(self._try_once, way)

    async def _try_once(self, way: Way) -> None:
        """Ends as `_try`."""
        try:
            await self._try(way)
        finally:
            way.is_tried = False

    async def _watch(self, way: Way) -> None:
        """Try the way until its endpoint answers something. Ends with that, or when the nursery is cancelled."""
        endpoint = way.endpoint
        try:
            while not endpoint.rest.is_good:
                await trio.sleep_until(endpoint.rest.until)
                if not endpoint.rest.is_good:  # a request that was under way may have been answered
                    await self._try(way)
        finally:
            endpoint.is_watched = False

    async def _try(self, way: Way) -> None:
        """Ends within FIRST_PIECE_S."""
        try:
            with trio.move_on_after(FIRST_PIECE_S):
                async with self._reading(way, compares=True) as opened:
                    await opened.found.fetch_range(offset=0, length=1, piece_bytes=1, deliver=_take_no_more)
                self._answered(way)
                return
            self._failed(way, errors.SourceUnavailableError(f"no answer for {FIRST_PIECE_S:g} s", may_be_away=True))
        except errors.SourceError as exc:
            self._failed(way, exc)

    def _failed(self, way: Way, error: errors.SourceError) -> None:
        endpoint = way.endpoint
        was_good = endpoint.rest.is_good
        way.failed(error, jitter=self._jitter())
        if isinstance(error, errors.StoreGoneError):
            self._refresh(way.image_id)
        if not endpoint.rest.is_good and not endpoint.is_watched:
            endpoint.is_watched = True
            self._nursery.start_soon(self._watch, way)
        if was_good and not endpoint.rest.is_good:
            log.warning(
                "%s fails: %s; images are read from their next source until it answers again",
                endpoint.title, way.error,
            )  # fmt: skip
            return
        self._tell_back(way, was_good=was_good)
        if isinstance(error, errors.SourceUnavailableError):
            log.debug("image %s: %s: %s", way.image_id, endpoint.title, way.error)
        else:
            self._told.begins(
                (way.image_id, endpoint.title, type(error)), logging.WARNING, "image %s is not read from %s: %s",
                way.image_id, endpoint.title, way.error,
            )  # fmt: skip

    def _answered(self, way: Way) -> None:
        was_good = way.endpoint.rest.is_good
        way.answered()
        self._tell_back(way, was_good=was_good)

    def _tell_back(self, way: Way, *, was_good: bool) -> None:
        if not was_good and way.endpoint.rest.is_good:
            log.info("%s answers again; images are read from there", way.endpoint.title)


def _take_no_more(_offset: int, _piece: memoryview) -> bool:
    return False
