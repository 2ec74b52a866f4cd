"""The planner's rule beside what would be best, on a grid of links: a model of the recorded boot, without a mount.

The model: reads one after the other, at once or after the arrival of their last chunk; a request reaches Glance after
half a round trip, is answered by one processor (GLANCE_S and GLANCE_S_MIB), its body takes its place on the link.
What it leaves out: TCP's slow start, fair shares of the link, and the guest's own work.
"""

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from basefs.core.link_estimate import KIB, UNMEASURED, FetchParameters, parameters_for
from basefs.core.readahead import MISSING, ReadaheadPolicy, Window, window_ahead, window_for_miss
from basefs.core.trace_plan import TracePlan, missing_around, missing_runs, requests_for
from tools.bench import replay
from tools.bench.boot import GRANULARITY, MB
from tools.bench.peers.link_model import Direction, LinkSpec
from tools.bench.report import Report

GLANCE_S, GLANCE_S_MIB = 0.006, 0.00035
HIT_S = 0.0003
HEADER_CHUNKS = 16
SLOTS = 8
REQUEST_BYTES_MAX = 8 << 20
LINKS = tuple(
    LinkSpec(name=f"{round_trip_ms:g} ms, {mbits:g} Mbit/s", round_trip_s=round_trip_ms / 1000, bits_s=mbits * 1e6)
    for round_trip_ms, mbits in [(0.3, 10000), (0.3, 1000), (10, 1000), (100, 1000), (10, 200), (20, 50), (1, 50)]
)
WINDOWS = (64, 128, 256, 448)
GAPS = (0, 64, 128)
IN_FLIGHT = (1, 2, 3, 4, 6)
ON_WAY = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One modelled boot."""

    seconds: float
    fetched_bytes: int
    requests: int


class Model:
    """One boot over `link`, with requests made by `parameters`; `units` of a trace are replayed beside it."""

    def __init__(self, link: LinkSpec, parameters: FetchParameters, units: Iterable[int] = ()) -> None:
        self._trace = replay.load_trace()
        size = max(offset + length for offset, length in self._trace) + (1 << 20)
        self._states = bytearray(-(-size // GRANULARITY))
        self._arrivals = [0.0] * len(self._states)
        self._states[:HEADER_CHUNKS] = bytes([ON_WAY]) * HEADER_CHUNKS
        self._link, self._down = link, Direction(delay_s=link.round_trip_s / 2, bits_s=link.bits_s)
        self._glance_free_at = 0.0
        self._policy = ReadaheadPolicy.for_chunks(GRANULARITY, REQUEST_BYTES_MAX, parameters)
        self._markers: dict[int, int] = {}
        planned = requests_for(units, size=size, chunk_bytes=GRANULARITY, gap_bytes=parameters.gap_bytes)
        self._plan = TracePlan(planned)
        self._workers = min(parameters.in_flight, SLOTS - SLOTS // 4) if planned else 0
        self._requests = self._fetched = 0

    def run(self) -> Outcome:
        """The whole boot."""
        order = itertools.count()
        events = [(0.0, next(order), -1) for _ in range(self._workers)]  # -1: a worker of the replay is free
        events.append((0.0, next(order), 0))  # else a read begins
        seconds = 0.0
        while events:
            now, _, read = heapq.heappop(events)
            if read == len(self._trace):
                seconds = now
            elif read >= 0:
                heapq.heappush(events, (self._read(now, *self._trace[read]) + HIT_S, next(order), read + 1))
            elif (request := self._plan.next()) is not None:
                end = now
                for chunks in missing_runs(self._states, request):
                    end = self._request(end, Window(chunks, None))
                heapq.heappush(events, (end, next(order), -1))
        return Outcome(seconds, self._fetched, self._requests)

    def _request(self, now: float, window: Window) -> float:
        """When its last byte is here."""
        length = len(window.chunks) * GRANULARITY
        self._requests += 1
        self._fetched += length
        if window.marker is not None:
            self._markers[window.marker] = len(window.chunks)
        begin = max(now + self._link.round_trip_s / 2, self._glance_free_at)
        self._glance_free_at = begin + GLANCE_S + length / (1 << 20) * GLANCE_S_MIB
        for chunk in window.chunks:
            self._states[chunk] = ON_WAY
            self._arrivals[chunk] = self._down.arrival(self._glance_free_at, GRANULARITY)
        return self._arrivals[window.chunks[-1]]

    def _read(self, now: float, offset: int, length: int) -> float:
        """When a read that begins now is answered."""
        span = range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1)
        for marker in [index for index in self._markers if index in span]:
            ahead = window_ahead(self._states, marker, self._markers.pop(marker), self._policy)
            if ahead is not None:
                self._request(now, ahead)
        for index in span:
            if self._states[index] == MISSING:
                self._request(now, self._window(index, span))
        return max(now, *(self._arrivals[index] for index in span))

    def _window(self, index: int, span: range) -> Window:
        planned = self._plan.around(index)
        if planned is not None:
            return Window(missing_around(self._states, index, planned), None)
        wanted = len(missing_around(self._states, index, range(index, span.stop)))
        return window_for_miss(self._states, index, wanted, self._policy)


def rule(link: LinkSpec) -> FetchParameters:
    """What the planner makes of this link once it has measured it."""
    assert link.bits_s is not None
    return parameters_for((link.round_trip_s + GLANCE_S) * link.bits_s / 8)


def run(report: Report, _scratch: Path) -> None:
    """Seconds and bytes of the boot over each link: unmeasured, by the rule, and the best of the grid."""
    report.part("planner", "a model of the recorded boot: unmeasured, by the rule, best of the grid")
    units = list(dict.fromkeys(unit for offset, length in replay.load_trace() for unit in _units(offset, length)))
    for link in LINKS:
        cold = [Model(link, parameters).run() for parameters in (UNMEASURED, rule(link))]
        grid = [Model(link, _window_of(window)).run() for window in WINDOWS]
        _tell(report, f"{link.name}: no trace", cold, grid)
        known = [Model(link, parameters, units).run() for parameters in (UNMEASURED, rule(link))]
        grid = [
            Model(link, _replay_of(gap, in_flight), units).run()
            for gap, in_flight in itertools.product(GAPS, IN_FLIGHT)
        ]
        _tell(report, f"{link.name}: trace", known, grid)


def _units(offset: int, length: int) -> range:
    return range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1)


def _window_of(kib: int) -> FetchParameters:
    return FetchParameters(window_bytes=kib * KIB, miss_bytes_max=min(2 * kib, 1024) * KIB, gap_bytes=0, in_flight=1)


def _replay_of(gap_kib: int, in_flight: int) -> FetchParameters:
    return FetchParameters(
        window_bytes=UNMEASURED.window_bytes,
        miss_bytes_max=UNMEASURED.miss_bytes_max,
        gap_bytes=gap_kib * KIB,
        in_flight=in_flight,
    )


def _tell(report: Report, what: str, ours: list[Outcome], grid: list[Outcome]) -> None:
    best = min(grid, key=lambda outcome: outcome.seconds)
    shown = [f"{one.seconds:.2f} s {one.fetched_bytes / MB:.0f} MB {one.requests}" for one in (*ours, best)]
    report.tell(what, " | ".join(shown))
    report.at_most(f"{what}: seconds / best", ours[1].seconds / best.seconds, 1.15)
