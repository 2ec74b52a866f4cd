"""Reads of a cached image beside the same reads of a minimal pyfuse3 file system, in alternating rounds."""

import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.bench.report import Report
from tools.mount import ROOT, BasefsMount
from tools.rig import Rig

IMAGE_BYTES = 512 << 20
ROUNDS = 7
ROUND_S = 2
HEADER_BYTES = 4096
READERS = (0, 1, 2)
"""Reader processes beside the server; 2 is more than two cores have room for."""
MAX_BACKGROUND = 1024
READ_AHEAD_KB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One way to read, in fio's words."""

    name: str
    arguments: tuple[str, ...]
    is_throughput: bool
    of_minimal: float
    """What we must reach of the minimal file system."""


DIRECT = (
    Workload(
        name="4 KiB random, queue depth 16",
        arguments=("--rw=randread", "--bs=4k", "--iodepth=16"),
        is_throughput=False,
        of_minimal=1.5,
    ),
    Workload(
        name="4 KiB random, queue depth 1",
        arguments=("--rw=randread", "--bs=4k", "--iodepth=1"),
        is_throughput=False,
        of_minimal=1.1,
    ),
    Workload(
        name="1 MiB sequential", arguments=("--rw=read", "--bs=1m", "--iodepth=4"), is_throughput=True, of_minimal=0.9
    ),
)


@contextlib.contextmanager
def minimal_mount(image: Path, mountpoint: Path) -> Iterator[Path]:
    """Serve `image` by minimal_fs.py; yields the file."""
    mountpoint.mkdir()
    argv = [str(ROOT / ".venv/bin/python"), str(ROOT / "tools/bench/minimal_fs.py"), str(image), str(mountpoint)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            if server.stdout.readline() != "mounted\n":
                raise RuntimeError("minimal_fs.py did not mount")
            minor = os.minor(os.stat(mountpoint).st_dev)
            Path(f"/sys/fs/fuse/connections/{minor}/max_background").write_text(str(MAX_BACKGROUND), encoding="ascii")
            Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").write_text(str(READ_AHEAD_KB), encoding="ascii")
            yield mountpoint / "image"
        finally:
            subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def fio_read(path: Path, *arguments: str) -> tuple[float, float]:
    """Return (IOPS, bytes a second) of one fio job that reads `path`."""
    argv = ["fio", "--name=read", f"--filename={path}", "--readonly", "--ioengine=libaio", "--output-format=json"]
    done = subprocess.run([*argv, *arguments], check=True, capture_output=True, text=True)
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return float(read["iops"]), float(read["bw_bytes"])


def direct_read(path: Path, workload: Workload) -> float:
    """Return IOPS, or bytes a second for a throughput workload, of one round with O_DIRECT."""
    # The header is left out on both sides, so that whatever a server does for it does not count.
    where = (f"--offset={HEADER_BYTES}", f"--size={IMAGE_BYTES - (1 << 20)}")
    iops, bytes_s = fio_read(
        path, "--direct=1", "--time_based", f"--runtime={ROUND_S}", "--norandommap", *where, *workload.arguments
    )
    return bytes_s if workload.is_throughput else iops


def buffered_read(path: Path) -> float:
    """Return bytes a second of one sequential pass through the page cache, emptied for this file before."""
    return fio_read(path, "--direct=0", "--invalidate=1", "--rw=read", "--bs=1m", f"--size={IMAGE_BYTES}")[1]


def alternate(first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float, float]:
    """Return the medians of both, and the median of the rounds' ratios; who begins changes from round to round."""
    pairs = []
    for number in range(ROUNDS):
        if number % 2:
            later, sooner = second(), first()
            pairs.append((sooner, later))
        else:
            pairs.append((first(), second()))
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def run(report: Report, scratch: Path) -> None:
    """Cache an image completely, then read it and its twin, without readers and with them."""
    image = scratch / "image.raw"
    block = os.urandom(16 << 20)
    with open(image, "wb") as out:
        out.writelines(block for _ in range(IMAGE_BYTES // len(block)))
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(image, "cached")
        for readers in READERS:
            with BasefsMount(scratch / f"mount-{readers}", rig.conf_lines(), {"readers": readers}) as mount:
                mount.cli("image", "warm", image_id, "--wait", timeout_s=300)
                _beside_minimal(report, readers, mount.path(image_id), image, scratch / f"minimal-{readers}")


def _beside_minimal(report: Report, readers: int, mine: Path, image: Path, mountpoint: Path) -> None:
    report.part(
        f"cached {readers}", f"reads of a cached image, readers = {readers}, {ROUNDS} alternating rounds, medians"
    )
    with minimal_mount(image, mountpoint) as other:
        subprocess.run(["cmp", str(mine), str(other)], check=True)
        for workload in DIRECT:
            compare(report, workload, mine, other)
        ours, theirs, _ = alternate(lambda: buffered_read(mine), lambda: buffered_read(other))
        report.at_least("buffered sequential, GB/s", ours / 1e9, 1.0)
        report.tell("  minimal pyfuse3", f"{theirs / 1e9:.2f}")


def compare(report: Report, workload: Workload, mine: Path, other: Path) -> None:
    """Read both by turns."""
    ours, theirs, ratio = alternate(lambda: direct_read(mine, workload), lambda: direct_read(other, workload))
    scale, unit = (1e9, "GB/s") if workload.is_throughput else (1.0, "IOPS")
    shown = "{:,.2f} {}" if workload.is_throughput else "{:,.0f} {}"
    report.tell(f"O_DIRECT {workload.name}: basefs", shown.format(ours / scale, unit))
    report.tell("  minimal pyfuse3", shown.format(theirs / scale, unit))
    # More than 1: the other waits for each request as pyfuse3 does, ours does not (`fuse/session_waits.py`).
    report.at_least("  median ratio", ratio, workload.of_minimal)
