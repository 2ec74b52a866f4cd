"""Chunks of an earlier life of the server are checked against their checksums before they are served.

A reader's own chunks are checked in one call in a thread, and what it gets are the very bytes that were checked.
For a reader who comes in order the chunks behind are checked meanwhile, in windows as long as what it has read
already, so that the next reads are hits. Owned by the trio loop.
"""

from collections.abc import Callable

import trio

from basefs.cache.chunk_file import ChunkFile
from basefs.cache.flights import Flights
from basefs.cache.ledger import READY, ChunkLedger
from basefs.concurrency.threads import BlockingCalls
from basefs.core.byte_ranges import runs

AHEAD_BYTES_MAX = 8 << 20
CALL_BYTES_MAX = 1 << 20
"""Read in one piece: the threads take turns at the interpreter after each, and the memory is bounded."""


class ChunkVerifier:
    """Checks what `ledger` has as STORED. `damaged` is told how many chunks from which one on were not right."""

    def __init__(
        self,
        ledger: ChunkLedger,
        disk: BlockingCalls,
        flights: Flights,
        damaged: Callable[[int, int], None],
    ) -> None:
        self._ledger = ledger
        self._disk = disk
        self._flights = flights
        self._damaged = damaged
        self._ahead = range(0)
        self._ahead_done = trio.Event()

    async def verify(self, span: range) -> dict[int, memoryview]:
        """The bytes of those chunks in `span` that were checked now and are right; the wrong ones are absent now."""
        if self._ledger.file is None or not self._ledger.unverified(span):
            return {}
        if span.start in self._ahead:
            await self._ahead_done.wait()
        checked = await self._check(span, self._ledger.file)
        self._start_ahead(span.stop)
        return checked

    async def _check(self, span: range, file: ChunkFile) -> dict[int, memoryview]:
        stored = self._ledger.unverified(span)
        if not stored:
            return {}
        found = await self._disk.run(_verified, file, stored)
        lost = []
        for index in self._ledger.unverified(span):  # less what another reader was quicker with
            if index in found:
                self._ledger.stored(index)
            else:
                self._ledger.lose(index)
                lost.append(index)
        if lost:
            self._damaged(lost[0], len(lost))
        return found

    def _start_ahead(self, start: int) -> None:
        """Check on from chunk `start`, as far as what was read before it is long; one such window at a time."""
        if self._ahead:
            return
        states = self._ledger.states
        most = max(1, AHEAD_BYTES_MAX // self._ledger.chunk_bytes)
        before = states[max(0, start - most) : start]
        history = len(before) - len(before.rstrip(bytes([READY])))
        window = range(start, min(start + history, len(states)))
        if history > 1 and self._ledger.unverified(window):
            self._ahead = window
            self._ahead_done = trio.Event()
            self._flights.start(self._run_ahead, window)

    async def _run_ahead(self, window: range) -> None:
        """A flight: ends with its window."""
        try:
            step = max(1, CALL_BYTES_MAX // self._ledger.chunk_bytes)
            for start in range(window.start, window.stop, step):
                if self._ledger.file is not None:
                    await self._check(range(start, min(start + step, window.stop)), self._ledger.file)
        finally:
            self._ahead = range(0)
            self._ahead_done.set()


def _verified(file: ChunkFile, indexes: list[int]) -> dict[int, memoryview]:
    """In a thread."""
    found: dict[int, memoryview] = {}
    for run in runs(indexes):
        chunks = zip(run, file.verify(run.start, len(run)), strict=True)
        found |= {index: chunk for index, chunk in chunks if chunk is not None}
    return found
