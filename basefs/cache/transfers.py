"""The flights of one image: demand, read-ahead, background, and the one stream.

Invariants:
- A chunk is claimed in the same synchronous step that found it missing, and by one ranged flight at most.
- Flights live in the service nursery: a reader may leave, the flight goes on. Each ends by settling what it
  claimed, whatever happens, so no waiter waits for a flight that is over.
- Demand claims at once and waits for a slot after; read-ahead and background claim only with a slot in hand,
  so a reader never waits behind background work that has not begun.
"""

import copy
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from basefs import errors
from basefs.cache.ledger import READY, STORED, ChunkLedger
from basefs.cache.outage import RetryGate
from basefs.cache.receiver import Receiver
from basefs.cache.waiters import WaiterBoard
from basefs.catalog.records import ImageEntry
from basefs.concurrency.priority_slots import PrioritySlots
from basefs.concurrency.threads import BlockingCalls
from basefs.core.readahead import ReadaheadPolicy, Window, window_ahead, window_for_miss
from basefs.sources.base import Digest, ImageSource

log = logging.getLogger(__name__)

DISK_RETRY_S = 10.0
"""After the cache disk refused a byte, bytes go round it for so long before it is tried again."""
PIECE_BYTES_MAX = 1 << 20
STREAM_PIECE_BYTES = 1 << 18


@dataclass(slots=True)
class FetchCounters:
    """What happened to all images since the server began."""

    damaged_chunks: int = 0
    """Cached chunks whose bytes did not fit their checksum; they were fetched again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchServices:
    """What every image's transfers share: built once by the service."""

    nursery: trio.Nursery
    source: ImageSource
    slots: PrioritySlots
    stream_slots: PrioritySlots
    disk: BlockingCalls
    request_bytes_max: int
    jitter: Callable[[], float]
    changed: Callable[[ImageEntry], None]
    counters: FetchCounters


