"""An `ImageSource` over a cache tier with Glance behind it: what the tier does not give comes from Glance in that call.

The tier has a breaker of its own: what it does is no outage, and what Glance does is not its fault. So an answer that
is no transport error counts against it only once Glance gave the bytes that it did not.
"""

import logging
import random
from collections.abc import Callable

import trio

from basefs import errors
from basefs.concurrency.outage import Outage
from basefs.core.trial_breaker import FAILURES_TO_TELL, TrialBreaker
from basefs.sources.base import Deliver, Digest, ImageSource, ProbeResult
from basefs.sources.tier_http import CacheTier

log = logging.getLogger(__name__)

PROOF_BYTES = 4096
"""Asked of Glance itself before the tier is believed about an image: that ranges of it are honoured (a slicing cache
hides a 206 that is too long, and with it wrong bytes), and that the tier's first bytes are this image's."""


class CacheTierSource:
    """`ImageSource`. Ranges come from `tier`, streams and all else from `glance`.

    `nursery` is the service's, for trials of a tier that is away: no reader waits for one. Owned by the loop.
    """

    def __init__(
        self,
        tier: CacheTier,
        glance: ImageSource,
        nursery: trio.Nursery,
        *,
        outage: Outage,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.breaker = TrialBreaker(jitter)
        self.failovers = 0
        """Ranges that the tier was asked for, and Glance gave."""
        self.is_distrusted = False
        """It gave other bytes than Glance: never asked again by this server."""
        self.tier = tier
        self._glance = glance
        self._nursery = nursery
        self._outage = outage

    @property
    def requests(self) -> int:
        """Those to the tier and those to Glance."""
        return self.tier.requests + self._glance.requests

    @property
    def received_bytes(self) -> int:
        """What came from both."""
        return self.tier.received_bytes + self._glance.received_bytes

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        """See `ImageSource.probe`. One small range of Glance itself, the header from the tier."""
        length = min(header_bytes, size)
        problem, began = None, trio.current_time()
        if length > PROOF_BYTES and self._is_asked:
            proof = await self._glance.probe(image_id, size=size, header_bytes=PROOF_BYTES)
            if proof.kind == "ranged":
                header = _Header(length)
                problem = await self._ask(began, image_id, size, 0, length, length, header)
                if problem is None and header.data.startswith(proof.header):
                    return ProbeResult(kind="ranged", reason=proof.reason, header=header.data)
                if problem is None:
                    self._distrust(image_id)
        result = await self._glance.probe(image_id, size=size, header_bytes=header_bytes)
        if problem is not None:
            self._gave_way(began, problem)
        return result

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_range`. What the tier began Glance completes."""
        self._try_when_due(image_id, size)
        problem, began = None, trio.current_time()
        taken = _Taken(deliver)
        if self._is_asked:
            problem = await self._ask(began, image_id, size, offset, length, piece_bytes, taken)
            if problem is None or taken.has_enough or taken.bytes == length:
                return
        await self._glance.fetch_range(
            image_id,
            size=size,
            offset=offset + taken.bytes,
            length=length - taken.bytes,
            piece_bytes=piece_bytes,
            deliver=deliver,
        )
        if problem is not None:
            self._gave_way(began, problem)

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_stream`. By Glance: an image that it streams is in no cache of ranges."""
        await self._glance.fetch_stream(image_id, size=size, piece_bytes=piece_bytes, digest=digest, deliver=deliver)

    # --- whether the tier is asked ---------------------------------------------------------------------

    @property
    def is_used(self) -> bool:
        """Whether nothing speaks against the tier."""
        return not (self.is_distrusted or self.breaker.is_away)

    @property
    def _is_asked(self) -> bool:
        # In an outage the tier could not ask Glance whether we may have the bytes.
        return self.is_used and not self._outage.is_on

    async def _ask(
        self, began: float, image_id: str, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> errors.SourceError | None:
        """Ask the tier; why it did not give all, None if it did."""
        try:
            await self.tier.fetch_range(
                image_id, size=size, offset=offset, length=length, piece_bytes=piece_bytes, deliver=deliver
            )
        except errors.SourceError as exc:
            log.debug("%s; Glance is asked", exc)
            if isinstance(exc, errors.SourceUnavailableError) and exc.may_be_away:
                self._failed(began, exc)
            return exc
        return None

    def _gave_way(self, began: float, problem: errors.SourceError) -> None:
        """Glance gave what the tier did not."""
        self.failovers += 1
        self._failed(began, problem)

    def _failed(self, began: float, error: errors.SourceError) -> None:
        if self.breaker.failed(began, trio.current_time()):
            log.info("the cache tier %s is left alone for a moment: %s", self.tier.url, error)
            self.tier.close()

    def _distrust(self, image_id: str) -> None:
        if not self.is_distrusted:
            self.is_distrusted = True
            log.error(
                "the cache tier %s gave other bytes of image %s than Glance: it is not used any more. Look at how it "
                "keys its cache, empty it, then restart the server",
                self.tier.url, image_id,
            )  # fmt: skip

    def _try_when_due(self, image_id: str, size: int) -> None:
        """Begin the trial that is due, with the image at hand."""
        if not self._outage.is_on and self.breaker.take_trial(trio.current_time()):
            self._nursery.start_soon(self._try, image_id, size)

    async def _try(self, image_id: str, size: int) -> None:
        """Ask the tier for one byte. Ends within the tier's time-outs."""
        error: errors.SourceError | None = None
        try:
            await self.tier.fetch_range(image_id, size=size, offset=0, length=1, piece_bytes=1, deliver=_Header(1))
        except errors.SourceError as exc:
            error = exc
        self.breaker.trial_ended(trio.current_time(), is_back=error is None)
        if error is not None and self.breaker.failures == FAILURES_TO_TELL:
            log.warning("the cache tier %s is not used: %s. Glance is asked instead", self.tier.url, error)
        elif error is None:
            log.info("the cache tier %s is used again", self.tier.url)


class _Header:
    """A receiver that keeps `length` bytes, which come as one piece."""

    def __init__(self, length: int) -> None:
        self.data = b""
        self._length = length

    def __call__(self, offset: int, piece: memoryview) -> bool:
        assert (offset, len(piece)) == (0, self._length)
        self.data = bytes(piece)
        return True


class _Taken:
    """A receiver that knows how far the one behind it has come."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self.bytes = 0
        self.has_enough = False

    def __call__(self, offset: int, piece: memoryview) -> bool:
        if not self._deliver(offset, piece):
            self.has_enough = True
            return False
        self.bytes += len(piece)
        return True
