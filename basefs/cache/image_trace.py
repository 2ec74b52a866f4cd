"""One image's boot trace: what its openers read is recorded, and what earlier ones read is fetched ahead of them.

Recording: from the first open of an image that is cold the first touch of each chunk fails as a hit and is noted
(`ChunkLedger.watch`); so a hit keeps no books, and a chunk that was fetched ahead counts only once it is read. It ends
with the last close, after RECORD_S, or when it is full. A guest's reads count alone where there are any. An image that
is cached is not watched: each chunk's first hit would be a slow one.

Replay: the requests of the trace are made in order, so many at a time as the link needs, between demand and background.
What a reader
misses meanwhile is the whole request of the plan that has it (`ImageTransfers.demand`). Owned by the trio loop.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.flights import Flights
from basefs.cache.ledger import ChunkLedger
from basefs.cache.trace_store import traced_image
from basefs.cache.transfers import ImageTransfers
from basefs.catalog.records import ImageEntry
from basefs.concurrency.guarded import guarded
from basefs.core.boot_trace import UNIT_BYTES, BootTrace, TraceRecording
from basefs.core.byte_ranges import chunk_span
from basefs.core.trace_plan import TracePlan, requests_for

log = logging.getLogger(__name__)

RECORD_S = 180.0
"""A boot is over by then; what is read later is the guest's work, which is another each time."""
COLD_BYTES_MAX = 4 << 20
"""At most so much of a cold image is here: what the checks have read."""
HEADER_UNITS = (1 << 20) // UNIT_BYTES
"""What the checks of an image bring anyway."""
HEAD_UNITS = (256 << 10) // UNIT_BYTES
"""Fetched first whatever the trace has: nova's format inspector, which is no guest, reads so much before each boot, and
the raw view of a qcow2 image begins there."""
UNITS_MIN = (1 << 20) // UNIT_BYTES
"""A trace with fewer units beyond the header is not kept: it saves a few requests, and a tool has read so much."""


@dataclass(slots=True, eq=False)
class _Recording:
    """What is being recorded; `began_at` is when the first touch was noted."""

    units: TraceRecording = field(default_factory=TraceRecording)
    began_at: float | None = None
    by_guest: bool = False
    ended: trio.Event = field(default_factory=trio.Event)


