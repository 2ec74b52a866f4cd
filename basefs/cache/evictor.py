"""Makes room in the cache: the least recently used chunks go, those of images in use last.

What goes first is in `eviction_order`. A chunk's age says in which epoch, the time between two sweeps of a CLOCK hand
(`cache/ledger.py`), it was last used; an epoch is 1/16 of the cache written. So a chunk that is evicted was last used
at most one epoch later than any chunk that is kept in its rank.

One task, `run`, does all evictions; who needs room asks it and waits, not longer than MAKE_ROOM_S. Owned by the trio
loop.
"""

import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from basefs import errors
from basefs.cache.eviction_order import IN_USE, PINNED, UNUSED_STREAM, CacheContents, Victim, rank_of, victims_of
from basefs.cache.ledger import AGE_MAX
from basefs.cache.space import UNLIMITED, CacheSpace, Room, transfer_cost
from basefs.concurrency.threads import BlockingCalls
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

MARGIN_BYTES_MAX = 256 << 20
BATCH_BYTES = 8 << 20
"""Room that is made at once beyond what was asked for: a pass looks at every image."""
LOOK_EVERY_S = 10.0
"""The disk may be filled by others; so often it is asked."""
MAKE_ROOM_S = 5.0
HOPELESS_S = 2.0
"""After a pass that found nothing to evict, nobody looks again for so long."""
PASSES_MAX = 10
"""Images are opened and read while a pass goes on, so that it finds less than it saw."""


@dataclass(slots=True)
class EvictionCounters:
    """What was evicted since the server began, and what was served without being stored."""

    chunks: int = 0
    images: int = 0
    unstored_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Ask:
    """Somebody waits for room. `spare`: number of an image whose chunks do not go for it (itself).

    A relief is not about limits: so many bytes shall go, whatever room there is.
    """

    length: int
    rank_max: int
    spare: int | None = None
    is_relief: bool = False
    freed_bytes: int = 0
    room: Room | None = None
    """Promised in the step that made it: else who asks next would take it."""
    is_over: bool = False
    done: trio.Event = field(default_factory=trio.Event)


