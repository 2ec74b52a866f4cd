"""What one fetch has brought so far, whichever source it came from.

Invariants: bytes are delivered in order, each once; what a source delivers after it was left goes nowhere. Pieces come
in the source's thread, `at` is read in the loop when no source delivers.
"""

import threading
from collections.abc import Callable

import trio

from basefs import errors
from basefs.sources.base import Deliver


class Delivery:
    """`[at, end)` is still to come; `turn` gives the next source its `deliver`."""

    def __init__(self, offset: int, length: int, deliver: Deliver) -> None:
        self.at = offset
        self.end = offset + length
        self.is_ended = False
        """The receiver wants no more."""
        self._deliver = deliver
        self._turn = 0
        self._lock = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self.end - self.at

    @property
    def is_over(self) -> bool:
        """Whether nothing is to come any more."""
        return self.is_ended or not self.left

    def turn(self, alive: Callable[[], None]) -> Deliver:
        """What the next source delivers by, from `at` on; `alive()` runs in the loop after pieces of it."""
        with self._lock:
            self._turn += 1
            turn = self._turn

        def take(offset: int, piece: memoryview) -> bool:
            with self._lock:
                if turn != self._turn:
                    return False
                if offset != self.at or len(piece) > self.left:
                    raise errors.SourceCorruptError(f"bytes from {offset} on came where {self.at} was next")
                goes_on = self._deliver(offset, piece)
                self.at += len(piece)
                self.is_ended = not goes_on
            self._token.run_sync_soon(alive, idempotent=True)
            return goes_on

        return take

    def leave(self) -> None:
        """The source whose turn it was is left."""
        with self._lock:
            self._turn += 1
