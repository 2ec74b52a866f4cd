"""Cold boot by trace, without a boot trace and with the one that it left, over four links."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError

from tools.bench import replay
from tools.bench.boot import GRANULARITY, MB, settled_fetched_bytes
from tools.bench.peers.link import GBIT, SLOW, Link
from tools.bench.peers.link_model import LinkSpec
from tools.bench.report import Report
from tools.guest import build
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

RUNS = 3
FAR = LinkSpec(name="10 ms", round_trip_s=0.010, bits_s=None)
PATIENCE_S = 20.0

Figures = tuple[float, int, int]
"""Seconds of the replayed reads, bytes fetched, requests."""


def run(report: Report, scratch: Path) -> None:
    """Replay the reads of the recorded boot cold, by turns without and with a trace, over both links."""
    report.part("trace", f"reads of a Debian 12 boot on a cold image, {RUNS} runs by turns, medians")
    trace = replay.load_trace()
    distinct = replay.distinct_bytes(trace, GRANULARITY)
    report.tell(f"distinct bytes of the boot at {GRANULARITY >> 10} KiB", f"{distinct / MB:.1f} MB")
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(build().disk, "debian12")
        with BasefsMount(scratch / "near", rig.conf_lines()) as mount:
            _compare(report, mount, image_id, trace, "loopback", bound=1.0)
        for number, (spec, bound) in enumerate([(GBIT, 1.0), (SLOW, 0.7), (FAR, 0.5)]):
            with Link(rig.glance_url, spec) as link:
                conf = rig.conf_lines().replace(rig.glance_url, link.url)
                with BasefsMount(scratch / f"far{number}", conf) as mount:
                    with_trace = _compare(report, mount, image_id, trace, spec.name, bound=bound)
                    wrong = replay.differences(mount.path(image_id), build().disk, trace)
    report.at_most("bytes fetched with a trace / distinct bytes", with_trace[1] / distinct, 1.1)
    report.at_most("requests with a trace (why not 12: docs/DESIGN.md)", with_trace[2], 120)
    report.at_most("reads with a wrong byte", wrong, 0)


def _compare(
    report: Report, mount: BasefsMount, image_id: str, trace: replay.Trace, link: str, *, bound: float
) -> Figures:
    """Tell the figures of one link; those with a trace."""
    file = mount.cache_dir / "traces" / f"{base_name(image_id)}.json"
    mount.path(image_id).stat()  # the checks of the first look-up are no part of a boot
    without: list[Figures] = []
    known: list[Figures] = []
    for _ in range(RUNS):
        file.unlink(missing_ok=True)
        without.append(_cold(mount, image_id, trace))
        _until(file.exists)
        known.append(_cold(mount, image_id, trace))
    medians = [_median(without), _median(known)]
    for name, (seconds, fetched, requests) in zip(("without", "with"), medians, strict=True):
        report.tell(f"{link}: {name} a trace", f"{seconds:.2f} s, {fetched / MB:.1f} MB, {requests:.0f} requests")
    report.at_most(f"{link}: seconds with / without", medians[1][0] / medians[0][0], bound)
    planner = mount.status()["planner"]
    report.tell(f"{link}: planner", ", ".join(f"{name} {value}" for name, value in planner.items()))
    return medians[1]


def _median(runs: list[Figures]) -> Figures:
    seconds, fetched, requests = zip(*runs, strict=True)
    return statistics.median(seconds), statistics.median(fetched), statistics.median(requests)


def _cold(mount: BasefsMount, image_id: str, trace: replay.Trace) -> Figures:
    _until(lambda: _is_evicted(mount, image_id))
    fetched, requests = settled_fetched_bytes(mount)
    seconds = replay.replay(mount.path(image_id), trace)
    fetched_after, requests_after = settled_fetched_bytes(mount)
    return seconds, fetched_after - fetched, requests_after - requests


def _is_evicted(mount: BasefsMount, image_id: str) -> bool:
    """Whether the bytes are dropped; refused as long as the last close is on its way."""
    try:
        mount.cli("image", "evict", image_id)
    except CalledProcessError:
        return False
    return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come within {PATIENCE_S:.0f} s")
        time.sleep(0.05)
