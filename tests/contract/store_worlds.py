"""Stores behind Glance, in memory or real, of which the contract suite asks the same.

A world has a store's server and what can be done to it from outside. `faults` names what it can do of that; a world
that cannot do one says so by leaving it out, and the test of it is not made for that world.
"""

import threading
import uuid
from collections.abc import Collection
from typing import Literal, Protocol

import trio

from basefs import errors
from basefs.core.addresses import AllowedHosts
from basefs.sources.http_store import HttpStore
from basefs.sources.store import Store
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.memory_store import MemoryStore
from tests.fakes.memory_web import MemoryWeb

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
        """Somebody puts another object there."""
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


class HttpWorld:
    """A web server in this process, at 127.0.0.1; see `StoreWorld`."""

    faults: Collection[Fault] = ("away", "cut", "forbid", "hang", "remove", "replace")

    def __init__(self) -> None:
        self.web = MemoryWeb()
        self.front = MisbehavingFront()
        self.front.extra_routes["/"] = self.web
        self.front.__enter__()
        self._hang = threading.Event()
        host = self.front.url.removeprefix("http://")
        self.store = HttpStore(AllowedHosts([host]), cafile=None, insecure=False, threads_max=8)

    def put(self, image_id: str, data: bytes) -> str:
        return self.front.url + self.web.put(f"/images/{image_id}", data)

    def refused_locations(self, image_id: str) -> list[str]:
        host = self.front.url.removeprefix("http://")
        return [
            f"http://user:{SECRET}@{host}/{image_id}",
            f"http://elsewhere.example/{image_id}",
            f"https://{host.partition(':')[0]}/{image_id}",
            f"http://localhost:{host.partition(':')[2]}/{image_id}",
            f"http://2130706433:{host.partition(':')[2]}/{image_id}?key={SECRET}",
            f"http://169.254.169.254/latest/meta-data?key={SECRET}",
            f"http://{host}/{image_id}#{SECRET}",
            f"http://{host}\\@elsewhere/{image_id}",
            f"http://{host}/a b",
            f"ftp://{host}/{image_id}",
            "file:///etc/shadow",
            "http://",
            "http://[::1/x",
            "",
        ]

    def remove(self, location: str) -> None:
        self.web.remove(location.removeprefix(self.front.url))

    def replace(self, location: str, data: bytes) -> None:
        self.web.put(location.removeprefix(self.front.url), data)

    def forbid(self) -> None:
        self.front.on().respond(answers.status(403))

    def away(self) -> None:
        self.front.on().respond(answers.reset())

    def cut(self) -> None:
        self.front.on().respond(answers.cut(after=PIECE_BYTES + 1000))

    def hang(self) -> None:
        self._hang.clear()
        self.front.on().respond(answers.hang(self._hang))

    def heal(self) -> None:
        self._hang.set()
        self.front.behave()

    async def close(self) -> None:
        await self.store.close()
        self.front.__exit__(None, None, None)
