"""What those who wait need to know of an outage: whether it is on, why, and an event for each change.

One object for all of Glance, made by the service; `sources` says when it begins and ends, the catalog and the
cache wait for that. Owned by the trio loop.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from basefs import errors


class Outage:
    """Off, suspected (a probe is deciding), or on (ordinary requests are refused at once)."""

    def __init__(self) -> None:
        self.error: errors.SourceUnavailableError | None = None
        """Why requests are refused; None while they are not."""
        self.is_suspected = False
        self.decided = 0
        """Suspicions that are settled, one way or the other."""
        self.ended = 0
        """Outages that have ended so far."""
        self.changed = trio.Event()
        """Set, and replaced by a new one, at each change."""
        self._waiting = 0
        self.waited = 0
        """Who waited in the outage that is on, or in the last one."""

    @property
    def is_on(self) -> bool:
        """Whether ordinary requests are refused."""
        return self.error is not None

    def check(self) -> None:
        """Return if a request may be made.

        Raises:
            SourceUnavailableError: an outage is on.
        """
        if self.error is not None:
            raise copy.copy(self.error)

    def suspect(self, *, is_suspected: bool) -> None:
        """A probe is deciding, or has decided."""
        if is_suspected != self.is_suspected:
            self.is_suspected = is_suspected
            self.decided += not is_suspected
            self._change()

    def begin(self, error: errors.SourceUnavailableError) -> None:
        """Refuse requests with (copies of) `error` from now on."""
        if self.error is None:
            self.waited = self._waiting
        self.error = error
        self._change()

    def end(self) -> None:
        """Requests may be made again: everybody who waits is woken in this step."""
        if self.error is not None:
            self.error = None
            self.ended += 1
            self._change()

    @contextmanager
    def waiter(self) -> Iterator[None]:
        """Somebody waits in the body: counted in `waited` once, if an outage is or comes on meanwhile."""
        self._waiting += 1
        self.waited += self.is_on
        try:
            yield
        finally:
            self._waiting -= 1

    async def next_change(self, until: float) -> None:
        """Return at the next change, or at `until` (trio's clock). Cancellation: at any time."""
        with trio.move_on_at(until):
            await self.changed.wait()

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()
