"""One ranged transfer: claimed chunks of one image are fetched, published and settled; late demand is hedged.

A second request is made where a reader waits for the first, nothing came of it for longer than of its like
(`core/hedging`), no outage is on or suspected, and a slot is free that nobody waits for. It is for what is missing
then, delivers into the same claims (`ChunkRace`), and draws on the same room. Who is quicker ends the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from basefs import errors
from basefs.cache.chunk_race import ChunkRace
from basefs.cache.deliveries import Deliveries
from basefs.cache.fetch_services import FetchServices
from basefs.cache.ledger import CLAIMED, ChunkLedger
from basefs.cache.link_meter import TransferTiming
from basefs.cache.space import Room
from basefs.cache.waiters import WaiterBoard
from basefs.catalog.records import ImageEntry
from basefs.core.request_size import RequestSize

PIECE_BYTES_MAX = 4 << 20
FIRST, SECOND = 0, 1


@dataclass(slots=True, eq=False)
class _Race:
    """A transfer that may be made twice: what both runners know."""

    claims: ChunkRace
    room: Room
    running: set[int] = field(default_factory=set)
    is_whole: bool = False
    failures: dict[int, errors.BasefsError] = field(default_factory=dict)


class RangedTransfers:
    """Those of one image; `board` learns what failed, `deliveries` publishes what came."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        board: WaiterBoard,
        deliveries: Deliveries,
        services: FetchServices,
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._deliveries = deliveries
        self._services = services

    def length(self, chunks: range) -> int:
        """Bytes in `chunks`; the last chunk of the image may be short."""
        chunk_bytes = self._ledger.chunk_bytes
        return min(chunks.stop * chunk_bytes, self._ledger.size) - chunks.start * chunk_bytes

    async def run(
        self, chunks: range, room: Room, *, learns: RequestSize | None = None, is_demand: bool = False
    ) -> errors.BasefsError | None:
        """Fetch claimed `chunks` and settle them; the error, if there was one, was told to the waiters.

        `learns` is told how fast the body came; `is_demand`: a reader waits, so it may be made twice.

        Cancellation (a warming that was stopped, the end of the service) is no failure: waiters look again.
        """
        error: errors.BasefsError | None = None
        try:
            if is_demand:
                await self._fetch_demand(chunks, room)
            else:
                with self._timed() as timing:
                    await self._fetch(chunks, room, timing)
                if learns is not None and timing.rest_s > 0:
                    learns.came(timing.rest_bytes, timing.rest_s)
            self._deliveries.gate.succeeded()
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            error = exc
            self._deliveries.note_failure(exc)
        finally:
            lost = self._ledger.unclaim(chunks)
            self._board.failed(lost, None if isinstance(error, errors.RangeNotHonouredError) else error)
            self._deliveries.tell_size()
        return error

    async def _fetch(
        self, chunks: range, room: Room, timing: TransferTiming, race: ChunkRace | None = None, runner: int = FIRST
    ) -> None:
        chunk_bytes, length = self._ledger.chunk_bytes, self.length(chunks)
        # Small pieces wake waiters early, large ones cost less: a hand-over to the loop takes about 30 us.
        piece_bytes = max(chunk_bytes, min(PIECE_BYTES_MAX, length // 8 // chunk_bytes * chunk_bytes))
        claims = None if race is None else race.claims_of(runner)
        receiver = self._deliveries.new_receiver(room, timing=timing, claims=claims)
        try:
            await self._services.source.fetch_range(
                self._entry.image_id,
                size=self._ledger.size,
                offset=chunks.start * chunk_bytes,
                length=length,
                piece_bytes=piece_bytes,
                deliver=receiver.take,
            )
        finally:
            self._deliveries.end_receiver(receiver)

    @contextmanager
    def _timed(self) -> Iterator[TransferTiming]:
        """The body is a transfer; one that raises tells nothing of the link."""
        timing, is_whole = self._services.link.begin(), False
        try:
            yield timing
            is_whole = True
        finally:
            self._services.link.end(timing, is_whole=is_whole)

    # --- demand -----------------------------------------------------------------------------------------

    async def _fetch_demand(self, chunks: range, room: Room) -> None:
        """Fetch them by one request, or by the quicker one of two."""
        hedges, length = self._services.hedges, self.length(chunks)
        late_s = hedges.late_after_s(length)
        if late_s is None:
            with self._timed() as timing:
                await self._fetch(chunks, room, timing)
            hedges.came(length, timing.silence_s)
            return
        race = _Race(ChunkRace(chunks), room)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, FIRST, chunks, race, nursery.cancel_scope)
            await self._wait_late(late_s, race)
            await self._run_second(chunks, race, nursery.cancel_scope)
        if not race.is_whole and race.failures:
            raise race.failures[min(race.failures)]

    async def _run(self, runner: int, chunks: range, race: _Race, both: trio.CancelScope) -> None:
        """One of the two. Ends with its request, which the other ends by being quicker; its error is in `race`."""
        timing = self._services.link.begin()
        race.running.add(runner)
        is_whole = False
        try:
            await self._fetch(chunks, race.room, timing, race.claims, runner)
            is_whole = runner not in race.claims.beaten
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            race.failures[runner] = exc
            race.claims.failed(runner)
        finally:
            race.running.discard(runner)
            self._services.link.end(timing, is_whole=is_whole)
            if runner == FIRST and runner not in race.failures:
                self._services.hedges.came(self.length(chunks), timing.silence_s)
        if is_whole or not race.running:
            race.is_whole |= is_whole
            both.cancel()  # the other one, and the wait for its being late

    async def _wait_late(self, late_s: float, race: _Race) -> None:
        """Return when no piece came for `late_s`; a silence between two pieces is seen after twice that at the most."""
        while True:
            pieces = race.claims.pieces
            await trio.sleep(late_s)
            if race.claims.pieces == pieces:
                return

    async def _run_second(self, chunks: range, race: _Race, both: trio.CancelScope) -> None:
        """The second request, if one may be made now."""
        begin = next((index for index in chunks if self._ledger.states[index] == CLAIMED), chunks.stop)
        missing = range(begin, chunks.stop)
        with self._services.slots.spare() as has_slot:
            if not (missing and has_slot and self._may_hedge(missing)):
                return
            race.claims.begin_second()
            await self._run(SECOND, missing, race, both)
        if race.claims.winner == SECOND:
            self._services.hedges.won += 1

    def _may_hedge(self, missing: range) -> bool:
        services, outage = self._services, self._services.outage
        if outage.is_on or outage.is_suspected or not self._deliveries.gate.is_open:
            return False
        return services.hedges.may_spend(self.length(missing))
