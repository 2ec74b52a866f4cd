"""A fixed number of slots; demand goes first, then what is ahead of it, then background, which leaves the most free."""

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

import trio

_Kind = Literal["demand", "ahead", "background"]


class PrioritySlots:
    """`slots` places for work; waiters are served first come, first served within their class.

    Invariants: demand waits only while all slots are taken; *ahead* (what a trace says will be demanded) and background
    together hold at most all but one of them (all, where `reserved` is 0), and background begins only where they hold
    less than `slots - reserved`. So a demand never waits for such transfers alone, nor does the replay of a trace for
    background ones.
    """

    def __init__(self, slots: int, *, reserved: int) -> None:
        if not 0 <= reserved < slots:
            raise ValueError(f"reserved is {reserved} of {slots} slots")
        self.size = slots
        self._free = slots
        self._left: dict[_Kind, int] = {"ahead": slots - min(1, reserved), "background": slots - reserved}
        self._waiting: dict[_Kind, deque[trio.Event]] = {"demand": deque(), "ahead": deque(), "background": deque()}

    @asynccontextmanager
    async def take(self, *, background: bool) -> AsyncIterator[None]:
        """A slot for the body. Cancellation: safe at any time, nothing stays taken."""
        async with self._taken("background" if background else "demand"):
            yield

    @asynccontextmanager
    async def take_ahead(self) -> AsyncIterator[None]:
        """A slot for what will be demanded soon; as `take`."""
        async with self._taken("ahead"):
            yield

    @contextmanager
    def spare(self) -> Iterator[bool]:
        """A slot for the body, where another one stays free and nobody waits; False: there is none."""
        has_slot = self._free > 1 and not any(self._waiting.values())
        if has_slot:
            self._charge("demand", -1)
        try:
            yield has_slot
        finally:
            if has_slot:
                self._give_back("demand")

    @asynccontextmanager
    async def _taken(self, kind: _Kind) -> AsyncIterator[None]:
        await self._acquire(kind)
        try:
            yield
        finally:
            self._give_back(kind)

    async def _acquire(self, kind: _Kind) -> None:
        queue = self._waiting[kind]
        if not queue and self._may_start(kind):
            self._charge(kind, -1)
            return
        turn = trio.Event()
        queue.append(turn)
        try:
            await turn.wait()  # _wake() has charged the slot for us
        except trio.Cancelled:
            if turn.is_set():
                self._give_back(kind)
            else:
                queue.remove(turn)
            raise

    def _may_start(self, kind: _Kind) -> bool:
        if not self._free or kind == "demand":
            return self._free > 0
        if self._waiting["demand"] or self._left[kind] <= 0:
            return False
        return kind == "ahead" or not self._waiting["ahead"]

    def _charge(self, kind: _Kind, change: int) -> None:
        self._free += change
        if kind != "demand":
            for limited in self._left:
                self._left[limited] += change

    def _give_back(self, kind: _Kind) -> None:
        self._charge(kind, 1)
        self._wake()

    def _wake(self) -> None:
        for kind, queue in self._waiting.items():
            while queue and self._may_start(kind):
                self._charge(kind, -1)
                queue.popleft().set()

    @property
    def waiting_demand(self) -> int:
        """Demand that waits for a slot now."""
        return len(self._waiting["demand"])