class ImageTrace:
    """One prepared image. `opened` (and `replay`) and `closed` are called for its first and its last handle."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        flights: Flights,
        transfers: ImageTransfers,
        deliveries: Deliveries,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._flights = flights
        self._transfers = transfers
        self._deliveries = deliveries
        self._services = services
        self._recording: _Recording | None = None
        self._not_kept: set[trio.Event] = set()  # of recordings: each is set once its trace is kept
        self._is_asked = False
        self._replaying: trio.Event | None = None  # of the one that goes on; others end with what they have under way

    def opened(self) -> None:
        """Somebody has the image open now: record what is read of a cold one."""
        if self._may_help and self._ledger.cached_bytes <= COLD_BYTES_MAX:
            self._begin_recording()

    def closed(self) -> None:
        """Nobody has it open any more: the recording ends, and the replay, unless it was asked for."""
        self._end_recording()
        if not self._is_asked:
            self.end_replay()

    async def close(self) -> None:
        """The recording ends, and what is under way; returns when what was recorded is kept.

        A replay that ends by this is one that the next server goes on with.
        """
        self._end_recording()
        self._stop_replay()
        while self._not_kept:
            await next(iter(self._not_kept)).wait()

    # --- recording --------------------------------------------------------------------------------------

    def touched(self, span: range, chunks: list[int], *, by_guest: bool) -> None:
        """Of `span`, which is read, `chunks` are touched for the first time since they are watched; not empty."""
        self._transfers.plan.saw(chunks)
        recording = self._recording
        if recording is None:
            return
        if by_guest and not recording.by_guest:
            # What was read before the guest is no part of its boot; it may read that, too.
            recording.by_guest, recording.began_at = True, None
            recording.units.clear()
            self._ledger.watch()
            chunks = self._ledger.first_touches(span)
        now = trio.current_time()
        if recording.began_at is None:
            recording.began_at = now
        at_ms = int((now - recording.began_at) * 1000)
        for chunk in chunks:
            recording.units.note(self._units_of(chunk), at_ms)
        if recording.units.is_full or len(recording.units) * UNIT_BYTES > self._ledger.size // 2:
            self._end_recording()

    def _units_of(self, chunk: int) -> range:
        begin = chunk * self._ledger.chunk_bytes
        end = min(begin + self._ledger.chunk_bytes, self._ledger.size)
        return range(begin // UNIT_BYTES, -(-end // UNIT_BYTES))

    def _begin_recording(self) -> None:
        if self._recording is None:
            self._recording = _Recording()
            self._ledger.watch()
            kept = trio.Event()
            self._not_kept.add(kept)
            self._services.nursery.start_soon(self._record, self._recording, kept)

    def _end_recording(self) -> None:
        if self._recording is not None:
            self._recording.ended.set()
            self._recording = None
            self._ledger.unwatch()

    async def _record(self, recording: _Recording, kept: trio.Event) -> None:
        """Ends with the recording, once it is kept; cancelled with the service, which costs what was recorded."""
        try:
            with guarded(log, "image %s: bug in the work for its boot trace", self._entry.image_id):
                with trio.move_on_after(RECORD_S):
                    await recording.ended.wait()
                if self._recording is recording:
                    self._end_recording()
                trace = recording.units.trace(traced_image(self._entry), by_guest=recording.by_guest)
                if self._is_worth_it(trace):
                    await self._services.traces.add(self._entry, trace)
        finally:
            self._not_kept.discard(kept)
            kept.set()

    def _is_worth_it(self, trace: BootTrace) -> bool:
        """Whether there is something to fetch ahead, and it is no copy: who reads most of an image needs no trace."""
        beyond = sum(1 for unit in trace.units() if unit >= HEADER_UNITS)
        return beyond >= UNITS_MIN and not trace.is_copy and not self._ledger.is_sealed

    # --- replay -----------------------------------------------------------------------------------------

    def replay(self) -> None:
        """Fetch what the trace says ahead of those who have the image open. Returns at once."""
        if self._may_help and self._replaying is None and self._services.traces.may_have(self._entry):
            self._replaying = trio.Event()
            self._note(is_replaying=True)
            self._flights.start(self._replay, self._replaying)

    def replay_asked(self) -> None:
        """The same, also while nobody has it open."""
        self.replay()
        self._is_asked = self._replaying is not None

    def end_replay(self) -> None:
        """Fetch no more than what is under way."""
        self._stop_replay()
        self._note(is_replaying=False)

    def _stop_replay(self) -> None:
        self._transfers.plan.clear()
        self._replaying, self._is_asked = None, False

    def _note(self, *, is_replaying: bool) -> None:
        if self._entry.local.is_replaying != is_replaying:
            self._entry.local.is_replaying = is_replaying
            self._services.changed(self._entry)

    def missing_bytes(self, units: Iterable[int]) -> int:
        """About how many bytes of these units are not in the chunk file: whole chunks are counted."""
        step = self._ledger.chunk_bytes
        chunks = {chunk for unit in units for chunk in chunk_span(unit * UNIT_BYTES, UNIT_BYTES, step)}
        known = len(self._ledger.states)
        return step * len(self._ledger.absent(chunk for chunk in chunks if chunk < known))

    @property
    def is_replaying(self) -> bool:
        """Whether a replay is under way that goes on."""
        return self._replaying is not None

    async def wait_replayed(self) -> None:
        """Return when no replay is under way that goes on."""
        while self._replaying is not None:
            await self._replaying.wait()

    @property
    def _may_help(self) -> bool:
        """Whether some of the image is to come, by ranges."""
        is_complete = self._ledger.cached_bytes == self._ledger.size
        return not (self._deliveries.is_streamed or self._ledger.is_sealed or is_complete)

    async def _replay(self, done: trio.Event) -> None:
        """Ends with its plan; cancelled when the image is closed."""
        plan = TracePlan()
        try:
            requests = await self._requests()
            if self._replaying is done:  # else it was closed meanwhile
                plan = self._transfers.plan = TracePlan(requests)
                async with trio.open_nursery() as nursery:
                    for _ in range(min(self._in_flight_max, len(requests))):
                        nursery.start_soon(self._fetch, plan)
            if self._replaying is done:
                self.end_replay()
        finally:
            plan.clear()
            if self._replaying is done:
                self._replaying, self._is_asked = None, False
            done.set()

    @property
    def _in_flight_max(self) -> int:
        """What the link needs; a quarter of the slots is left to what is not in the trace, and to second requests."""
        slots = self._services.slots.size
        return min(self._services.link.parameters.in_flight, slots - max(1, slots // 4))

    async def _requests(self) -> list[range]:
        trace = await self._services.traces.read(self._entry)
        if trace is None:
            return []
        size, chunk_bytes = self._ledger.size, self._ledger.chunk_bytes
        units = [*range(min(HEAD_UNITS, trace.image.units)), *trace.units()]
        gap_bytes = self._services.link.parameters.gap_bytes
        return await self._services.disk.run(
            lambda: requests_for(units, size=size, chunk_bytes=chunk_bytes, gap_bytes=gap_bytes)
        )

    async def _fetch(self, plan: TracePlan) -> None:
        """Ends with the plan, with its replay."""
        while await self._transfers.fetch_ahead(plan):
            pass
