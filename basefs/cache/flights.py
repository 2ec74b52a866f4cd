"""What is under way for one image: flights (tasks in the service nursery) and the receivers of transfers.

Flights live in the service nursery: a reader may leave, the flight goes on. Owned by the trio loop.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from basefs.cache.receiver import Receiver
from basefs.concurrency.guarded import guarded

log = logging.getLogger(__name__)


class Flights:
    """All that was started for one image and has not ended."""

    def __init__(self, image_id: str, nursery: trio.Nursery) -> None:
        self._image_id = image_id
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self._receivers: set[Receiver] = set()
        self._evictions = 0
        self._no_evictions = trio.Event()
        self._no_evictions.set()
        self._idle = trio.Event()
        self._idle.set()

    @property
    def under_way(self) -> int:
        """Flights, transfers and evictions that were started and have not ended; those that wait for a slot, too."""
        return len(self._scopes) + len(self._receivers) + self._evictions

    def start(self, flight: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run `flight(*arguments)` in the service nursery; `stop` and the end of the service cancel it."""
        scope = trio.CancelScope()
        self._scopes.add(scope)
        self._begin()
        self._nursery.start_soon(self._fly, scope, flight, *arguments)

    def add(self, receiver: Receiver) -> None:
        """A transfer begins; `remove` must follow."""
        self._receivers.add(receiver)
        self._begin()

    def remove(self, receiver: Receiver) -> None:
        """The transfer is over."""
        self._receivers.discard(receiver)
        self._end()

    @contextmanager
    def eviction(self) -> Iterator[None]:
        """Chunks are being dropped while the body runs."""
        if not self._evictions:
            self._no_evictions = trio.Event()
        self._evictions += 1
        self._begin()
        try:
            yield
        finally:
            self._evictions -= 1
            if not self._evictions:
                self._no_evictions.set()
            self._end()

    async def wait_no_evictions(self) -> None:
        """Return when no chunk is being dropped: what writes without a claim would be overtaken by it."""
        await self._no_evictions.wait()

    def stop(self) -> None:
        """Have what is under way end now; what a flight that is not ours brings ends at its next piece."""
        for scope in self._scopes:
            scope.cancel()
        for receiver in self._receivers:
            receiver.stop = True

    async def wait_idle(self) -> None:
        """Return when nothing is under way."""
        await self._idle.wait()

    async def _fly(self, scope: trio.CancelScope, flight: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Ends with its flight; cancelled by `stop` and with the service. A bug in a flight must not end the mount."""
        try:
            with guarded(log, "image %s: bug in a transfer", self._image_id), scope:
                await flight(*arguments)
        finally:
            self._scopes.discard(scope)
            self._end()

    def _begin(self) -> None:
        if self._idle.is_set():
            self._idle = trio.Event()

    def _end(self) -> None:
        if not self.under_way:
            self._idle.set()
