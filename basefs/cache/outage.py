"""When to try again after a failure: one gate per image, shared by all its readers.

A failure is not remembered as a result, but it keeps the next try of *any* reader back, so that a
thousand waiting readers make one request per back-off, not a thousand. While all of Glance is away
(`concurrency/outage.py`) every gate is closed, and all open in the step in which that ends; but for images that can
be read from a store behind Glance.
"""

import logging
import math
from collections.abc import Callable

import trio

from basefs import errors
from basefs.concurrency.outage import Outage
from basefs.core.retry import backoff_s

log = logging.getLogger(__name__)

RETRY_BASE_S = 0.25
RETRY_CAP_S = 4.0
RETRY_AFTER_MAX_S = 10.0


class RetryGate:
    """Open while the last try went well; closed until `retry_at` after a failure, and while an outage is on.

    After a failure as an outage makes them it is closed until a probe has decided whether there is one.
    """

    def __init__(
        self,
        image_id: str,
        jitter: Callable[[], float],
        outage: Outage,
        good_at: Callable[[str], float] = lambda _image_id: math.inf,
    ) -> None:
        """`good_at(image_id)`: when the image can be read without Glance, see `SourceChoice.good_at`."""
        self._image_id = image_id
        self._jitter = jitter
        self._outage = outage
        self._good_at = good_at
        self._failures = 0
        self._is_told = False
        self._may_be_outage = False
        self._outages_before = 0
        self._error: errors.BasefsError | None = None
        self.retry_at = -math.inf

    @property
    def error(self) -> errors.BasefsError | None:
        """Why the gate is closed; None when the last try went well."""
        return self._outage.error or self._error

    @property
    def is_open(self) -> bool:
        """Whether a try may be made now."""
        now = trio.current_time()
        if self._is_shut:
            return now >= max(self.retry_at, self._good_at(self._image_id))
        return now >= self.retry_at or self._outage.ended > self._outages_before

    @property
    def _is_shut(self) -> bool:
        """Whether Glance is not to be asked."""
        return self._outage.is_on or (self._outage.is_suspected and self._may_be_outage)

    async def wait(self) -> None:
        """Return when a try may be made; look again then, somebody else's may have failed meanwhile."""
        await trio.lowlevel.checkpoint()
        with self._outage.waiter():
            while not self.is_open:
                at = max(self.retry_at, self._good_at(self._image_id)) if self._is_shut else self.retry_at
                await self._outage.next_change(at if at > trio.current_time() else math.inf)

    def succeeded(self) -> None:
        """A try went well."""
        if self._is_told:
            log.info("image %s: its bytes come again after %d failed tries", self._image_id, self._failures)
        self._failures = 0
        self._is_told = self._may_be_outage = False
        self._error = None
        self.retry_at = -math.inf

    def failed(self, error: errors.BasefsError) -> None:
        """A try failed: keep the next one back, longer each time, or as long as the server asked.

        Tries that were under way together count as one: else eight requests cut by one restart of Glance would
        keep everybody back for the longest time there is. One record when it begins, none for what an outage does.
        """
        if not self.is_open:
            return
        if self._outage.ended > self._outages_before:
            self._failures = 0
        self._outages_before = self._outage.ended
        self._failures += 1
        self._error = error
        # Only a first failure waits for a probe: if that found no outage, the next failures are this image's.
        is_first = self._failures == 1
        self._may_be_outage = is_first and isinstance(error, errors.SourceUnavailableError) and error.may_be_away
        wait_s = backoff_s(self._failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=self._jitter())
        if isinstance(error, errors.SourceUnavailableError) and error.retry_after_s is not None:
            wait_s = max(wait_s, min(error.retry_after_s, RETRY_AFTER_MAX_S))
        self.retry_at = trio.current_time() + wait_s
        if self._is_told or self._may_be_outage:
            log.debug("image %s: %s", self._image_id, error)
        else:
            self._is_told = True
            log.warning("image %s: %s", self._image_id, error)
