"""A store behind Glance in memory, which misbehaves on command; passes the contract suite of `Store`.

Locations are `<scheme>://<host>/<image id>`; the rules for them are those of a real one, as far as there are any.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import trio

from basefs import errors
from basefs.sources.base import Deliver
from basefs.sources.store import StoreName


@dataclass
class MemoryStore:
    """See `Store`. Everything that decides how it answers may be changed while it is read from."""

    name: StoreName = "rbd"
    host: str = "cluster"
    objects: dict[str, bytes] = field(default_factory=dict)
    """By location."""
    requests: int = 0
    received_bytes: int = 0
    missing: str | None = None
    opens: int = 0
    opened: int = 0
    """Objects that are open now."""
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    """Location, offset and length of each request."""
    fault: Callable[[], errors.BasefsError] | None = None
    """While set, each request, and each open, fails with one of these."""
    pieces_before_fault: int | None = None
    """So many pieces come of a request before `fault`; None: none, and an open fails, too."""
    hold: trio.Event | None = None
    """While set, requests and opens wait for it before the first byte."""
    hold_after_pieces: int | None = None
    """The same in the middle of a body: requests deliver so many pieces, then wait for `hold`."""
    before_piece: Callable[[int], None] | None = None
    """Called in the thread with the offset of each piece."""
    is_closed: bool = False

    @property
    def url(self) -> str:
        return f"{self.name}://{self.host}"

    def put(self, image_id: str, data: bytes) -> str:
        """Have the image here; its location."""
        location = f"{self.url}/{image_id}"
        self.objects[location] = data
        return location

    def refusal(self, image_id: str, location: str) -> str | None:
        """See `Store.refusal`."""
        parts = urlsplit(location)
        if parts.scheme != self.name:
            return f"its scheme is not {self.name}"
        if parts.username is not None:
            return "it holds a password"
        if parts.netloc != self.host:
            return f"it is not in {self.host}"
        if parts.path != f"/{image_id}":
            return "by its name it is another image's"
        return None

    async def open(self, location: str, *, image_id: str, size: int) -> "MemoryObject":
        """See `Store.open`."""
        assert self.refusal(image_id, location) is None
        self.opens += 1
        if self.hold is not None and self.hold_after_pieces is None:
            await self.hold.wait()
        await trio.lowlevel.checkpoint()
        if self.fault is not None and self.pieces_before_fault is None:
            raise self.fault()
        data = self.objects.get(location)
        if data is None:
            raise errors.StoreGoneError(f"{self.name} has no such object")
        if len(data) != size:
            raise errors.SourceCorruptError(f"{self.name} has {len(data)} bytes, the image's metadata say {size}")
        self.opened += 1
        return MemoryObject(self, location, data)

    async def close(self) -> None:
        """See `Store.close`."""
        assert not self.opened, "an object is still open"
        self.is_closed = True


class MemoryObject:
    """See `StoreObject`."""

    def __init__(self, store: MemoryStore, location: str, data: bytes) -> None:
        self.size = len(data)
        self._store = store
        self._location = location
        self._data = data
        self._inside = 0
        self._is_closed = False

    async def fetch_range(self, *, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        """See `StoreObject.fetch_range`."""
        assert not self._is_closed, "a request to an object that was closed"
        assert 0 <= offset < offset + length <= self.size
        store = self._store
        store.requests += 1
        store.calls.append((self._location, offset, length))
        self._inside += 1
        try:
            await trio.lowlevel.checkpoint()
            if store.objects.get(self._location) is not self._data:
                raise errors.StoreGoneError(f"{store.name} has another object there, or none")
            fault, pieces = store.fault, store.pieces_before_fault or 0
            hold, hold_after = store.hold, store.hold_after_pieces or 0
            end = offset + length
            if hold is not None:
                middle = min(end, offset + hold_after * piece_bytes)
                if not await trio.to_thread.run_sync(self._deliver, offset, middle, piece_bytes, deliver):
                    return
                offset = middle
                await hold.wait()
            stop = end if fault is None else min(end, offset + pieces * piece_bytes)
            if await trio.to_thread.run_sync(self._deliver, offset, stop, piece_bytes, deliver) and fault is not None:
                raise fault()
        finally:
            self._inside -= 1

    def _deliver(self, offset: int, stop: int, piece_bytes: int, deliver: Deliver) -> bool:
        memory = bytearray(piece_bytes)
        for start in range(offset, stop, piece_bytes):
            trio.from_thread.check_cancelled()
            if self._store.before_piece is not None:
                self._store.before_piece(start)
            piece = self._data[start : min(start + piece_bytes, stop)]
            self._store.received_bytes += len(piece)
            with memoryview(memory) as lent, lent[: len(piece)] as view:
                view[:] = piece
                goes_on = deliver(start, view)
                view[:] = b"\xa5" * len(piece)  # whoever kept the piece sees it
            if not goes_on:
                return False
        return True

    async def close(self) -> None:
        """See `StoreObject.close`."""
        await trio.lowlevel.checkpoint()
        if not self._is_closed:
            assert not self._inside, "closed under a request"
            self._is_closed = True
            self._store.opened -= 1
