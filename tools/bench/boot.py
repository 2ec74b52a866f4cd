"""Cold boot by trace: how much basefs fetches for the reads of one real boot, from a real Glance on loopback."""

import time
from pathlib import Path

from tools.bench import replay
from tools.bench.report import Report
from tools.guest import build
from tools.mount import BasefsMount
from tools.rig import Rig

MB = 1_000_000
GRANULARITY = 64 * 1024
SETTLE_S = 2.0


def settled_fetched_bytes(mount: BasefsMount) -> tuple[int, int]:
    """Return fetched bytes and requests once readahead that is still under way has ended, SETTLE_S at most."""
    deadline = time.monotonic() + SETTLE_S
    last = -1
    while True:
        status = mount.status()
        if status["fetched_bytes"] == last or time.monotonic() > deadline:
            return status["fetched_bytes"], status["fetch_requests"]
        last = status["fetched_bytes"]
        time.sleep(0.3)


def run(report: Report, scratch: Path) -> None:
    """Replay the trace on the cold image, then on the cached one, and compare the bytes."""
    report.part("boot", "trace of a Debian 12 boot on a cold image, Glance on loopback")
    trace = replay.load_trace()
    distinct = replay.distinct_bytes(trace, GRANULARITY)
    guest = build()
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(guest.disk, "debian12")
        report.note("image in Glance")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            path = mount.path(image_id)
            cold_s = replay.replay(path, trace)
            fetched, requests = settled_fetched_bytes(mount)
            warm_s = replay.replay(path, trace)
            wrong = replay.differences(path, guest.disk, trace)
        sent = sum(one.length for one in rig.requests(f"{image_id}/file") if one.method == "GET")
    report.tell("size of the image", f"{guest.disk.stat().st_size / MB:,.0f} MB")
    report.tell(f"distinct bytes of the trace at {GRANULARITY >> 10} KiB", f"{distinct / MB:.1f} MB")
    report.at_most("bytes fetched", fetched / MB, 2 * distinct / MB, "MB")
    report.tell("bytes sent, as Glance counted them", f"{sent / MB:.1f} MB")
    report.tell("requests for bytes", requests)
    report.tell("trace on a cold image", f"{cold_s:.2f} s")
    report.tell("trace on a cached image", f"{warm_s:.2f} s")
    report.at_most("reads with a wrong byte", wrong, 0)