class ImageTransfers:
    """Brings chunks of one image; `board` learns what came and what failed."""

    def __init__(self, entry: ImageEntry, ledger: ChunkLedger, board: WaiterBoard, services: FetchServices) -> None:
        self._entry = entry
        self._ledger = ledger
        self._board = board
        self._services = services
        self._policy = ReadaheadPolicy.for_chunks(ledger.chunk_bytes, services.request_bytes_max)
        self._receivers: set[Receiver] = set()
        self._flights: set[trio.CancelScope] = set()
        self._streaming = False
        self._disk_bad_until = -math.inf
        self._idle = trio.Event()
        self._idle.set()
        self.gate = RetryGate(entry.image_id, services.jitter)

    @property
    def is_streamed(self) -> bool:
        """Whether the image comes as one sequential stream."""
        return self._entry.local.source_kind == "streamed"

    @property
    def under_way(self) -> int:
        """Flights and transfers that were started and have not ended; those that wait for a slot, too."""
        return len(self._flights) + len(self._receivers)

    # --- starting flights -------------------------------------------------------------------------------

    def demand(self, absent: list[int]) -> None:
        """See that every chunk in `absent` (ascending) is claimed or comes with the stream. Synchronous."""
        if self.is_streamed:
            self.start_stream()
            return
        states = self._ledger.states
        for index in absent:
            if states[index]:
                continue
            wanted = 1
            while index + wanted <= absent[-1] and not states[index + wanted]:
                wanted += 1
            window = window_for_miss(states, index, wanted, self._policy)
            self._ledger.claim(window)
            self._start(self._fly_demand, window.chunks)

    def read_ahead(self, marker: int, length: int) -> None:
        """A reader has come to the marker of a window of `length` chunks: have the next one fetched. Best effort."""
        if not self.is_streamed and self.gate.is_open:
            self._start(self._fly_ahead, marker, length)

    def start_stream(self) -> None:
        """Have the whole image come from byte 0, unless it is coming already."""
        if not self._streaming:
            self._streaming = True
            self._start(self._fly_stream)

    async def background(self, chunks_max: int) -> bool:
        """Fetch one run of at most `chunks_max` missing chunks at background priority; False when none is missing.

        Raises:
            SourceError, ImageNotFoundError: the transfer failed.
        """
        async with self._services.slots.take(background=True):
            states = self._ledger.states
            index = states.find(b"\0")
            if index < 0:
                return False
            here = states[index : index + chunks_max]
            chunks = range(index, index + len(here) - len(here.lstrip(b"\0")))
            self._ledger.claim(Window(chunks, None))
            error = await self._transfer(chunks)
        if error is not None:
            raise copy.copy(error)
        return True

    def stop(self) -> None:
        """Have what is under way end now; what a flight that is not ours brings ends at its next piece."""
        for scope in self._flights:
            scope.cancel()
        for receiver in self._receivers:
            receiver.stop = True

    async def wait_idle(self) -> None:
        """Return when no transfer is under way."""
        await self._idle.wait()

    # --- flights ----------------------------------------------------------------------------------------

    def _start(self, flight: Callable[..., Awaitable[None]], *arguments: object) -> None:
        scope = trio.CancelScope()
        self._flights.add(scope)
        self._begin()
        self._services.nursery.start_soon(self._fly, scope, flight, *arguments)

    async def _fly(self, scope: trio.CancelScope, flight: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Ends with its flight; cancelled by `stop` and with the service. A bug in a flight must not end the mount."""
        try:
            with scope:
                await flight(*arguments)
        except Exception:
            log.exception("image %s: bug in a transfer", self._entry.image_id)
        finally:
            self._flights.discard(scope)
            self._end()

    def _begin(self) -> None:
        if self._idle.is_set():
            self._idle = trio.Event()

    def _end(self) -> None:
        if not self.under_way:
            self._idle.set()

    async def _fly_demand(self, chunks: range) -> None:
        try:
            async with self._services.slots.take(background=False):
                if self.gate.is_open:
                    await self._transfer(chunks)
                else:
                    # The gate closed while this waited for a slot: it would only fail, too.
                    self._board.failed(self._ledger.unclaim(chunks), self.gate.error)
        finally:
            # Only if the slot was never had: else everything is settled by now, and this does nothing.
            self._board.failed(self._ledger.unclaim(chunks), None)

    async def _fly_ahead(self, marker: int, length: int) -> None:
        async with self._services.slots.take(background=True):
            window = window_ahead(self._ledger.states, marker, length, self._policy)
            if window is not None and self.gate.is_open:
                self._ledger.claim(window)
                await self._transfer(window.chunks)

    async def _transfer(self, chunks: range) -> errors.BasefsError | None:
        """Fetch claimed `chunks` and settle them; the error, if there was one, was told to the waiters.

        Cancellation (a warming that was stopped, the end of the service) is no failure: waiters look again.
        """
        chunk_bytes = self._ledger.chunk_bytes
        offset = chunks.start * chunk_bytes
        length = min(chunks.stop * chunk_bytes, self._ledger.size) - offset
        # Small pieces wake waiters early, large ones cost less: a hand-over to the loop takes about 30 us.
        piece_bytes = max(chunk_bytes, min(PIECE_BYTES_MAX, length // 8 // chunk_bytes * chunk_bytes))
        receiver = self.new_receiver()
        error: errors.BasefsError | None = None
        try:
            await self._services.source.fetch_range(
                self._entry.image_id,
                size=self._ledger.size,
                offset=offset,
                length=length,
                piece_bytes=piece_bytes,
                deliver=receiver.take,
            )
            self.gate.succeeded()
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            error = exc
            self._note_failure(exc)
        finally:
            self.end_receiver(receiver)
            lost = self._ledger.unclaim(chunks)
            self._board.failed(lost, None if isinstance(error, errors.RangeNotHonouredError) else error)
            self.tell_size()
        return error

    async def _fly_stream(self) -> None:
        record = self._entry.record
        digest = None
        if record.os_hash_algo and record.os_hash_value:
            digest = Digest(algorithm=record.os_hash_algo, value=record.os_hash_value)
        error: errors.BasefsError | None = None
        try:
            async with self._services.stream_slots.take(background=False):
                error = await self._stream(digest)
            if error is None:
                self.gate.succeeded()
            else:
                self._note_failure(error)
        finally:
            self._streaming = False
            self._board.all_failed(error)
            self.tell_size()

    async def _stream(self, digest: Digest | None) -> errors.BasefsError | None:
        present = bytes(1 if state in (STORED, READY) else 0 for state in self._ledger.states)
        receiver = self.new_receiver(present=present)
        try:
            await self._services.source.fetch_stream(
                self._entry.image_id,
                size=self._ledger.size,
                piece_bytes=max(self._ledger.chunk_bytes, STREAM_PIECE_BYTES),
                digest=digest,
                deliver=receiver.take,
            )
        except errors.SourceCorruptError as exc:
            await self._quarantine(present)
            return exc
        except (errors.SourceError, errors.ImageNotFoundError) as exc:
            return exc
        finally:
            self.end_receiver(receiver)
        return None

    async def _quarantine(self, present_before: bytes) -> None:
        """The stream turned out wrong as a whole: nothing that it brought may be served again."""
        states = self._ledger.states
        lost = [index for index, before in enumerate(present_before) if not before and states[index] == READY]
        for index in lost:
            self._ledger.lose(index)
        if self._ledger.file is not None:
            try:
                await self._services.disk.run(self._ledger.file.clear, lost)
            except errors.CacheError as exc:
                self.disk_failed(exc)

    # --- what flights tell ------------------------------------------------------------------------------

    def new_receiver(self, present: bytes = b"") -> Receiver:
        """A receiver for one transfer; `end_receiver` must follow."""
        usable = self._ledger.file if trio.current_time() >= self._disk_bad_until else None
        token = trio.lowlevel.current_trio_token()
        receiver = Receiver(usable, self._ledger.chunk_bytes, self._arrived, token, present=present)
        self._receivers.add(receiver)
        self._begin()
        return receiver

    def end_receiver(self, receiver: Receiver) -> None:
        """The transfer is over."""
        self._receivers.discard(receiver)
        self._end()

    def _arrived(self, first: int, length: int, unstored: bytes | None, error: errors.CacheError | None) -> None:
        """See `Arrived`."""
        self._entry.local.fetched_bytes += length
        if error is not None:
            self.disk_failed(error)
        chunk_bytes = self._ledger.chunk_bytes
        for index in range(first, first + -(-length // chunk_bytes)):
            if unstored is None:
                self._ledger.stored(index)
                self._board.arrived(index)
            else:
                self._ledger.not_stored(index)
                at = (index - first) * chunk_bytes
                self._board.arrived(index, unstored[at : at + chunk_bytes])

    def _note_failure(self, error: errors.BasefsError) -> None:
        if isinstance(error, errors.RangeNotHonouredError):
            if not self.is_streamed:
                log.warning("image %s: read as one stream from now on: %s", self._entry.image_id, error)
            self._entry.local.source_kind = "streamed"
            self._entry.local.source_reason = str(error)
        else:
            if isinstance(error, errors.ImageNotFoundError):
                self._entry.is_gone = True
            self.gate.failed(error)

    def disk_failed(self, error: errors.CacheError) -> None:
        """The cache disk failed: go round it for a while."""
        if trio.current_time() >= self._disk_bad_until:
            log.warning("image %s: serving round the cache: %s", self._entry.image_id, error)
        self._disk_bad_until = trio.current_time() + DISK_RETRY_S

    def tell_size(self) -> None:
        """Bring the entry's `cached_bytes` up to date."""
        self._entry.local.cached_bytes = self._ledger.cached_bytes
        self._services.changed(self._entry)
