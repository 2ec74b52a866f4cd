"""Stores behind Glance, in memory or real, of which the contract suite asks the same.

A world has a store's server and what can be done to it from outside. `faults` names what it can do of that; a world
that cannot do one says so by leaving it out, and the test of it is not made for that world.
"""

import uuid
from collections.abc import Collection
from typing import Literal, Protocol

import trio

from basefs import errors
from basefs.sources.store import Store
from tests.fakes.memory_store import MemoryStore

Fault = Literal["away", "cut", "forbid", "hang", "remove", "replace"]


class StoreWorld(Protocol):
    """One store. A fixture makes it, and calls `close` at the end."""

    store: Store
    faults: Collection[Fault]

    def put(self, image_id: str, data: bytes) -> str:
        """Have the image there as Glance's own store would; its location."""
        ...

    def refused_locations(self, image_id: str) -> list[str]:
        """Locations that must not be used for that image: other schemes, other places, other images', with keys.

        Those with a key or password have `SECRET` for it.
        """
        ...

    def remove(self, location: str) -> None:
        """Somebody deletes the object."""
        ...

    def replace(self, location: str, data: bytes) -> None:
        """Somebody puts another object of the same size there."""
        ...

    def forbid(self) -> None:
        """The credentials are good no more."""
        ...

    def away(self) -> None:
        """Nobody answers any more (connections are refused, or the like)."""
        ...

    def cut(self) -> None:
        """Each answer breaks off in the middle of its bytes, after one piece of PIECE_BYTES at least."""
        ...

    def hang(self) -> None:
        """Requests are taken and never answered."""
        ...

    def heal(self) -> None:
        """All of `forbid`, `away`, `cut` and `hang` is over."""
        ...

    async def close(self) -> None:
        """Close the store, and end what was started. Objects that are open were closed before."""
        ...


SECRET = "s3cr3t-k3y"
PIECE_BYTES = 64 * 1024


class MemoryStoreWorld:
    """See `StoreWorld`."""

    faults: Collection[Fault] = ("away", "cut", "forbid", "hang", "remove", "replace")

    def __init__(self) -> None:
        self.store = MemoryStore()

    def put(self, image_id: str, data: bytes) -> str:
        return self.store.put(image_id, data)

    def refused_locations(self, image_id: str) -> list[str]:
        return [
            f"rbd://cluster/{uuid.uuid4()}",
            f"rbd://elsewhere/{image_id}",
            f"rbd://user:{SECRET}@cluster/{image_id}",
            f"ftp://cluster/{image_id}",
            "file:///etc/shadow",
            "",
        ]

    def remove(self, location: str) -> None:
        del self.store.objects[location]

    def replace(self, location: str, data: bytes) -> None:
        self.store.objects[location] = data

    def forbid(self) -> None:
        self.store.fault = lambda: errors.SourceForbiddenError("no good key")

    def away(self) -> None:
        self.store.fault = lambda: errors.SourceUnavailableError("nobody answers", may_be_away=True)

    def cut(self) -> None:
        self.away()
        self.store.pieces_before_fault = 1

    def hang(self) -> None:
        self.store.hold = trio.Event()

    def heal(self) -> None:
        self.store.fault = self.store.pieces_before_fault = self.store.hold = None

    async def close(self) -> None:
        await self.store.close()
        assert self.store.is_closed
