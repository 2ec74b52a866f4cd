"""A fixed number of slots; demand goes before background, and background may not take the last ones."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class PrioritySlots:
    """`slots` places for work; waiters are served first come, first served within their class.

    Invariants: demand waits only while all slots are taken; background holds at most
    `slots - reserved` of them, so that a demand never waits for a background transfer alone.
    """

    def __init__(self, slots: int, *, reserved: int) -> None:
        if not 0 <= reserved < slots:
            raise ValueError(f"reserved is {reserved} of {slots} slots")
        self._free = slots
        self._background_free = slots - reserved
        self._demand: deque[trio.Event] = deque()
        self._background: deque[trio.Event] = deque()

    @asynccontextmanager
    async def take(self, *, background: bool) -> AsyncIterator[None]:
        """A slot for the body. Cancellation: safe at any time, nothing stays taken."""
        await self._acquire(background=background)
        try:
            yield
        finally:
            self._free += 1
            self._background_free += background
            self._wake()

    async def _acquire(self, *, background: bool) -> None:
        queue = self._background if background else self._demand
        if not queue and self._may_start(background=background):
            self._charge(background=background)
            return
        turn = trio.Event()
        queue.append(turn)
        try:
            await turn.wait()  # _wake() has charged the slot for us
        except trio.Cancelled:
            if turn.is_set():
                self._free += 1
                self._background_free += background
                self._wake()
            else:
                queue.remove(turn)
            raise

    def _may_start(self, *, background: bool) -> bool:
        return self._free > 0 and (not background or (self._background_free > 0 and not self._demand))

    def _charge(self, *, background: bool) -> None:
        self._free -= 1
        self._background_free -= background

    def _wake(self) -> None:
        while self._demand and self._may_start(background=False):
            self._charge(background=False)
            self._demand.popleft().set()
        while self._background and self._may_start(background=True):
            self._charge(background=True)
            self._background.popleft().set()

    @property
    def waiting_demand(self) -> int:
        """Demand that waits for a slot now."""
        return len(self._demand)
