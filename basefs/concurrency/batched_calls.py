"""A door to threads for many small calls with an effect: those that come while others are in a thread make one trip.

A trip to a thread of trio's and back is some 100 us of processor time (`short_calls`), all else of a small read from
Ceph 22. With 16 reads at a time one took 124 to 140 us by `BlockingCalls`, 67 to 82 by this with two trips (four: no
gain, for each call finds a trip of its own; a loaded machine of 2 cores). A trip begins one step of the loop after its
first call, so calls whose tasks were woken together go together. `ShortCalls` is for pure calls only.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import outcome
import trio

from basefs.concurrency.threads import BlockingCalls

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Call:
    """One call. `woken`: it was made, or (`carries`) its task has a trip to make."""

    __slots__ = ("carries", "fn", "result", "woken")

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.fn = fn
        self.result: outcome.Outcome[Any] | None = None
        self.woken = trio.Event()
        self.carries = False

    def make(self) -> None:
        """In a thread."""
        self.result = outcome.capture(self.fn)


class BatchedCalls:
    """At most `trips_max` trips at a time; what comes meanwhile waits, and goes with the next one. Owned by the loop.

    A call that blocks holds up those of its trip, so these are calls that rarely do.
    """

    def __init__(self, name: str, *, trips_max: int) -> None:
        self._threads = BlockingCalls(name, threads_max=trips_max)
        self._trips_max = trips_max
        self._trips = 0
        self._waiting: deque[_Call] = deque()

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)`, called in a thread of trio's.

        Cancellation: while it waits for a trip; once that has begun, the trip is waited for.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = _Call(partial(fn, *args))
        if self._trips < self._trips_max:
            self._trips += 1
            call.carries = True
            await self._let_others_come()
        else:
            self._waiting.append(call)
            await self._wait(call)
        if call.carries:
            await self._carry(call)
        assert call.result is not None
        result: T = call.result.unwrap()
        return result

    async def _let_others_come(self) -> None:
        """Calls whose tasks were woken together make one trip together."""
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self._end_trip()
            raise

    async def _wait(self, call: _Call) -> None:
        try:
            await call.woken.wait()
        except trio.Cancelled:
            if call in self._waiting:
                self._waiting.remove(call)
            elif call.carries:
                self._end_trip()
            else:
                with trio.CancelScope(shield=True):
                    await call.woken.wait()
            raise

    async def _carry(self, call: _Call) -> None:
        calls = [call, *self._waiting]
        self._waiting.clear()
        try:
            with trio.CancelScope(shield=True):
                await self._threads.run(_make_all, calls)
        finally:
            for one in calls:
                one.woken.set()
            self._end_trip()

    def _end_trip(self) -> None:
        """The first one that waits makes the next trip."""
        self._trips -= 1
        if self._waiting:
            following = self._waiting.popleft()
            following.carries = True
            self._trips += 1
            following.woken.set()


def _make_all(calls: list[_Call]) -> None:
    for call in calls:
        call.make()
