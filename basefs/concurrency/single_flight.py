"""Work that many want at once is done once: a flight per key, outside any request.

Invariants: at most one flight a key; a flight runs in the service nursery, so a caller may leave and the
flight goes on; every waiter gets an error of its own (a shared exception would share its traceback); a
failure is not remembered: the next caller starts anew.
"""

import copy
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from basefs import errors
from basefs.concurrency.guarded import guarded

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class _Flight(Generic[T]):
    __slots__ = ("done", "error", "result")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None
        self.result: T | None = None


class SingleFlight(Generic[K, T]):
    """Runs at most one call per key at a time; every caller gets its outcome."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[K, _Flight[T]] = {}

    def __len__(self) -> int:
        """Flights under way."""
        return len(self._flights)

    async def run(self, key: K, call: Callable[[], Awaitable[T]]) -> T:
        """What `call()` gives; a call under way for `key` is joined, not repeated.

        Raises what the call raised (a copy), InternalError for anything that is no BasefsError.
        Cancellation: ends this wait only.
        """
        flight = self._flights.get(key)
        if flight is None:
            # No checkpoint between get() and here, so no second flight can start.
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._fly, key, flight, call)
        await flight.done.wait()
        if flight.error is not None:
            raise copy.copy(flight.error)
        return flight.result  # type: ignore[return-value]  # set whenever there is no error

    async def _fly(self, key: K, flight: _Flight[T], call: Callable[[], Awaitable[T]]) -> None:
        """Ends when the call does; cancelled with the service nursery, which frees the waiters."""
        try:
            with guarded(log, "bug in the work for %r", key, foreseen=(errors.BasefsError,)) as guard:
                flight.result = await call()
            if guard.bug is not None:
                flight.error = errors.InternalError(f"internal error: {type(guard.bug).__name__}")
        except errors.BasefsError as exc:
            flight.error = exc
        except trio.Cancelled:
            flight.error = errors.SourceUnavailableError("basefs is shutting down")
            raise
        finally:
            del self._flights[key]
            flight.done.set()
