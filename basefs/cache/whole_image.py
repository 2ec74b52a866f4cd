"""What is known of an image as a whole: whether all of its bytes together have the hash that Glance tells.

`local.whole` says it, and outlives the server. Invariants:
- An image is sealed (no byte of it is served) for exactly as long as `whole` is `refetching` or `quarantined`.
- `verified` and `no_hash` hold of the very chunks that are here: losing one makes it `unknown` (`Deliveries`).
- A refetch begins by dropping every chunk, also one that an earlier server had begun: which of them were wrong, nobody
  knows. It runs as one task in the service nursery, whoever leaves.

Owned by the trio loop.
"""

import copy
import logging
from collections.abc import Awaitable, Callable

import trio

from basefs import errors
from basefs.cache.deliveries import Deliveries
from basefs.cache.disk_health import DISK_RETRY_S
from basefs.cache.fetch_services import FetchServices
from basefs.cache.image_eviction import ImageEviction
from basefs.cache.ledger import ChunkLedger
from basefs.cache.prefix_hash import PrefixHash
from basefs.cache.verifier import ChunkVerifier
from basefs.catalog.records import ImageEntry, ImageRecord, WholeState
from basefs.concurrency.guarded import guarded
from basefs.sources.base import Digest, new_hasher

log = logging.getLogger(__name__)

REFETCH_WORKERS = 3
"""Requests in flight of a refetch, for which guests may wait: 2-4 reach what one Glance gives (rig.md 2.6)."""
DAMNED: tuple[WholeState, ...] = ("refetching", "quarantined")
"""No byte of an image in these states is served."""


def digest_of(record: ImageRecord) -> Digest | None:
    """The strongest hash that Glance tells of the image and Python knows; None where there is none."""
    for algorithm, value in ((record.os_hash_algo, record.os_hash_value), ("md5", record.checksum)):
        if algorithm and value and new_hasher(algorithm) is not None:
            return Digest(algorithm=algorithm, value=value)
    return None


