"""How many readers wait for bytes from Glance, and the moment in which none does: background work begins only then."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class WaitingReaders:
    """Readers of all images that wait for a transfer. Owned by the trio loop.

    Who waits for Glance to come back, or for a try that is put off, is not counted: nothing is in its way.
    """

    def __init__(self) -> None:
        self.count = 0
        self._none = trio.Event()
        self._none.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A reader waits while the body runs."""
        if not self.count:
            self._none = trio.Event()
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._none.set()

    async def wait_none(self) -> None:
        """Return when no reader waits; whoever awaits something after that looks at `count` again."""
        while self.count:
            await self._none.wait()
