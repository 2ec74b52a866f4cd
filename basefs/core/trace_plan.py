"""What to fetch for a boot trace: its units as few requests, in the order in which a boot needs them; pure.

Measured on the recorded Debian boot (655 units, 42.9 MB), as the fewest requests that bring all of them, by the gap
that is fetched along; the seconds are of the replay of its 865 reads over 10 ms round trip and 1 Gbit/s, as a model of
six requests in flight tells them:

    gap         requests    bytes / units read    replay, s
    none             134          1.00              0.85
    128 KiB          106          1.06              0.69   <- this
    192 KiB           98          1.10              0.69
    512 KiB           86          1.21              0.64
    1 MiB             69          1.56              0.69
    12 MiB            11          6.02

Fewer requests cost bytes: 12 of them bring 5.8 x what is read at least, whatever is coalesced with what. With the MiB
of the header that the checks bring, 128 KiB stay below 1.1 x; they are the widest gap at any link (`link_estimate`).
"""

from collections.abc import Iterable

from basefs.core.boot_trace import UNIT_BYTES

REQUEST_BYTES_MAX = 4 << 20
"""As hydration's (`cache/pace.py`). Smaller ones are more: 110 of 2 MiB instead of 107."""
STRAYED_MAX = 64
"""Chunks outside the trace that readers come to in a row, 4 MiB at 64 KiB, before the rest of it is not fetched: half
of what is fetched ahead at a time, and more than any one file that a boot reads another time."""


def requests_for(units: Iterable[int], *, size: int, chunk_bytes: int, gap_bytes: int) -> list[range]:
    """The chunks to ask for, one range a request: every unit is in one of them, no chunk in two.

    Neighbours are one request, also over a gap of up to `gap_bytes`, as long as it is at most REQUEST_BYTES_MAX (or one
    chunk). Requests are in the order in which the first unit of each comes.
    """
    order: dict[int, int] = {}
    for unit in units:
        begin, end = unit * UNIT_BYTES, min((unit + 1) * UNIT_BYTES, size)
        for chunk in range(begin // chunk_bytes, -(-end // chunk_bytes)):
            order.setdefault(chunk, len(order))
    gap, length_max = gap_bytes // chunk_bytes, max(1, REQUEST_BYTES_MAX // chunk_bytes)
    requests: list[tuple[int, range]] = []
    for chunk in sorted(order):
        if requests:
            at, last = requests[-1]
            if chunk - last.stop <= gap and chunk + 1 - last.start <= length_max:
                requests[-1] = (min(at, order[chunk]), range(last.start, chunk + 1))
                continue
        requests.append((order[chunk], range(chunk, chunk + 1)))
    return [chunks for _, chunks in sorted(requests, key=lambda found: found[0])]


class TracePlan:
    """Requests that were not made yet, in order; none once readers have left the trace."""

    def __init__(self, requests: Iterable[range] = ()) -> None:
        self._left = list(requests)[::-1]
        self._chunks = frozenset(chunk for request in self._left for chunk in request)
        self._strayed = 0

    def __len__(self) -> int:
        """Requests that are left."""
        return len(self._left)

    def next(self) -> range | None:
        """The next request, which is left no more; None when there is none."""
        return self._left.pop() if self._left else None

    def around(self, index: int) -> range | None:
        """The request that has chunk `index` in it; it stays until `next` comes to it."""
        return next((chunks for chunks in self._left if index in chunks), None)

    def saw(self, chunks: Iterable[int]) -> None:
        """Readers came to `chunks`. STRAYED_MAX in a row that the trace does not have: it is of another boot."""
        if not self._left:
            return
        for chunk in chunks:
            self._strayed = 0 if chunk in self._chunks else self._strayed + 1
        if self._strayed >= STRAYED_MAX:
            self.clear()

    def clear(self) -> None:
        """Nothing more is to be fetched ahead."""
        self._left.clear()
        self._chunks = frozenset()


def missing_around(states: bytes | bytearray, index: int, chunks: range) -> range:
    """The run of zero bytes in `states[chunks]` around `index`, which is one of them."""
    before = states[chunks.start : index]
    after = states[index : chunks.stop]
    return range(index - (len(before) - len(before.rstrip(b"\0"))), index + len(after) - len(after.lstrip(b"\0")))


def missing_runs(states: bytes | bytearray, chunks: range) -> list[range]:
    """The runs of zero bytes in `states[chunks]`, ascending."""
    found = []
    start = states.find(0, chunks.start, chunks.stop)
    while start >= 0:
        run = missing_around(states, start, chunks)
        found.append(run)
        start = states.find(0, run.stop, chunks.stop)
    return found
