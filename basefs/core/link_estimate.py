"""How long requests take to begin, how fast bytes come, and how to ask because of that. Pure: times are handed in.

What a request costs is the time until its first byte: the round trip, and Glance's work, which is 6 ms on a loopback.
In that time the link brings `first_byte_s * bytes_s` bytes, the *pipe*: so many more bytes in a request cost what one
more request does. Everything follows from it:

- a miss brings a pipe, a reader who goes on twice that;
- a replay has as many requests of 128 KiB in flight as fill it, and four more: most planned ones are small;
- it fetches along what costs less than a request does of which so many of 256 KiB fill the pipe, and three more.

Bounds: 448 KiB are the widest window for a miss that stays below 2 x the bytes that a boot reads, 128 KiB the widest
gap below 1.1 x (`trace_plan`), and a miss of less than 128 KiB is quicker on no link. All by the model of
`tools/bench/planner.py` and the recorded boot; its grid stands in docs/DESIGN.md.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
WINDOW_BYTES_MIN, WINDOW_BYTES_MAX = 128 * KIB, 448 * KIB
WINDOW_STEP_BYTES = 64 * KIB
MISS_BYTES_MAX = MIB
GAP_BYTES_MAX = 128 * KIB
IN_FLIGHT_BYTES = 128 * KIB
IN_FLIGHT_MIN, IN_FLIGHT_MAX = 4, 32
SAMPLES_MAX = 32
SAMPLES_MIN = 4
"""Before so many of each kind nothing is concluded: the first request of a connection pays for the connection."""
BODY_BYTES_MIN = 128 * KIB
"""A shorter rest of a body says nothing of the rate: it was in the socket's buffer when its begin was read."""
BYTES_S_MAX = 2.5e9
CHANGE_MIN = 1.25
"""A pipe that is within this factor of the one that the parameters were made for changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchParameters:
    """How requests are made.

    `window_bytes`: the least that a miss brings; `miss_bytes_max`: the most that one brings beyond what was asked;
    `gap_bytes`: what a replay fetches along; `in_flight`: requests of a replay at a time, if there are slots for them.
    """

    window_bytes: int
    miss_bytes_max: int
    gap_bytes: int
    in_flight: int


UNMEASURED = FetchParameters(window_bytes=256 * KIB, miss_bytes_max=MIB, gap_bytes=GAP_BYTES_MAX, in_flight=6)
"""Right for 1 Gbit/s and up to 10 ms, and at no other link more than 1.3 x as slow as what is right there."""


def parameters_for(pipe_bytes: float) -> FetchParameters:
    """The parameters for a link and source that hold so many bytes, >= 0. No larger pipe makes any of them smaller."""
    window = int(pipe_bytes / WINDOW_STEP_BYTES + 0.5) * WINDOW_STEP_BYTES
    window = min(max(window, WINDOW_BYTES_MIN), WINDOW_BYTES_MAX)
    return FetchParameters(
        window_bytes=window,
        miss_bytes_max=min(2 * window, MISS_BYTES_MAX),
        gap_bytes=min(int(pipe_bytes / (3 + pipe_bytes / (256 * KIB))), GAP_BYTES_MAX),
        in_flight=min(IN_FLIGHT_MIN + int(pipe_bytes / IN_FLIGHT_BYTES), IN_FLIGHT_MAX),
    )


class LinkEstimate:
    """What the last requests tell.

    `first_byte_s` and `bytes_s` are None until there were SAMPLES_MIN of them. The first is a low quantile: to wait in
    a queue of our own is no property of the link. The second is a high one by bytes: to wait for the source's disk, or
    for us, is none either.
    """

    def __init__(self) -> None:
        self.first_byte_s: float | None = None
        self.bytes_s: float | None = None
        self.parameters = UNMEASURED
        self._pieces: deque[tuple[float, int]] = deque(maxlen=SAMPLES_MAX)
        self._bodies: deque[tuple[float, int]] = deque(maxlen=SAMPLES_MAX)
        self._pipe_bytes: float | None = None

    def began(self, first_piece_s: float, *, piece_bytes: int, was_alone: bool) -> None:
        """The first `piece_bytes` > 0 of a request were down after so many seconds, >= 0.

        One that was not alone waited for others, too: it counts only if it was quicker than what is known.
        """
        known = self.first_byte_s
        if was_alone or (known is not None and self._first_byte_s(first_piece_s, piece_bytes) < known):
            self._pieces.append((first_piece_s, piece_bytes))
            self._conclude()

    def _first_byte_s(self, first_piece_s: float, piece_bytes: int) -> float:
        """Without what the piece itself takes; a rate that is known badly must not make nothing of a round trip."""
        if self.bytes_s is None:
            return first_piece_s
        return max(first_piece_s - piece_bytes / self.bytes_s, first_piece_s / 4)

    def came(self, length: int, bytes_s: float) -> None:
        """`length` > 0 bytes of a body came after its first piece, while all bodies together came at `bytes_s` > 0."""
        if length >= BODY_BYTES_MIN:
            self._bodies.append((min(bytes_s, BYTES_S_MAX), length))
            self._conclude()

    def _conclude(self) -> None:
        if len(self._bodies) >= SAMPLES_MIN:
            self.bytes_s = _upper_quarter(self._bodies)
        if len(self._pieces) >= SAMPLES_MIN:
            self.first_byte_s = sorted(self._first_byte_s(*piece) for piece in self._pieces)[len(self._pieces) // 4]
        if self.first_byte_s is None or self.bytes_s is None:
            return
        pipe, used = self.first_byte_s * self.bytes_s, self._pipe_bytes
        if used is None or not used / CHANGE_MIN <= pipe <= used * CHANGE_MIN:
            self._pipe_bytes = pipe
            self.parameters = parameters_for(pipe)


def _upper_quarter(weighed: Iterable[tuple[float, int]]) -> float:
    """The value above which, or at which, a quarter of the weight is."""
    ordered = sorted(weighed, reverse=True)
    left = sum(weight for _, weight in ordered) / 4
    for value, weight in ordered:
        left -= weight
        if left <= 0:
            return value
    raise ValueError("nothing was weighed")
