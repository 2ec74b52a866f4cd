"""What is known of each chunk of one image. Owned by the trio loop; every method is one synchronous step.

One byte a chunk: MISSING; STORED (a checksum from an earlier life, not yet verified); READY; CLAIMED (one
ranged flight fetches it); EVICTING (a thread drops it: it is MISSING, and may be claimed, only afterwards).
`ready` in the chunk file is set for exactly the READY chunks; for none while the image is sealed (its bytes as a
whole turned out wrong).

A second byte a chunk is its age: how many sweeps of the evictor have passed since it was last used, NO_AGE for
exactly the chunks that are not here. A sweep sets `ready` to a value that makes the next hit fail once; the slow
path then finds an age above 0 and makes it 0. So hits keep no books (the CLOCK algorithm, with more than one bit).

In the same way the first touch of each chunk is learned while the image is watched: one more byte a chunk, 1 until it
is touched. A chunk that is here or comes meanwhile has a `ready` that fails once, also when the watch is over by then.
"""

from collections.abc import Iterable

from basefs.cache.chunk_file import ChunkFile
from basefs.core.byte_ranges import runs
from basefs.core.readahead import MISSING, Window

STORED, READY, CLAIMED, EVICTING = 1, 2, 3, 4
_IN_FILE = bytes([STORED, READY])

AGE_MAX = 63
"""Chunks that were not used for so many sweeps or more are equally old."""
NO_AGE = 255
_OLDER = bytes(min(age + 1, AGE_MAX) if age <= AGE_MAX else age for age in range(256))
_AGE_OF_STATE = bytes(0 if state in (STORED, READY) else NO_AGE for state in range(256))


