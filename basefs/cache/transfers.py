"""The ranged flights of one image: demand, read-ahead, background.

Invariants:
- A chunk is claimed in the same synchronous step that found it missing, and by one ranged flight at most.
- Each flight ends by settling what it claimed, whatever happens, so no waiter waits for a flight that is over.
- Demand claims at once and waits for a slot after; read-ahead and background claim only with a slot in hand,
  so a reader never waits behind background work that has not begun.
- No background transfer begins while a reader of any image waits for one.
"""

import copy
from contextlib import suppress

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import ChunkLedger
from basefs.cache.ranged_transfer import RangedTransfers
from basefs.cache.stream import ImageStream
from basefs.cache.waiters import WaiterBoard
from basefs.cache.whole_image import WholeImage
from basefs.catalog.records import ImageEntry
from basefs.core.byte_ranges import longest_zero_run
from basefs.core.readahead import MISSING, ReadaheadPolicy, Window, window_ahead, window_for_miss
from basefs.core.trace_plan import TracePlan, missing_around, missing_runs


class ImageTransfers:
    """Brings chunks of one image; `board` learns what came and what failed."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        board: WaiterBoard,
        flights: Flights,
        deliveries: Deliveries,
        whole: WholeImage,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._flights = flights
        self._deliveries = deliveries
        self._services = services
        self._ranged = RangedTransfers(entry, ledger, board, deliveries, services)
        self._stream = ImageStream(entry, ledger, board, flights, deliveries, whole, services)
        self._hole = range(0)
        self.plan = TracePlan()
        """What is to be fetched ahead of readers; demand for a part of it brings that request as it is planned."""

    @property
    def _policy(self) -> ReadaheadPolicy:
        services = self._services
        return ReadaheadPolicy.for_chunks(
            self._ledger.chunk_bytes, services.request_bytes_max, services.link.parameters
        )

    @property
    def _has_place(self) -> bool:
        """Whether what is fetched before it is wanted can be kept."""
        return self._ledger.file is not None and self._services.health.is_usable

    async def wait_for(self, absent: list[int], *, keeps: bool = True) -> dict[int, bytes]:
        """Have `absent` chunks fetched and wait; those that are not in the cache are returned (see `Waiter`).

        Raises:
            BasefsError: why they will not come by themselves.
        Cancellation: at any time; transfers under way go on.
        """
        waiter = self._board.add(absent, keeps=keeps)
        try:
            self.demand(absent)
            await waiter.done.wait()
        finally:
            self._board.leave(waiter)
        if waiter.error is not None:
            raise copy.copy(waiter.error)
        return waiter.unstored

    # --- starting flights -------------------------------------------------------------------------------

    def demand(self, absent: list[int]) -> None:
        """See that every chunk in `absent` (ascending) is claimed or comes with the stream. Synchronous."""
        if self._deliveries.is_streamed:
            if self._deliveries.may_be_ranged():
                self._flights.start(self._look_again)
            self._stream.start()
            return
        states = self._ledger.states
        if not self._ledger.is_watched:  # else each first touch is told to the plan
            self.plan.saw(absent)
        for index in absent:
            if states[index]:
                continue
            wanted = 1
            while index + wanted <= absent[-1] and not states[index + wanted]:
                wanted += 1
            planned = self.plan.around(index)
            if planned is None:
                window = window_for_miss(states, index, wanted, self._policy)
            else:
                window = Window(missing_around(states, index, planned), None)
            self._ledger.claim(window)
            self._flights.start(self._fly_demand, window.chunks)

    def read_ahead(self, marker: int, length: int) -> None:
        """A reader has come to the marker of a window of `length` chunks: have the next one fetched. Best effort."""
        if not self._deliveries.is_streamed and self._deliveries.gate.is_open:
            self._flights.start(self._fly_ahead, marker, length)

    async def fetch_ahead(self, plan: TracePlan) -> bool:
        """Fetch what is missing of the plan's next request; False when nothing is left of it, or may be fetched now.

        A request that fails is not made again: a reader who wants its chunks makes it.
        """
        gate = self._deliveries.gate
        await gate.wait()
        async with self._services.slots.take_ahead():
            if not gate.is_open:
                return len(plan) > 0
            request = plan.next()
            if request is None or self._ledger.is_sealed:
                return False
            for chunks in missing_runs(self._ledger.states, request):
                if not await self._fetch_run_ahead(chunks):
                    plan.clear()
        return True

    async def _fetch_run_ahead(self, chunks: range) -> bool:
        """False where no more of the image may be fetched ahead: it cannot be kept, or Glance does not give it."""
        async with self._services.evictor.room(self._ranged.length(chunks), background_for=self._entry.number) as room:
            if not (self._has_place and room.left_bytes):
                return False
            # Making room takes time, and others may have claimed some of it meanwhile.
            for run in missing_runs(self._ledger.states, chunks):
                self._ledger.claim(Window(run, None))
                error = await self._ranged.run(run, room)
                if error is not None:
                    return isinstance(error, errors.SourceUnavailableError)
                self._services.counters.replayed_bytes += self._ranged.length(run)
        return True

    async def background(self, chunks_max: int) -> int:
        """Fetch at most `chunks_max` chunks of the biggest hole, at background priority; how many bytes that were.

        0 when nothing is missing but what is on its way. Waits as long as readers wait.

        Raises:
            CacheError: what came could not be kept.
            SourceError, ImageNotFoundError: the transfer failed.
        """
        services = self._services
        while missing := min(chunks_max, self._ledger.states.count(MISSING)):
            await services.readers.wait_none()
            length = min(missing * self._ledger.chunk_bytes, self._ledger.size)
            async with (
                services.slots.take(background=True),
                services.evictor.room(length, background_for=self._entry.number) as room,
            ):
                # A reader may have come meanwhile, and others may have claimed what was missing.
                if services.readers.count or not (chunks := self._from_biggest_hole(chunks_max)):
                    continue
                self._deliveries.check_storable(room, length)
                self._ledger.claim(Window(chunks, None))
                error = await self._ranged.run(chunks, room, learns=services.pace.request_size)
            if error is not None:
                raise copy.copy(error)
            return self._ranged.length(chunks)
        return 0

    def _from_biggest_hole(self, chunks_max: int) -> range:
        """The next chunks to be fetched: a hole is filled to its end before the then biggest one is begun."""
        states = self._ledger.states
        if not self._hole or states[self._hole.start] != MISSING:
            self._hole = longest_zero_run(states)
        start, stop = self._hole.start, min(self._hole.stop, self._hole.start + chunks_max)
        wanted = states[start:stop]
        chunks = range(start, start + len(wanted) - len(wanted.lstrip(b"\0")))
        self._hole = range(chunks.stop, self._hole.stop)
        return chunks

    async def stream_whole(self) -> None:
        """Have the one stream of a streamed image run to its end, or join the one that runs.

        Raises:
            SourceError, ImageNotFoundError: it failed.
        """
        error = await self._stream.run_to_end()
        if error is not None:
            raise copy.copy(error)

    # --- flights ----------------------------------------------------------------------------------------

    async def _fly_demand(self, chunks: range) -> None:
        try:
            async with self._services.slots.take(background=False):
                if self._deliveries.gate.is_open:
                    async with self._services.evictor.room(self._ranged.length(chunks)) as room:
                        await self._ranged.run(chunks, room, is_demand=True)
                else:
                    # The gate closed while this waited for a slot: it would only fail, too.
                    self._board.failed(self._ledger.unclaim(chunks), self._deliveries.gate.error)
        finally:
            # Only if the slot was never had: else everything is settled by now, and this does nothing.
            self._board.failed(self._ledger.unclaim(chunks), None)

    async def _fly_ahead(self, marker: int, length: int) -> None:
        async with self._services.slots.take(background=True):
            window = self._window_ahead(marker, length)
            if window is None:
                return
            async with self._services.evictor.room(self._ranged.length(window.chunks)) as room:
                # Looked up again, for making room takes time; and what nobody asked for is not fetched to be lost.
                window = self._window_ahead(marker, length)
                if window is not None and room.left_bytes:
                    self._ledger.claim(window)
                    await self._ranged.run(window.chunks, room)

    def _window_ahead(self, marker: int, length: int) -> Window | None:
        if not self._deliveries.gate.is_open:
            return None
        return window_ahead(self._ledger.states, marker, length, self._policy)

    async def _look_again(self) -> None:
        """Ask for a range of a streamed image; beside the stream, so that nobody waits for the answer."""
        async with self._services.slots.take(background=True):
            with suppress(errors.BasefsError):
                probe = await self._services.source.probe(
                    self._entry.image_id, size=self._ledger.size, header_bytes=self._ledger.chunk_bytes
                )
                if probe.kind == "ranged":
                    self._deliveries.ranged(probe.reason)