class WholeImage:
    """One image. `bring(bytes_max)` fetches something that is missing, whether the image is sealed or not."""

    def __init__(
        self,
        entry: ImageEntry,
        ledger: ChunkLedger,
        verifier: ChunkVerifier,
        eviction: ImageEviction,
        deliveries: Deliveries,
        services: FetchServices,
        bring: Callable[[int], Awaitable[int]],
    ) -> None:
        self._entry = entry
        self._ledger = ledger
        self._eviction = eviction
        self._deliveries = deliveries
        self._services = services
        self._bring = bring
        self._hash = PrefixHash(ledger, verifier, services.readers)
        self._checking = trio.Lock()
        self._lifting = trio.Lock()
        self._refetching: trio.CancelScope | None = None
        self._error: errors.BasefsError | None = None
        self._changed = trio.Event()
        self.seals = 0
        """How often it was sealed: bytes that were read across that are not to be served."""
        if entry.local.whole in DAMNED:
            ledger.seal()

    @property
    def is_sealed(self) -> bool:
        """Whether no byte may be served."""
        return self._ledger.is_sealed

    @property
    def is_refetching(self) -> bool:
        """Whether a refetch is under way."""
        return self._refetching is not None

    @property
    def _is_complete(self) -> bool:
        return self._ledger.cached_bytes == self._ledger.size

    def quarantine_error(self) -> errors.ImageQuarantinedError:
        """What readers of a sealed image are told."""
        then = "nothing of it is served" if self._entry.local.whole == "quarantined" else "they are fetched again"
        return errors.ImageQuarantinedError(
            f"image {self._entry.image_id}: its bytes did not have the hash that Glance tells; {then}"
        )

    # --- for readers, and for who brings the image ------------------------------------------------------

    async def wait_open(self) -> None:
        """Return when bytes may be served. A refetch that an earlier server left, or that failed, is begun.

        Raises:
            ImageQuarantinedError: the refetched bytes were wrong, too.
            BasefsError: why the bytes cannot be fetched again.
        """
        while self._ledger.is_sealed:
            if self._entry.local.whole not in DAMNED:
                await self.lift()  # Glance tells another hash now
                continue
            if self._entry.local.whole == "quarantined":
                raise self.quarantine_error()
            self._start_refetch()
            await self._changed.wait()
            if self._ledger.is_sealed and self._error is not None:
                raise copy.copy(self._error)

    async def settle(self) -> WholeState:
        """What is known once all that is here was hashed; a refetch, if that is needed, is waited for.

        `unknown`: not all is here (any more). One caller at a time hashes, the others get its outcome.

        Raises:
            ImageQuarantinedError: it was wrong twice.
            BasefsError: it was wrong, and cannot be fetched again.
        Cancellation: at any time; a refetch goes on.
        """
        await self.wait_open()
        async with self._checking:
            await self._check()
        await self.wait_open()
        return self._entry.local.whole

    async def lift(self) -> None:
        """The operator, or another record in Glance, ends the quarantine: all is dropped, and nothing is known."""
        async with self._lifting:
            if self._ledger.is_sealed:  # and stays so: who reads meanwhile must not see what is dropped
                await self.close()
                await self._eviction.discard()
                self._set("unknown")

    async def close(self) -> None:
        """Stop a refetch; the next server, or the next reader, begins it anew."""
        while self._refetching is not None:
            self._refetching.cancel()
            await self._changed.wait()

    # --- hashing ----------------------------------------------------------------------------------------

    async def _check(self) -> None:
        if self._entry.local.whole in ("verified", "no_hash", "quarantined") or not self._is_complete:
            return
        digest = digest_of(self._entry.record)
        if digest is None:
            self._set("no_hash")
            return
        hasher = await self._hash.advance(digest.algorithm)
        if hasher is None:
            return
        self._hash.drop()  # who asks again has the bytes read again
        if digest.is_of(hasher):
            self.proved()
        else:
            self.mismatched(digest)

    async def follow(self) -> bool:
        """Hash what is here of the beginning, while more comes; `settle` goes on from there.

        False when that is of no use: what was hashed was lost, and would be again, or the image is known.
        Cancellation: at any time.
        """
        digest = digest_of(self._entry.record)
        if digest is None or self._entry.local.whole != "unknown":
            return False
        losses = self._hash.losses
        async with self._checking:
            await self._hash.advance(digest.algorithm)
        return self._hash.losses == losses

    def rewritten(self) -> None:
        """Bytes were written that no flight had claimed: they may be others than those that were hashed."""
        self._hash.drop()

    def proved(self) -> None:
        """All that is here has the hash that Glance tells."""
        self._services.counters.verified_images += 1
        self._set("verified")

    def mismatched(self, digest: Digest) -> None:
        """The bytes have another hash: fetch all of them again, once."""
        self._services.counters.mismatches += 1
        image, algorithm = self._entry.image_id, digest.algorithm
        if self._entry.local.whole == "refetching":
            log.error(
                "image %s: quarantined: its bytes, fetched twice, do not have the %s that Glance tells; reads of it "
                "answer EIO. Look at Glance's store, then `basefs image evict %s`", image, algorithm, image,
            )  # fmt: skip
            self._set("quarantined")
        else:
            log.warning(
                "image %s: its bytes do not have the %s that Glance tells; nothing of it is served until all of it was "
                "fetched again", image, algorithm,
            )  # fmt: skip
            self._set("refetching")
        self._services.forget_pages(self._entry)
        self._services.blame(self._entry)
        self._start_refetch()

    def _set(self, whole: WholeState) -> None:
        self._entry.local.whole = whole
        self._services.changed(self._entry)
        self._error = None
        if whole in DAMNED:
            self._ledger.seal()
            self.seals += 1
        elif self._ledger.is_sealed:
            self._ledger.unseal()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- fetching again ---------------------------------------------------------------------------------

    def _start_refetch(self) -> None:
        if self._refetching is None:
            self._refetching = trio.CancelScope()
            self._services.nursery.start_soon(self._refetch, self._refetching)

    async def _refetch(self, scope: trio.CancelScope) -> None:
        """Ends when the image is proved or quarantined, or cannot be fetched; cancelled by `close` and `lift`."""
        image_id = self._entry.image_id
        try:
            with guarded(log, "image %s: bug in a transfer", image_id, foreseen=(errors.BasefsError,)) as guard:
                with scope:
                    await self._eviction.discard()
                    while self._entry.local.whole == "refetching":
                        await self._bring_all()
                        async with self._checking:
                            await self._check()
                if self._entry.local.whole == "quarantined":  # also when it was stopped meanwhile
                    with trio.CancelScope(shield=True):  # it takes no longer than a write
                        await self._eviction.discard()
            if guard.bug is not None:
                self._error = errors.InternalError(f"image {image_id}: it was not fetched again")
        except errors.BasefsError as exc:
            self._error = exc
            log.info("image %s: not fetched again: %s", image_id, exc)
        finally:
            self._refetching = None
            self._tell()

    async def _bring_all(self) -> None:
        failures: list[errors.BasefsError] = []

        async def work(all_work: trio.CancelScope) -> None:
            while not self._is_complete and self._entry.local.whole == "refetching":
                try:
                    await self._bring(self._services.pace.request_size.bytes)
                except errors.SourceHashError:
                    pass  # by a stream, which has told it
                except (errors.SourceUnavailableError, errors.SourceCorruptError, errors.SourceForbiddenError):
                    await self._deliveries.gate.wait()
                except errors.CacheError:
                    await trio.sleep(DISK_RETRY_S)  # what is not in the cache cannot be hashed, so it is not served
                except errors.BasefsError as exc:
                    failures.append(exc)
                    all_work.cancel()
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(REFETCH_WORKERS):
                nursery.start_soon(work, nursery.cancel_scope)
        if failures:
            raise failures[0]
