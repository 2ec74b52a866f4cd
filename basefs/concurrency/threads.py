"""The one door to threads: every call that may block (disk, HTTP, sqlite) goes through a `BlockingCalls`.

Pure calls that are too short for it have another (`short_calls`).

One limiter a library, so that a stuck Glance leaves the disk threads free. A thread cannot be stopped:
a cancelled caller waits for its thread, so what may take long belongs in a flight, never in a request,
and brings a time-out of its own.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class BlockingCalls:
    """At most `threads_max` calls of one kind at a time; further ones wait for their turn."""

    def __init__(self, name: str, *, threads_max: int) -> None:
        self.name = name
        self._limiter = trio.CapacityLimiter(threads_max)

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)`, called in a thread.

        Nothing that runs in the thread may change state owned by the loop. Cancellation: takes effect
        only while waiting for a turn; a call that has begun is waited for and its result delivered.
        """
        return await trio.to_thread.run_sync(fn, *args, limiter=self._limiter, abandon_on_cancel=False)

    async def run_within(self, limit_s: float, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """As `run`, for a call that has no effect: one that does not come back in time is left behind in its thread.

        It keeps its turn until it ends. `limit_s` includes the wait for a turn.

        Raises:
            TooSlowError: there is no result within `limit_s`.
        Cancellation: at any time; the call is left behind.
        """
        with trio.fail_after(limit_s):
            return await trio.to_thread.run_sync(fn, *args, limiter=self._limiter, abandon_on_cancel=True)

    async def take_all_turns(self) -> None:
        """Return when no call is in a thread, those left behind included. Call none any more from before that on."""
        for _ in range(int(self._limiter.total_tokens)):
            await self._limiter.acquire_on_behalf_of(object())

    @property
    def busy(self) -> int:
        """Calls in threads now."""
        return self._limiter.borrowed_tokens
