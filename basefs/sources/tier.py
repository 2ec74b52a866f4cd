"""An `ImageSource` over a cache tier with Glance behind it: what the tier does not give comes from Glance in that call.

The tier rests by itself: what it does is no outage, and what Glance does is not its fault. So an answer that is no
transport error counts against it only once Glance gave the bytes that it did not.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

import trio

from basefs import errors
from basefs.concurrency.outage import Outage
from basefs.core.safe_text import safe_text
from basefs.core.source_rest import SourceRest
from basefs.core.store_location import host_of
from basefs.sources.base import Deliver, Digest, ImageSource, ProbeResult
from basefs.sources.delivery import Delivery
from basefs.sources.tier_http import CacheTier

log = logging.getLogger(__name__)

PROOF_BYTES = 4096
"""Asked of Glance itself before the tier is believed about an image: that ranges of it are honoured (a slicing cache
hides a 206 that is too long, and with it wrong bytes), and that the tier's first bytes are this image's."""
REST_BASE_S = 1.0
REST_CAP_S = 30.0
"""Longest rest: a tier that is back is used again within that, and 1,000 nodes try it 33 to 66 times a second."""
FAILURES_TO_TELL = 2
"""The failure and one try, before it is worth a record."""


class CacheTierSource:
    """`ImageSource`. Ranges come from `tier`, streams and all else from `glance`.

    `nursery` is the service's, for tries of a tier that rests: no reader waits for one. Owned by the loop.
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
        self.tier = tier
        self.failovers = 0
        """Ranges that the tier was asked for, and Glance gave."""
        self.is_distrusted = False
        """It gave other bytes than Glance: never asked again by this server."""
        self._glance = glance
        self._nursery = nursery
        self._outage = outage
        self._jitter = jitter
        self._rest = SourceRest(base_s=REST_BASE_S, cap_s=REST_CAP_S)
        self._error: str | None = None
        """Why it rests."""
        self._is_tried = False
        self._passed_by: set[str] = set()

    @property
    def requests(self) -> int:
        """Those to the tier and those to Glance."""
        return self.tier.requests + self._glance.requests

    @property
    def received_bytes(self) -> int:
        """What came from both."""
        return self.tier.received_bytes + self._glance.received_bytes

    @property
    def is_used(self) -> bool:
        """Whether nothing speaks against the tier."""
        return self._rest.is_good and not self.is_distrusted

    def report(self) -> dict[str, Any]:
        """How it stands, as `SourceChoice.stores_report` tells of a store."""
        state, error = "answers" if self.tier.requests else "unused", self._error
        if self.is_distrusted:
            state, error = "distrusted", "it gave other bytes than Glance; see the log"
        elif not self._rest.is_good:
            state = "resting"
        return {"source": "cache tier", "endpoint": host_of(self.tier.url), "state": state, "error": error}

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        """See `ImageSource.probe`. One small range of Glance itself, the header from the tier."""
        length = min(header_bytes, size)
        problem: errors.SourceError | None = None
        if length > PROOF_BYTES and self._is_asked(image_id):
            proof = await self._glance.probe(image_id, size=size, header_bytes=PROOF_BYTES)
            if proof.kind == "ranged":
                header = bytearray()

                def keep(_offset: int, piece: memoryview) -> bool:
                    header.extend(piece)
                    return True

                delivery = Delivery(0, length, keep)
                problem = await self._ask(image_id, size, delivery, length)
                if problem is None and header.startswith(proof.header):
                    return ProbeResult(kind="ranged", reason=proof.reason, header=bytes(header))
                if problem is None:
                    self._distrust(image_id)
        result = await self._glance.probe(image_id, size=size, header_bytes=header_bytes)
        if problem is not None:
            self._gave_way(problem)
        return result

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_range`. What the tier began Glance completes."""
        self._try_when_due(image_id, size)
        if not self._is_asked(image_id):
            await self._glance.fetch_range(
                image_id, size=size, offset=offset, length=length, piece_bytes=piece_bytes, deliver=deliver
            )
            return
        delivery = Delivery(offset, length, deliver)
        problem = await self._ask(image_id, size, delivery, piece_bytes)
        if problem is None or delivery.is_over:
            return
        await self._glance.fetch_range(
            image_id, size=size, offset=delivery.at, length=delivery.left, piece_bytes=piece_bytes, deliver=deliver
        )
        self._gave_way(problem)

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_stream`. By Glance: an image that it streams is in no cache of ranges."""
        await self._glance.fetch_stream(image_id, size=size, piece_bytes=piece_bytes, digest=digest, deliver=deliver)

    def pass_by(self, image_id: str) -> None:
        """Bytes of the image turned out wrong, maybe by the tier: it is read from Glance itself from now on."""
        self._passed_by.add(image_id)

    # --- whether the tier is asked ---------------------------------------------------------------------

    def _is_asked(self, image_id: str) -> bool:
        # In an outage the tier could not ask Glance whether we may have the bytes.
        return self.is_used and not self._outage.is_on and image_id not in self._passed_by

    async def _ask(self, image_id: str, size: int, delivery: Delivery, piece_bytes: int) -> errors.SourceError | None:
        """Have the tier deliver; why it did not give all, None if it did."""
        try:
            await self.tier.fetch_range(
                image_id,
                size=size,
                offset=delivery.at,
                length=delivery.left,
                piece_bytes=piece_bytes,
                deliver=delivery.turn(lambda: None),
            )
        except errors.SourceError as exc:
            log.debug("%s; Glance is asked", exc)
            if isinstance(exc, errors.SourceUnavailableError) and exc.may_be_away:
                self._failed(exc)
            return exc
        finally:
            delivery.leave()
        return None

    def _gave_way(self, problem: errors.SourceError) -> None:
        """Glance gave what the tier did not."""
        self.failovers += 1
        self._failed(problem)

    def _failed(self, error: errors.SourceError) -> None:
        if self._rest.is_good:
            log.info("the cache tier %s is left alone for a moment: %s", self.tier.url, error)
            self.tier.close()  # what is pooled may lead to a host that is no more
            self._rests(error)

    def _rests(self, error: errors.SourceError) -> None:
        self._rest.failed(trio.current_time(), jitter=self._jitter())
        self._error = safe_text(str(error))

    def _distrust(self, image_id: str) -> None:
        if not self.is_distrusted:
            self.is_distrusted = True
            log.error(
                "the cache tier %s gave other bytes of image %s than Glance: it is not used any more. Look at how it "
                "keys its cache, empty it, then restart the server",
                self.tier.url, image_id,
            )  # fmt: skip

    def _try_when_due(self, image_id: str, size: int) -> None:
        """Begin the try that is due, with the image at hand."""
        if self._rest.may_try(trio.current_time()) and not (self._is_tried or self._outage.is_on):
            self._is_tried = True
            self._nursery.start_soon(self._try, image_id, size)

    async def _try(self, image_id: str, size: int) -> None:
        """Ask the tier for one byte. Ends within the tier's time-outs."""
        try:
            await self.tier.fetch_range(
                image_id, size=size, offset=0, length=1, piece_bytes=1, deliver=lambda _offset, _piece: True
            )
        except errors.SourceError as exc:
            self._rests(exc)
            if self._rest.failures == FAILURES_TO_TELL:
                log.warning("the cache tier %s is not used: %s. Glance is asked instead", self.tier.url, exc)
        else:
            self._rest.answered()
            self._error = None
            log.info("the cache tier %s is used again", self.tier.url)
        finally:
            self._is_tried = False
