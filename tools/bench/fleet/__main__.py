"""python -m tools.bench.fleet: nodes that boot one image at once; a table, the bound, JSON (`make bench-fleet`).

Exit code 1: the bound was missed. With --show nothing is measured: what was kept is shown again. Wants root.
"""

import argparse
import datetime
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench import replay
from tools.bench.boot import GRANULARITY
from tools.bench.fleet import model
from tools.bench.fleet.network import SITE_ADDRESS, Network, enter_site
from tools.bench.fleet.nodes import Boot, measured
from tools.bench.fleet.record import MB, FleetResults, load, save, table
from tools.bench.fleet.ways import WAYS, GlanceRanges, Rbd, Tier
from tools.bench.peers.machine import machine
from tools.bench.peers.peers import first_line
from tools.bench.report import Report
from tools.cache_tier import NGINX
from tools.guest import build
from tools.mount import ROOT
from tools.rig import Rig

KEPT = ROOT / "docs/bench/fleet.json"
NODES = (1, 4, 20)
WORKING_SETS_MAX = 1.2


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-fleet", description=__doc__)
    names = ",".join(way.name.replace(",", ";") for way in WAYS)
    parser.add_argument("--nodes", default=",".join(map(str, NODES)), help="how many at once (%(default)s)")
    parser.add_argument("--ways", default=names, help="some of %(default)s")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".cache/bench", help="where caches are (%(default)s)")
    parser.add_argument("--json", type=Path, default=KEPT, help="where the results are kept (%(default)s)")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if unknown := set(chosen.ways.split(",")) - set(names.split(",")):
        parser.error(f"--ways: unknown: {', '.join(sorted(unknown))}")
    return chosen


def run_all(chosen: argparse.Namespace, scratch: Path, site: str) -> FleetResults:
    """Every way with every number of nodes."""
    counts = [int(count) for count in chosen.nodes.split(",")]
    ways = [kind for kind in WAYS if kind.name.replace(",", ";") in chosen.ways.split(",")]
    guest, trace = build(), replay.load_trace()
    results = FleetResults(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(),
        kernel=platform.release(),
        commit=first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        nginx=subprocess.run([NGINX, "-v"], check=True, capture_output=True, text=True).stderr.split(": ")[-1].strip(),
        distinct_bytes=replay.distinct_bytes(trace, GRANULARITY),
    )
    has_ceph = Rbd in ways
    with (
        Network(site, max(counts)) as network,
        Rig(scratch / "rig", host=SITE_ADDRESS, http_store=False, object_stores=has_ceph) as rig,
    ):
        images = {"fs": rig.place(guest.disk, "debian12", visibility="public")}
        if has_ceph:
            images["ceph"] = rig.upload(guest.disk, "debian12 in Ceph", store="ceph", visibility="public")
        for count in counts:
            for kind in ways:
                boot = Boot(image_id=images[kind.store], original=guest.disk, trace=trace)
                directory = scratch / "run"
                run = measured(kind(rig, boot.image_id), network, count, directory, boot)
                shutil.rmtree(directory)
                results.runs.append(run)
                sent = f"Glance sent {run.glance_bytes / MB:.1f} MB in {run.glance_requests} requests"
                print(f"{run.way}, {run.nodes} nodes: last {run.last_s:.2f} s, {sent}", flush=True)
    return results


def judge(report: Report, results: FleetResults) -> None:
    """The bounds of issue 7: over the tier Glance sends all nodes little more than what one needs, over rbd nothing."""
    report.part("fleet", "bounds of issue 7")
    alone = results.of(GlanceRanges.name, 1)
    for run in results.runs:
        if alone and run.way.startswith(Tier.name) and run.nodes > 1:
            ratio = run.glance_bytes / alone.glance_bytes
            name = f"{run.way}, {run.nodes} nodes: bytes of Glance / of 1 node alone"
            report.at_most(name, ratio, WORKING_SETS_MAX)
        if run.way == Rbd.name:
            report.at_most(f"{run.way}, {run.nodes} nodes: bytes of the image that Glance sent", run.glance_bytes, 0)


def main() -> None:
    chosen = arguments()
    if chosen.show:
        results = load(chosen.json)
    else:
        site = enter_site()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that everything is put away
        root = chosen.scratch.resolve()  # the mount table has no links
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="fleet-", dir=root))
        try:
            results = run_all(chosen, scratch, site)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        save(results, chosen.json)
    print(table(results))
    print(model.table(results))
    report = Report()
    judge(report, results)
    if not report.summary():
        sys.exit(1)


if __name__ == "__main__":
    main()
