"""python -m tools.bench.peers: measure, print one table and the bounds, keep JSON and plot (`make bench-peers`).

Exit code 1: a bound was missed. With --show nothing is measured: what was kept is shown and
plotted again.
"""

import argparse
import datetime
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.bench import replay
from tools.bench.boot import GRANULARITY
from tools.bench.peers import bounds, machine, plot, table, work_cached, work_guest, work_trace
from tools.bench.peers.link import GBIT, GBIT_10_MS, LINKS, LOOPBACK, SLOW
from tools.bench.peers.peers import PEERS, Basefs, BasefsPacked, BasefsTraced, Local
from tools.bench.peers.record import Results, load, save
from tools.bench.peers.site import Site
from tools.bench.peers.work import Bench
from tools.bench.report import Report
from tools.guest import build
from tools.mount import ROOT

KEPT = ROOT / "docs/bench/peers.json"
MANY = (8, 32)
OF_DIFFERENT_DISKS = (Basefs, BasefsTraced, Local)
"""Who boots guests of different disks: each takes a minute and a half, and the traces of such have everybody."""
WORKS = ("trace", "many", "cached", "guest")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--alternations", type=int, default=5, help="runs of each peer, by turns (%(default)s)")
    parser.add_argument("--guest-alternations", type=int, help="of real guests (3, or fewer if there are fewer)")
    parser.add_argument("--slow-alternations", type=int, default=1, help="of many traces and the slow link (1)")
    parser.add_argument("--works", default=",".join(WORKS), help="some of %(default)s")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="some of %(default)s")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds until a trace is given up (%(default)s)")
    parser.add_argument(
        "--web-asks-glance", action="store_true", help="peers that cannot speak to Glance pay for its answers, too"
    )
    parser.add_argument("--json", type=Path, default=KEPT, help="where the results are kept, the plot beside it")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if chosen.alternations < 1:
        parser.error("--alternations: at least 1")
    for name, known in (("works", WORKS), ("peers", [peer.name for peer in PEERS])):
        if unknown := set(getattr(chosen, name).split(",")) - set(known):
            parser.error(f"--{name}: unknown: {', '.join(sorted(unknown))}")
    return chosen


def run_all(bench: Bench, works: list[str]) -> None:
    """Every work, the short ones first."""
    if "cached" in works:
        work_cached.cached_disk(bench, LOOPBACK)
    if "trace" in works or "many" in works:
        work_trace.know_trace(bench)
    if "trace" in works:
        for link in LINKS:
            work_trace.one_guest(bench, link, bench.slow_alternations if link is SLOW else bench.alternations)
    if "many" in works:
        for different in (False, True):
            for guests in MANY:
                work_trace.many_guests(bench, GBIT, guests, different=different)
    if "guest" in works:
        guest = build()
        work_guest.know_trace(bench, guest)
        work_guest.one_guest(bench, GBIT_10_MS, guest, [kind for kind in bench.peers if kind is not BasefsPacked])
        for link in (LOOPBACK, GBIT) if BasefsTraced in bench.peers else ():
            work_guest.one_guest(bench, link, guest, [kind for kind in bench.peers if kind in (BasefsTraced, Local)])
        shared = [kind for kind in bench.peers if kind is not BasefsPacked]
        work_guest.many_guests(bench, GBIT, guest, shared, different=False)
        ours = [kind for kind in bench.peers if kind in OF_DIFFERENT_DISKS]
        work_guest.many_guests(bench, GBIT, guest, ours, different=True)


def measured(chosen: argparse.Namespace) -> Results:
    """Run everything that was chosen; nothing is left running or mounted afterwards, whatever happens."""
    begun = time.monotonic()
    scratch_root = (ROOT / ".cache" / "bench").resolve()  # the mount table has no links
    scratch_root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="peers-", dir=scratch_root))
    peers = tuple(peer for peer in PEERS if peer.name in chosen.peers.split(","))
    try:
        with Site(scratch / "site", build(), max(MANY), web_asks_glance=chosen.web_asks_glance) as site:
            bench = Bench(
                site=site,
                scratch=scratch,
                peers=peers,
                alternations=chosen.alternations,
                guest_alternations=chosen.guest_alternations or min(3, chosen.alternations),
                slow_alternations=chosen.slow_alternations,
                limit_s=chosen.limit,
                trace=replay.load_trace(),
                say=lambda text: print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True),
            )
            source = machine.source_costs(site)
            bench.say(source)
            run_all(bench, chosen.works.split(","))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Results(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine.machine(),
        kernel=platform.release(),
        alternations=chosen.alternations,
        seconds=round(time.monotonic() - begun),
        source=source,
        guest_distinct_bytes=site.guest_distinct_bytes,
        distinct_bytes=replay.distinct_bytes(bench.trace, GRANULARITY),
        versions=machine.versions(peers),
        runs=bench.runs,
    )


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that everything is put away
    chosen = arguments()
    if chosen.show:
        results = load(chosen.json)
    else:
        results = measured(chosen)
        save(results, chosen.json)
    chosen.json.with_suffix(".svg").write_text(plot.svg(results), encoding="utf-8")
    print(table.text(results))
    report = Report()
    bounds.judge(report, results)
    if not report.summary():
        sys.exit(1)


if __name__ == "__main__":
    main()