class Evictor:
    """Gives room to transfers, and makes it. Until `run` has begun nothing is evicted."""

    def __init__(self, space: CacheSpace, disk: BlockingCalls, counters: EvictionCounters) -> None:
        self.counters = counters
        self.is_full = False
        """Whether room was asked for and could not be made."""
        self._space = space
        self._disk = disk
        self._contents: CacheContents | None = None
        self._asks: list[_Ask] = []
        self._wake = trio.Event()
        self._swept_at_bytes = 0
        self._epochs: deque[int] = deque(maxlen=AGE_MAX + 1)  # when each began, newest first
        self._hopeless_until = -math.inf
        self._nothing_until = -math.inf
        self._told = ConditionLog(log, clock=trio.current_time)
        self._was_told = False

    # --- for transfers ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def room(self, length: int, *, background_for: int | None = None) -> AsyncIterator[Room]:
        """Room for a transfer of `length` bytes, made if need be; a Room of 0 bytes where there is none.

        For background work (`background_for`: its image's number) nothing in use goes, and nothing of that image.
        """
        cost = transfer_cost(length)
        room = self._space.promise(cost)
        if room is None:
            room = await self._ask(cost, background_for)
        self.look()
        try:
            yield room or Room(0)
        finally:
            if room is not None:
                self._space.give_back(room)

    def look(self) -> None:
        """Something was written: see whether there is work to do. Cheap."""
        headroom = self._space.headroom()
        if headroom < UNLIMITED and (self._is_margin_due(headroom) or self._is_sweep_due(headroom)):
            self._wake.set()

    def age_of(self, used_at_ns: int | None) -> int:
        """How many sweeps ago that was."""
        return sum(1 for begun_at_ns in self._epochs if begun_at_ns > (used_at_ns or 0))

    async def relieve(self) -> bool:
        """The disk is full although no limit says so: give some of it back; whether that could be done."""
        ask = _Ask(BATCH_BYTES, UNUSED_STREAM, is_relief=True)
        await self._wait_for(ask)
        return ask.freed_bytes > 0

    async def _ask(self, cost: int, background_for: int | None) -> Room | None:
        if trio.current_time() < self._hopeless_until:
            return None
        ask = _Ask(cost, PINNED if background_for is None else UNUSED_STREAM, background_for)
        try:
            await self._wait_for(ask)
        except trio.Cancelled:
            if ask.room is not None:
                self._space.give_back(ask.room)
            raise
        finally:
            ask.is_over = True
        return ask.room

    async def _wait_for(self, ask: _Ask) -> None:
        if self._contents is None:
            return
        self._asks.append(ask)
        self._wake.set()
        with trio.move_on_after(MAKE_ROOM_S):
            await ask.done.wait()

    # --- the task ---------------------------------------------------------------------------------------

    async def run(self, contents: CacheContents) -> None:
        """Make room when somebody asks, and a little ahead of that. Ends when it is cancelled."""
        self._contents = contents
        while True:
            with trio.move_on_after(LOOK_EVERY_S):
                await self._wake.wait()
            self._wake = trio.Event()
            await self._disk.run(self._space.sample)
            if self._is_sweep_due(self._space.headroom()):
                await self._sweep(contents)
            while self._asks:
                await self._answer(contents, self._asks[0])
                self._asks.pop(0).done.set()
            await self._keep_margin(contents)

    async def _keep_margin(self, contents: CacheContents) -> None:
        if self._is_margin_due(self._space.headroom()):
            await self._free(contents, _Ask(2 * self._margin(), UNUSED_STREAM))
            if self._space.headroom() < self._margin():
                self._nothing_until = trio.current_time() + HOPELESS_S
        if self.is_full and self._space.headroom() >= min(self._margin(), BATCH_BYTES):
            self._is_room_again()

    def _is_margin_due(self, headroom: int) -> bool:
        return headroom < self._margin() and trio.current_time() >= self._nothing_until

    async def _answer(self, contents: CacheContents, ask: _Ask) -> None:
        if ask.is_relief:
            await self._free(contents, ask)
            return
        fruitless = 0
        for _ in range(PASSES_MAX):
            if ask.is_over:
                return
            ask.room = self._space.promise(ask.length)
            if ask.room is not None:
                return
            if fruitless > 1:
                break
            await self._free(contents, ask)
            fruitless = 0 if ask.freed_bytes else fruitless + 1
        if not ask.is_over:
            ask.room = self._space.promise(ask.length)
        if ask.room is None and ask.spare is None:
            self._hopeless_until = trio.current_time() + HOPELESS_S
            self.is_full = True
            limits, seen = self._space.limits, self._space.report()
            self._was_told |= self._told.begins(
                "full", logging.WARNING,
                "the cache is full and nothing more may go, serving round it: %d bytes of cache_max_bytes = %d; "
                "%s bytes free on the disk, cache_min_free_bytes = %d",
                seen.allocated_bytes, limits.max_bytes, seen.free_bytes, limits.min_free_bytes,
            )  # fmt: skip

    def _is_room_again(self) -> None:
        self.is_full = False
        if self._was_told:
            self._was_told = False
            log.info("the cache has room again")

    def _margin(self) -> int:
        """The low water mark: evicting begins when less is left, so that transfers nearly never wait for it."""
        return min(MARGIN_BYTES_MAX, self._space.capacity // 16)

    def _is_sweep_due(self, headroom: int) -> bool:
        capacity = self._space.capacity
        return headroom < capacity // 4 and self._space.written_bytes - self._swept_at_bytes >= capacity // 16

    async def _sweep(self, contents: CacheContents) -> None:
        self._swept_at_bytes = self._space.written_bytes
        for image in contents.prepared():
            if image.sweep():
                image.entry.local.last_used_ns = time.time_ns()
            await trio.lowlevel.checkpoint()
        self._epochs.appendleft(time.time_ns())

    # --- a pass -----------------------------------------------------------------------------------------

    async def _free(self, contents: CacheContents, ask: _Ask) -> None:
        """Evict until there is room for `ask`, or nothing more may go.

        What is in use goes only if that makes the room, and only for what was asked: not for the batch beyond it.
        """
        await contents.learn_uses()
        victims = victims_of(contents, self.age_of, rank_max=ask.rank_max, spare=ask.spare)
        helps = self._space.headroom() + sum(victim.allocated for victim in victims) >= ask.length
        target = ask.length + min(BATCH_BYTES, self._margin())
        before = self._space.report().allocated_bytes
        for victim in victims:
            ask.freed_bytes = before - self._space.report().allocated_bytes
            wanted = target if victim.rank < IN_USE else ask.length
            missing = ask.length - ask.freed_bytes if ask.is_relief else wanted - self._space.headroom()
            if missing <= 0 or (victim.rank >= IN_USE and not helps):
                return
            rank = rank_of(victim.entry, is_in_use=bool(contents.why_in_use(victim.entry)))
            if rank is None or rank > victim.rank:
                continue  # it was opened meanwhile
            try:
                await self._evict(contents, victim, missing)
            except errors.BasefsError as exc:
                log.debug("image %s: not evicted: %s", victim.entry.image_id, exc)
            await self._disk.run(self._space.sample)
        ask.freed_bytes = before - self._space.report().allocated_bytes

    async def _evict(self, contents: CacheContents, victim: Victim, missing: int) -> None:
        entry, image = victim.entry, victim.image
        if victim.rank == UNUSED_STREAM or (image is None and victim.allocated <= missing):
            if image is None or not image.is_busy:
                self.counters.images += 1 if await contents.drop(entry) else 0
            return
        if image is None:
            image = await contents.prepare(entry)
        self.counters.chunks += await image.evict(0 if victim.image is None else victim.age, missing)
