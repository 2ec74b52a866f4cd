"""The hash of an image's bytes from the first one on, as far as they are here: it goes on where it was.

What is hashed is read back from the chunk file, each chunk compared with its checksum on the way. Invariant: what was
hashed is what is there; when a chunk is lost, or bytes are written without being claimed, it begins anew.
Owned by the trio loop; one caller of `advance` at a time.
"""

from dataclasses import dataclass

from basefs.cache.ledger import ChunkLedger
from basefs.cache.verifier import ChunkVerifier
from basefs.cache.waiting_readers import WaitingReaders
from basefs.sources.base import Hasher, new_hasher

HASH_BYTES = 2 << 20
"""Hashed in one call in a thread (5 ms); readers go in between."""


@dataclass(slots=True, kw_only=True)
class _Progress:
    algorithm: str
    hasher: Hasher
    losses: int
    chunks: int = 0
    """Hashed so far."""


class PrefixHash:
    """Of one image."""

    def __init__(self, ledger: ChunkLedger, verifier: ChunkVerifier, readers: WaitingReaders) -> None:
        self._ledger = ledger
        self._verifier = verifier
        self._readers = readers
        self._progress: _Progress | None = None
        self._drops = 0
        self.losses = 0
        """How often what was hashed was lost."""

    def drop(self) -> None:
        """Chunks that were here may have been written over: nothing that was hashed counts."""
        self._progress = None
        self._drops += 1

    async def advance(self, algorithm: str) -> Hasher | None:
        """Hash on, until a chunk is not here; the hasher if that was all of the image, and none of it was lost since.

        `algorithm` is one that `new_hasher` knows. Waits while readers wait for Glance. Cancellation: at any time, a
        step of HASH_BYTES is waited for; the next call goes on.
        """
        progress = self._begun(algorithm)
        chunks, drops = len(self._ledger.states), self._drops
        step = max(1, HASH_BYTES // self._ledger.chunk_bytes)
        while progress.chunks < chunks:
            span = range(progress.chunks, min(progress.chunks + step, chunks))
            await self._readers.wait_none()
            if len(self._ledger.here(span)) < len(span):
                break
            try:
                is_hashed = await self._verifier.hash(span, progress.hasher)
            except Exception:  # cancelled it is only before it has begun, and may go on
                self._progress = None
                raise
            if not is_hashed or drops != self._drops or progress.losses != self._ledger.losses:
                self._progress = None
                self.losses += 1
                return None
            progress.chunks = span.stop
        return progress.hasher if progress.chunks == chunks and progress.losses == self._ledger.losses else None

    def _begun(self, algorithm: str) -> _Progress:
        progress, losses = self._progress, self._ledger.losses
        if progress is None or progress.algorithm != algorithm or progress.losses != losses:
            hasher = new_hasher(algorithm)
            assert hasher is not None, "the algorithm is one that Python knows"
            self.losses += progress is not None
            progress = self._progress = _Progress(algorithm=algorithm, hasher=hasher, losses=losses)
        return progress
