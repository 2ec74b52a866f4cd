"""Calls that change something elsewhere: cancelled, they get a little time to say what they did."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import outcome
import trio

T = TypeVar("T")


async def with_grace(call: Callable[[], Awaitable[T]], grace_s: float) -> T:
    """What `call()` gives; without the answer nobody would know what to undo.

    Cancellation: `call` is cancelled `grace_s` later. What it gives before is returned; the caller's next checkpoint
    raises Cancelled.
    """
    kept = trio.CancelScope(shield=True)

    async def limit() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            # Not raised again: it would take the answer away, and it is raised at the next checkpoint anyhow.
            kept.deadline = trio.current_time() + grace_s

    async with trio.open_nursery() as nursery:
        nursery.start_soon(limit)
        with kept:
            result = await outcome.acapture(call)
        nursery.cancel_scope.cancel()
    # After the grace it is Cancelled, for whoever was cancelled before.
    return result.unwrap()
