"""One image at one location of one store: the object that is open there, and whether it may be read from now.

Invariants: nothing is taken from an object before its first bytes were compared with what is known of the image; it is
closed when nobody is inside. Owned by the trio loop.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from basefs import errors
from basefs.concurrency.single_flight import SingleFlight
from basefs.core.location_kinds import SourceName
from basefs.core.safe_text import safe_text
from basefs.core.source_rest import SourceRest
from basefs.sources.starts import START_BYTES, Starts
from basefs.sources.store import Store, StoreObject

OPEN_LIMIT_S = 15.0
"""Opening and comparing may take so long, whoever waits for it meanwhile."""
ENDPOINT_REST_S = 1.0, 30.0
IMAGE_REST_S = 1.0, 60.0
WRONG_REST_S = 600.0
"""An object that is gone, refused, of another size or with other bytes is not looked at again before that."""
ASKED_REST_MAX_S = 60.0
"""A store that says when to come back is believed up to here."""


class StoreEndpoint:
    """A store's cluster or server: what it does to one image it may do to all."""

    def __init__(self, name: SourceName, host: str) -> None:
        base_s, cap_s = ENDPOINT_REST_S
        self.name = name
        self.host = host
        self.rest = SourceRest(base_s=base_s, cap_s=cap_s)
        self.error: str | None = None
        """Why it rests."""
        self.is_watched = False
        """A task finds out when it is good again."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} at {self.host}" if self.host else self.name

    def answered(self) -> None:
        """It said something."""
        self.rest.answered()
        self.error = None


class OpenedObject:
    """An object of a way. `is_compared`: it begins as the image does."""

    def __init__(self, found: StoreObject) -> None:
        self.found = found
        self.is_compared = False
        self.inside = 0
        self.is_closed = False


class Way:
    """See the module. Two of the same image and location are never alive together."""

    def __init__(
        self,
        store: Store,
        location: str,
        *,
        image_id: str,
        size: int,
        endpoint: StoreEndpoint,
        starts: Starts,
        nursery: trio.Nursery,
    ) -> None:
        base_s, cap_s = IMAGE_REST_S
        self.location = location
        self.image_id = image_id
        self.size = size
        self.endpoint = endpoint
        self.rest = SourceRest(base_s=base_s, cap_s=cap_s)
        self.error: str | None = None
        """Why it rests."""
        self.is_tried = False
        """A task finds out if it is good again."""
        self.delivered_bytes = 0
        self._spans: list[range] = []
        """What is being fetched."""
        self._store = store
        self._starts = starts
        self._nursery = nursery
        self._flights: SingleFlight[str, OpenedObject] = SingleFlight(nursery)
        self._opened: OpenedObject | None = None
        self._is_retired = False

    @property
    def name(self) -> SourceName:
        """Which store it is in."""
        return self.endpoint.name

    @property
    def is_good(self) -> bool:
        """Whether it may be read from."""
        return self.rest.is_good and self.endpoint.rest.is_good

    def is_due(self, now: float) -> bool:
        """Whether it is to be found out if the image is good again here; of its endpoint that is found out anyway."""
        return self.endpoint.rest.is_good and self.rest.may_try(now)

    @property
    def good_at(self) -> float:
        """When that is due; -inf while it is good."""
        return max((one.until for one in (self.rest, self.endpoint.rest) if not one.is_good), default=float("-inf"))

    @contextmanager
    def fetching(self, span: range) -> Iterator[None]:
        """While the body runs these bytes are being fetched this way."""
        self._spans.append(span)
        try:
            yield
        finally:
            self._spans.remove(span)

    def is_fetching(self, span: range) -> bool:
        """Whether some of these bytes are being fetched this way."""
        return any(one.start < span.stop and span.start < one.stop for one in self._spans)

    def failed(self, error: errors.SourceError, *, jitter: float) -> None:
        """A request failed: the way rests, and the endpoint, if it looks as if that were away; else it answers."""
        now = trio.current_time()
        self.error = safe_text(str(error))
        if not isinstance(error, errors.SourceUnavailableError):
            may_be_reopened = isinstance(error, errors.StoreGoneError) and error.may_be_reopened
            self.rest.failed(now, jitter=jitter, rest_s_min=0.0 if may_be_reopened else WRONG_REST_S)
            self.endpoint.answered()
            self.drop()
            return
        asked_s = min(error.retry_after_s or 0.0, ASKED_REST_MAX_S)
        self.rest.failed(now, jitter=jitter, rest_s_min=asked_s)
        if error.may_be_away:
            self.endpoint.error = self.error
            self.endpoint.rest.failed(now, jitter=jitter, rest_s_min=asked_s)
        else:
            self.endpoint.answered()

    def answered(self) -> None:
        """A request went well."""
        self.rest.answered()
        self.error = None
        self.endpoint.answered()

    # --- the object -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reading(self, *, compares: bool = True) -> AsyncIterator[OpenedObject]:
        """The object, kept open while the body runs; `compares` False: the body calls `compare` with what came.

        Raises:
            SourceError: it cannot be had, or it begins with other bytes (SourceCorruptError).
        """
        while (opened := self._opened or await self._flights.run("open", self._open)).is_closed:
            pass  # it was dropped between the flight's end and our turn
        with self._inside(opened):
            if compares and not opened.is_compared:
                await self._flights.run("compare", lambda: self._compare_start(opened))
            yield opened

    async def compare(self, opened: OpenedObject, start: bytes) -> None:
        """Note that the object begins with `start`, its first `min(size, START_BYTES)` bytes.

        Raises:
            SourceCorruptError: the image does not.
        """
        if not await self._starts.agrees(self.image_id, start):
            raise errors.SourceCorruptError("it begins with other bytes than the image")
        opened.is_compared = True

    @contextmanager
    def _inside(self, opened: OpenedObject) -> Iterator[None]:
        opened.inside += 1
        try:
            yield
        finally:
            opened.inside -= 1
            if opened is not self._opened:
                self._close_unused(opened)

    def _close_unused(self, opened: OpenedObject) -> None:
        if not opened.inside and not opened.is_closed:
            opened.is_closed = True
            self._nursery.start_soon(opened.found.close)

    async def _open(self) -> OpenedObject:
        """Runs as a flight. It ends within OPEN_LIMIT_S."""
        with trio.move_on_after(OPEN_LIMIT_S):
            found = await self._store.open(self.location, image_id=self.image_id, size=self.size)
            opened = OpenedObject(found)
            if not self._is_retired:
                self._opened = opened
            return opened
        raise errors.SourceUnavailableError(f"not opened within {OPEN_LIMIT_S:g} s", may_be_away=True)

    async def _compare_start(self, opened: OpenedObject) -> OpenedObject:
        """Runs as a flight. It ends within OPEN_LIMIT_S."""
        if opened.is_compared:
            return opened
        start = bytearray()

        def take(_offset: int, piece: memoryview) -> bool:
            start.extend(piece)
            return True

        with self._inside(opened), trio.move_on_after(OPEN_LIMIT_S):
            length = min(self.size, START_BYTES)
            await opened.found.fetch_range(offset=0, length=length, piece_bytes=length, deliver=take)
            await self.compare(opened, bytes(start))
            return opened
        raise errors.SourceUnavailableError(f"no first bytes within {OPEN_LIMIT_S:g} s", may_be_away=True)

    def drop(self) -> None:
        """Close what is open as soon as nobody is inside; who wants it next opens it anew."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self._close_unused(opened)

    def retire(self) -> None:
        """Nobody begins here any more: what is open is closed when the last one is out."""
        self._is_retired = True
        self.drop()

    async def close(self) -> None:
        """Close what is open; nobody is inside any more."""
        opened, self._opened = self._opened, None
        if opened is not None and not opened.is_closed:
            opened.is_closed = True
            await opened.found.close()
