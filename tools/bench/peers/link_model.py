"""What a link does to bytes, as arithmetic: no sockets, no clock of its own."""

from dataclasses import dataclass

PIECE_S = 0.002
PIECE_BYTES_MIN = 2048
PIECE_BYTES_MAX = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """A link between a node and the image service.

    `round_trip_s` is shared evenly by both directions; `bits_s` is the rate of each direction, None for no limit.
    """

    name: str
    round_trip_s: float
    bits_s: float | None

    @property
    def piece_bytes(self) -> int:
        """The most that is sent as one piece: 2 ms of the link, so that nobody waits long behind somebody's piece."""
        if self.bits_s is None:
            return PIECE_BYTES_MAX
        return max(PIECE_BYTES_MIN, min(PIECE_BYTES_MAX, int(self.bits_s / 8 * PIECE_S)))


class Direction:
    """One direction of a link, shared by all connections: bytes go one after the other, then fly for a while."""

    def __init__(self, *, delay_s: float, bits_s: float | None) -> None:
        self._delay_s = delay_s
        self._seconds_per_byte = 8 / bits_s if bits_s else 0.0
        self._free_at = 0.0

    def arrival(self, now: float, size: int) -> float:
        """When the last of `size` bytes arrives that are handed over at `now`; they take their place on the link."""
        self._free_at = max(now, self._free_at) + size * self._seconds_per_byte
        return self._free_at + self._delay_s

    def backlog_s(self, now: float) -> float:
        """How long what was handed over still needs to get onto the link; 0 when it is idle."""
        return max(0.0, self._free_at - now)
