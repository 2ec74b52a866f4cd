"""Two bodies of the same bytes on their way: which of them stores which chunk. For threads.

Invariants: a chunk is stored by one of them at most, that which came to it first; from the moment at which there are
two, the one whose piece comes first is the winner, and the other ends at its next piece. A winner that fails leaves
the rest to the other.
"""

import threading
from collections.abc import Callable

from basefs.core.byte_ranges import runs


class ChunkRace:
    """The chunks of one flight. Runners are numbers; the first one is 0."""

    def __init__(self, chunks: range) -> None:
        self._chunks = chunks
        self._lock = threading.Lock()
        self._is_taken = bytearray(len(chunks))
        self._has_two = False
        self.winner: int | None = None
        self.beaten: set[int] = set()
        """Who was told to end."""
        self.pieces = 0
        """That came so far, whoever brought them."""

    def begin_second(self) -> None:
        """From now on there are two."""
        self._has_two = True

    def take(self, runner: int, first: int, stop: int) -> list[range] | None:
        """The chunks of [first, stop), a piece of `runner`'s, that it is to store now; None: it shall end."""
        with self._lock:
            if self._has_two and self.winner is None:
                self.winner = runner
            if self.winner not in (None, runner):
                self.beaten.add(runner)
                return None
            self.pieces += 1
            at = self._chunks.start
            free = [index for index in range(first, stop) if not self._is_taken[index - at]]
            for index in free:
                self._is_taken[index - at] = 1
            return list(runs(free))

    def failed(self, runner: int) -> None:
        """It brings no more."""
        with self._lock:
            if self.winner == runner:
                self.winner = None

    def claims_of(self, runner: int) -> Callable[[int, int], list[range] | None]:
        """`take` of one runner."""
        return lambda first, stop: self.take(runner, first, stop)
