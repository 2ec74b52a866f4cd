"""Chunks of an earlier life of the server are checked against their checksums before they are served.

What a reader gets are the very bytes that were checked: a disk that lies may give others when it is asked again.
Owned by the trio loop.
"""

import logging
from collections.abc import Callable

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.cache.direct_reader import damaged_on_disk
from basefs.cache.ledger import ChunkLedger
from basefs.concurrency.threads import BlockingCalls
from basefs.core.byte_ranges import chunk_span, runs
from basefs.sources.base import Hasher

log = logging.getLogger(__name__)


class ChunkVerifier:
    """Checks what `ledger` has as STORED. `damaged` is told how many chunks from which one on were not right."""

    def __init__(
        self, ledger: ChunkLedger, disk: BlockingCalls, hashes: BlockingCalls, damaged: Callable[[int, int], None]
    ) -> None:
        self._ledger = ledger
        self._disk = disk
        self._hashes = hashes
        self._damaged = damaged

    def hit(self, offset: int, size: int) -> memoryview | bytes | None:
        """See `ChunkFile.hit`; chunks that are in memory and were not checked yet are checked on the way.

        The check of 1 MiB takes about 50 us; a thread takes longer than that to be woken.
        """
        file = self._ledger.file
        if file is None:
            return None
        data = file.hit(offset, size)
        if data is not None:
            return data
        length = min(size, self._ledger.size - offset)
        span = chunk_span(offset, length, self._ledger.chunk_bytes)
        if not self._ledger.may_check_at_once(span):
            return None
        found = file.checked_at_once(span.start, len(span))
        if found is None:
            return None
        for index in span:
            self._ledger.stored(index)
        start = offset - span.start * self._ledger.chunk_bytes
        return found[start : start + length]

    def hit_into(self, offset: int, target: memoryview) -> bool:
        """See `ChunkFile.hit_into`; as `hit`."""
        file = self._ledger.file
        if file is not None and file.hit_into(offset, target):
            return True
        data = self.hit(offset, len(target))
        if data is None:
            return False
        target[:] = data
        return True

    async def verify(self, span: range) -> dict[int, memoryview]:
        """The bytes of the chunks in `span` that are here and right; all that are wrong are absent then.

        Nothing when all in `span` that are here were checked before.
        """
        file = self._ledger.file
        if file is None or not self._ledger.unverified(span):
            return {}
        here = self._ledger.here(span)
        self._ledger.hold(span)  # a chunk that is dropped meanwhile would look damaged
        try:
            right = await self._disk.run(_right_chunks, file, here)
        finally:
            self._ledger.release(span)
        lost = []
        for index in self._ledger.here(span):
            if index in right:
                self._ledger.stored(index)
            elif index in here:
                self._ledger.lose(index)
                lost.append(index)
        if lost:
            self._damaged(lost[0], len(lost))
        return right

    async def hash(self, span: range, hasher: Hasher) -> bool:
        """Have `hasher` take the bytes of `span`, each checked against its checksum, so that they are what came.

        False where not all of them are here and right: what is damaged is absent then.
        """
        file = self._ledger.file
        if file is None or len(self._ledger.here(span)) < len(span):
            return False
        self._ledger.hold(span)
        try:
            right = await self._hashes.run(_hash_chunks, file, span, hasher)
        finally:
            self._ledger.release(span)
        here = self._ledger.here(span)
        lost = [index for index in here if index not in right]
        for index in here:
            if index in right:
                self._ledger.stored(index)
            else:
                self._ledger.lose(index)
        if lost:
            self._damaged(lost[0], len(lost))
        return len(here) - len(lost) == len(span)

    async def check_disk(self, span: range) -> list[int] | None:
        """The chunks of `span` that were damaged on the disk and are absent now; None when the file was closed.

        Raises:
            CacheError: the file cannot be opened.
        """
        file = self._ledger.file
        if file is None:
            return None
        suspects = await self._disk.run(damaged_on_disk, file, self._ledger.here(span))
        if suspects:
            # Once more: the first look may have met a chunk while it was evicted or written.
            suspects = await self._disk.run(damaged_on_disk, file, suspects)
        here = set(self._ledger.here(span))
        lost = [index for index in suspects if index in here]
        if lost:
            for index in lost:
                self._ledger.lose(index)
            self._damaged(lost[0], len(lost))
            try:
                # A chunk that is fetched again meanwhile may lose its new checksum: it is fetched once more then.
                await self._disk.run(file.clear, lost)
            except errors.CacheError as exc:
                log.debug("checksums of damaged chunks stay: %s", exc)
        return lost


def _hash_chunks(file: ChunkFile, span: range, hasher: Hasher) -> set[int]:
    """In a thread: those of `span` that are right; only if all are, the hash is worth anything."""
    chunks = file.verify(span.start, len(span))
    for chunk in chunks:
        if chunk is not None:
            hasher.update(chunk)
    return {index for index, chunk in zip(span, chunks, strict=True) if chunk is not None}


def _right_chunks(file: ChunkFile, indexes: list[int]) -> dict[int, memoryview]:
    """In a thread."""
    found: dict[int, memoryview] = {}
    for run in runs(indexes):
        chunks = zip(run, file.verify(run.start, len(run)), strict=True)
        found |= {index: chunk for index, chunk in chunks if chunk is not None}
    return found
