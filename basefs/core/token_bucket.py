"""How fast background work may move bytes. Pure: time is handed in."""

import math


class TokenBucket:
    """At most `bytes_s` (> 0) bytes a second; what was not used is not saved up.

    Invariant: what is begun within any `w` seconds is at most `w * bytes_s` bytes and one piece of work.
    """

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s = bytes_s
        self._free_at = -math.inf

    def take(self, length: int, now: float) -> float:
        """When work of `length` bytes may begin, not before `now`; it is charged at once."""
        begin = max(now, self._free_at)
        self._free_at = begin + length / self._bytes_s
        return begin

    def correct(self, length: int) -> None:
        """Work that has begun moved `length` bytes more than it took; negative: fewer."""
        self._free_at += length / self._bytes_s
