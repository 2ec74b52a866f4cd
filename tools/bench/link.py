"""Cold boot by trace over a 1 Gbit/s link, beside nova's own download of the same image over the same link."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.bench import replay
from tools.bench.nova_process import Nova
from tools.bench.report import Report
from tools.guest import build
from tools.mount import ROOT, BasefsMount

GIB = 1 << 30
BALLAST_BYTES = 4 * GIB
RATE = "1gbit"


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True)


@contextlib.contextmanager
def far_namespace() -> Iterator[tuple[str, str]]:
    """Yield the name of a network namespace behind a link of RATE, and its address as seen from here."""
    name = f"basefs{os.getpid()}"
    third = os.getpid() % 250
    near, far = f"10.213.{third}.1", f"10.213.{third}.2"
    device = f"bfs{os.getpid()}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", "far0", "netns", name)
        _run("ip", "address", "add", near + "/30", "dev", device)
        _run("ip", "link", "set", device, "up")
        _run("ip", "-n", name, "address", "add", far + "/30", "dev", "far0")
        for interface in ("far0", "lo"):
            _run("ip", "-n", name, "link", "set", interface, "up")
        limit = ("tbf", "rate", RATE, "burst", "256kb", "latency", "50ms")
        _run("tc", "-n", name, "qdisc", "add", "dev", "far0", "root", *limit)
        yield name, far
    finally:
        _run("ip", "netns", "delete", name)  # takes the link with it


@contextlib.contextmanager
def far_glance(namespace: str, address: str, directory: Path, image: Path) -> Iterator[dict[str, Any]]:
    """Run a rig with that image in the namespace; yields what link_server.py says about it."""
    argv = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tools.bench.link_server"]
    with subprocess.Popen(
        [*argv, str(directory), address, str(image)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.stdin.close()


def image_with_ballast(scratch: Path) -> Path:
    """Return a raw image: the guest's disk, and BALLAST_BYTES that nobody reads behind it."""
    path = scratch / "with-ballast.raw"
    _run("cp", "--sparse=always", str(build().disk), str(path))
    block = os.urandom(16 << 20)
    with open(path, "ab") as out:
        out.writelines(block for _ in range(BALLAST_BYTES // len(block)))
    return path


def nova_download_s(instances: Path, glance: dict[str, Any]) -> float:
    """Return the seconds that nova takes until the base is ready: its own LibvirtDriver.cache_image, nova 34."""
    (instances / "_base").mkdir(parents=True)
    where = {"instances_path": str(instances), "glance_url": glance["glance_url"], "token": glance["token"]}
    with Nova("nova34") as nova:
        nova.run("configure", **where)
        answer = nova.run("precache", image_ids=[glance["image_id"]])
    if answer["result"] != {glance["image_id"]: True}:
        raise RuntimeError(f"nova did not download: {answer}")
    return float(answer["seconds"])


def run(report: Report, scratch: Path) -> None:
    """Replay the trace through basefs, then let nova download; one link, one server, one after the other."""
    report.part("link", f"the same trace, Glance behind {RATE} (veth, tbf), {BALLAST_BYTES >> 30} GiB of ballast")
    trace = replay.load_trace()
    image = image_with_ballast(scratch)
    with far_namespace() as (namespace, address), far_glance(namespace, address, scratch / "rig", image) as glance:
        report.note("image in Glance")
        with BasefsMount(scratch / "mount", glance["conf_lines"]) as mount:
            basefs_s = replay.replay(mount.path(glance["image_id"]), trace)
            wrong = replay.differences(mount.path(glance["image_id"]), image, trace)
        report.tell("basefs: trace ends after", f"{basefs_s:.2f} s")
        nova_s = nova_download_s(scratch / "nova", glance)
        report.tell("nova's own download: base ready after", f"{nova_s:.1f} s")
    shutil.rmtree(scratch / "nova")
    report.at_least("nova's seconds / basefs' seconds", nova_s / basefs_s, 10)
    report.at_most("reads with a wrong byte", wrong, 0)
