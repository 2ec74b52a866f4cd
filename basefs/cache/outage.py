"""When to try again after a failure: one gate per image, shared by all its readers.

A failure is not remembered as a result, but it keeps the next try of *any* reader back, so that a
thousand waiting readers make one request per back-off, not a thousand. One record when it begins.
"""

import logging
import math
from collections.abc import Callable

import trio

from basefs import errors
from basefs.core.retry import backoff_s

log = logging.getLogger(__name__)

RETRY_BASE_S = 0.25
RETRY_CAP_S = 10.0


class RetryGate:
    """Open while the last try went well; closed until `retry_at` after a failure."""

    def __init__(self, image_id: str, jitter: Callable[[], float]) -> None:
        self._image_id = image_id
        self._jitter = jitter
        self._failures = 0
        self.error: errors.BasefsError | None = None
        """Why the last try failed; None after one that went well."""
        self.retry_at = -math.inf

    @property
    def is_open(self) -> bool:
        """Whether a try may be made now."""
        return trio.current_time() >= self.retry_at

    async def wait(self) -> None:
        """Return when a try may be made; look again then, somebody else's may have failed meanwhile."""
        await trio.sleep_until(self.retry_at)

    def succeeded(self) -> None:
        """A try went well."""
        if self._failures:
            log.info("image %s: its bytes come again after %d failed tries", self._image_id, self._failures)
        self._failures = 0
        self.error = None
        self.retry_at = -math.inf

    def failed(self, error: errors.BasefsError) -> None:
        """A try failed: keep the next one back, longer each time, or as long as the server asked.

        Tries that were under way together count as one: else eight requests cut by one restart of Glance would
        keep everybody back for the longest time there is.
        """
        if not self.is_open:
            return
        self._failures += 1
        self.error = error
        wait_s = backoff_s(self._failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=self._jitter())
        if isinstance(error, errors.SourceUnavailableError) and error.retry_after_s is not None:
            wait_s = max(wait_s, min(error.retry_after_s, RETRY_CAP_S))
        self.retry_at = trio.current_time() + wait_s
        if self._failures == 1:
            log.warning("image %s: %s", self._image_id, error)