class ChunkLedger:
    """The states of an image's chunks, in step with the chunk file's `ready` bytes. `age`: of those that are here."""

    def __init__(self, states: bytearray, file: ChunkFile | None, *, size: int, chunk_bytes: int, age: int = 0) -> None:
        self.states = states
        self.file = file
        self.size = size
        self.chunk_bytes = chunk_bytes
        self._ages = bytearray(states.translate(_AGE_OF_STATE).replace(b"\0", bytes([min(age, AGE_MAX)])))
        self._markers: dict[int, int] = {}  # to the length of their window, in chunks
        self._held: dict[range, int] = {}
        self.is_sealed = False
        self.is_watched = False
        self._untouched = bytearray()  # as `states`, once the image was watched
        self.losses = 0
        """Chunks that were here and were lost, so far."""

    def adopt(self, file: ChunkFile, states: bytearray, *, age: int = 0) -> None:
        """From now on there is a file, and what was in it before is STORED; what is on its way stays so."""
        self.file = file
        for index, state in enumerate(states):
            if state == STORED and self.states[index] == MISSING:
                self.states[index] = STORED
                self._ages[index] = min(age, AGE_MAX)

    @property
    def cached_bytes(self) -> int:
        """Image bytes in the chunk file, exactly (the last chunk may be short)."""
        chunks = self.states.count(READY) + self.states.count(STORED)
        short = len(self.states) * self.chunk_bytes - self.size
        return chunks * self.chunk_bytes - (short if self.states and self.states[-1] in (STORED, READY) else 0)

    def absent(self, span: Iterable[int]) -> list[int]:
        """Those of `span` that are not here, whether on their way or not."""
        return [index for index in span if self.states[index] not in (STORED, READY)]

    def here(self, span: range) -> list[int]:
        """Those of `span` that are in the chunk file, verified or not."""
        return [index for index in span if self.states[index] in (STORED, READY)]

    def may_check_at_once(self, span: range) -> bool:
        """Whether all of `span` is in the chunk file, some of it not verified, and no marker or touch is to be told."""
        states = self.states[span.start : span.stop]
        if self.is_sealed or self.is_watched or STORED not in states or states.strip(_IN_FILE):
            return False
        return not self._markers or not any(index in span for index in self._markers)

    def unverified(self, span: range) -> list[int]:
        """Those of `span` that must be verified before they are served."""
        if STORED not in self.states[span.start : span.stop]:
            return []
        return [index for index in span if self.states[index] == STORED]

    # --- fetching ---------------------------------------------------------------------------------------

    def claim(self, window: Window) -> None:
        """Give the window's chunks, all MISSING, to one flight."""
        chunks = window.chunks
        self.states[chunks.start : chunks.stop] = bytes([CLAIMED]) * len(chunks)
        if window.marker is not None:
            self._markers[window.marker] = len(chunks)

    def unclaim(self, chunks: range) -> list[int]:
        """A flight is over: its chunks that did not become READY are MISSING again, and returned."""
        lost = [index for index in chunks if self.states[index] == CLAIMED]
        for index in lost:
            self.states[index] = MISSING
            self._markers.pop(index, None)
        return lost

    def stored(self, index: int) -> None:
        """The chunk was written in this life, or its checksum was verified: serve it."""
        state = self.states[index]
        if state == READY:
            return
        self.states[index] = READY
        if state != STORED:  # to be verified is no use: scrubbing must not make all chunks equally recent
            self._ages[index] = 0
        self._show(index)

    def _show(self, index: int) -> None:
        if self.file is not None and not self.is_sealed:
            aged = self._ages[index] > 0 or (self.is_watched and self._untouched[index] > 0)
            self.file.mark_ready(index, marker=index in self._markers, aged=aged)

    def not_stored(self, index: int) -> None:
        """The chunk came down and the disk did not take it."""
        if self.states[index] == CLAIMED:
            self.states[index] = MISSING

    def lose(self, index: int) -> None:
        """The chunk's local bytes are damaged or gone: do not serve them."""
        if self.states[index] in (STORED, READY):
            self._forget(index, MISSING)

    def _forget(self, index: int, state: int) -> None:
        self.states[index] = state
        self._ages[index] = NO_AGE
        self.losses += 1
        if self.file is not None:
            self.file.mark_not_ready(index)

    # --- use --------------------------------------------------------------------------------------------

    def touch(self, span: range) -> list[tuple[int, int]]:
        """Note that `span` is used; the read-ahead markers in it, which are then unset, and their windows' lengths."""
        touched = [index for index in self._markers if index in span] if self._markers else []
        for index in touched:
            if self.states[index] == READY and self.file is not None and not self.is_sealed:
                self.file.mark_ready(index)
        if self._ages[span.start : span.stop].strip(b"\0"):
            self._renew(span)
        return [(index, self._markers.pop(index)) for index in touched]

    def watch(self) -> None:
        """From now on no chunk is touched, until `first_touches` tells that it is."""
        self.is_watched = True
        self._untouched = bytearray(b"\1") * len(self.states)
        if self.file is not None:
            self.file.age_all()

    def unwatch(self) -> None:
        """First touches are of no interest any more; `first_touches` must be asked for them all the same."""
        self.is_watched = False

    def first_touches(self, span: range) -> list[int]:
        """Those chunks of `span` that were not touched since `watch`; now they are."""
        if self._untouched.find(1, span.start, span.stop) < 0:
            return []
        found = [index for index in span if self._untouched[index]]
        for index in found:
            self._untouched[index] = 0
            if self.states[index] == READY:
                self._show(index)
        return found

    def _renew(self, span: range) -> None:
        for index in span:
            if 0 < self._ages[index] <= AGE_MAX:
                self._ages[index] = 0
                if self.states[index] == READY:
                    self._show(index)

    def sweep(self) -> bool:
        """Every chunk is one sweep older, until it is touched; whether any was used since the last sweep."""
        was_used = 0 in self._ages
        self._ages = self._ages.translate(_OLDER)
        if self.file is not None:
            self.file.age_all()
        return was_used

    def hold(self, span: range) -> None:
        """Nobody may evict a chunk of `span` until `release` was called as often."""
        self._held[span] = self._held.get(span, 0) + 1

    def release(self, span: range) -> None:
        """The counterpart of `hold`."""
        holders = self._held.pop(span)
        if holders > 1:
            self._held[span] = holders - 1

    # --- the image as a whole ---------------------------------------------------------------------------

    def seal(self) -> None:
        """Serve nothing any more, whatever is here or comes."""
        self.is_sealed = True
        if self.file is not None:
            self.file.mark_none_ready()

    def unseal(self) -> None:
        """Serve what is here again."""
        self.is_sealed = False
        for index, state in enumerate(self.states):
            if state == READY:
                self._show(index)

    def claim_all(self) -> list[int]:
        """Give every chunk that is here, held or not, to one who drops them: EVICTING, and `evicted` must follow."""
        claimed = [index for index, state in enumerate(self.states) if state in (STORED, READY)]
        for index in claimed:
            self._forget(index, EVICTING)
            self._markers.pop(index, None)
        return claimed

    # --- eviction ---------------------------------------------------------------------------------------

    def ages(self) -> list[tuple[int, int]]:
        """The ages that chunks have, oldest first, and the bytes of those chunks (the last chunk counts as whole)."""
        return [(age, self._ages.count(age) * self.chunk_bytes) for age in range(AGE_MAX, -1, -1) if age in self._ages]

    def claim_eviction(self, age: int, chunks_max: int) -> list[int]:
        """Give at most `chunks_max` chunks that are at least `age` old to one evictor; ascending, none that is held.

        They are EVICTING and are served no more; `evicted` must follow.
        """
        old = bytes(1 if age <= value <= AGE_MAX else 0 for value in range(256))
        found = self._ages.translate(old)
        for span in self._held:
            found[span.start : span.stop] = bytes(len(span))
        claimed: list[int] = []
        index = found.find(1)
        while index >= 0 and len(claimed) < chunks_max:
            claimed.append(index)
            self._forget(index, EVICTING)
            self._markers.pop(index, None)
            index = found.find(1, index + 1)
        return claimed

    def evicted(self, indexes: Iterable[int]) -> None:
        """The evictor is done with them: they may be fetched again."""
        for run in runs(indexes):
            self.states[run.start : run.stop] = bytes(len(run))
