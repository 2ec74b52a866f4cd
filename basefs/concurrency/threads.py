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

    @property
    def busy(self) -> int:
        """Calls in threads now."""
        return self._limiter.borrowed_tokens
