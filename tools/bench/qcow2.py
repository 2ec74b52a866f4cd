"""The raw view of qcow2 images: beside a raw image, beside qemu-nbd and nbdfuse, and what it fetches when cold."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tools.bench import replay
from tools.bench.boot import MB, settled_fetched_bytes
from tools.bench.cached import DIRECT, IMAGE_BYTES, alternate, direct_read
from tools.bench.report import Report
from tools.guest import build, packed
from tools.mount import BasefsMount
from tools.rig import Rig

GIB = 1 << 30
UNCOMPRESSED_MIN, COMPRESSED_MIN = 0.8, 0.7
ROUND_TRIPS_MAX = 3
BOOT_FETCHED_MB_MAX = 40
START_S = 20.0


def run(report: Report, scratch: Path) -> None:
    """All of them over one Glance, a mount each, so that no image is in the way of another."""
    report.part("qcow2", "the raw view of qcow2 images, warm and cold")
    with Rig(scratch / "rig") as rig:
        _warm(report, rig, scratch)
        _compressed(report, rig, scratch)
        _first_read(report, rig, scratch)
        _boot(report, rig, scratch)


def _convert(raw: Path, qcow2: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)


def _warm(report: Report, rig: Rig, scratch: Path) -> None:
    raw, qcow2 = scratch / "disk.raw", scratch / "disk.qcow2"
    block = os.urandom(16 << 20)
    with open(raw, "wb") as out:
        out.writelines(block for _ in range(IMAGE_BYTES // len(block)))
    _convert(raw, qcow2)
    images = [rig.place(raw, "raw"), rig.place(qcow2, "qcow2", "qcow2")]
    with BasefsMount(scratch / "warm", rig.conf_lines()) as mount:
        for image_id in images:
            mount.cli("image", "warm", image_id, "--wait", timeout_s=300)
        plain, shown = map(mount.path, images)
        subprocess.run(["cmp", str(plain), str(shown)], check=True)
        for workload in DIRECT:
            ours, theirs, ratio = alternate(
                partial(direct_read, shown, workload),
                partial(direct_read, plain, workload),
            )
            _tell(
                report,
                f"uncompressed, {workload.name}",
                ours,
                "a raw image through basefs",
                theirs,
                workload.is_throughput,
            )
            report.at_least("  median ratio", ratio, UNCOMPRESSED_MIN)
    raw.unlink()
    qcow2.unlink()


def _tell(report: Report, name: str, ours: float, other: str, theirs: float, is_throughput: bool) -> None:
    scale, form = (1e6, "{:,.0f} MB/s") if is_throughput else (1.0, "{:,.0f} IOPS")
    report.tell(name, form.format(ours / scale))
    report.tell(f"  {other}", form.format(theirs / scale))


@contextlib.contextmanager
def nbd_mount(image: Path, directory: Path) -> Iterator[Path]:
    """The disk in `image` as a file, by qemu-nbd and nbdfuse."""
    directory.mkdir()
    # nbdfuse passes the socket on by socket activation.
    argv = ["nbdfuse", "-r", str(directory), "[", "qemu-nbd", "-r", "-f", "qcow2", "--shared=0", str(image), "]"]
    with subprocess.Popen(argv) as server:
        try:
            deadline = time.monotonic() + START_S
            while not os.path.ismount(directory) and server.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            yield directory / "nbd"
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def _compressed(report: Report, rig: Rig, scratch: Path) -> None:
    """More than the memory for inflated clusters, so nearly every read inflates; qemu-nbd keeps none at all."""
    if shutil.which("nbdfuse") is None:
        report.note("nbdfuse (Debian: libnbd-bin) is not there: compressed clusters are not compared")
        return
    raw, qcow2 = scratch / "disk.raw", scratch / "disk.qcow2"
    rng = random.Random(1)
    with open(raw, "wb") as out:
        out.writelines(rng.randbytes(2048) + bytes(range(256)) * 8 for _ in range(IMAGE_BYTES // 4096))
    _convert(raw, qcow2, "-c")
    report.tell("compressed to", f"{qcow2.stat().st_size / IMAGE_BYTES:.2f}")
    image_id = rig.place(qcow2, "compressed", "qcow2")
    with BasefsMount(scratch / "compressed", rig.conf_lines()) as mount:
        mount.cli("image", "warm", image_id, "--wait", timeout_s=300)
        with nbd_mount(qcow2, scratch / "nbd") as other:
            subprocess.run(["cmp", str(mount.path(image_id)), str(raw)], check=True)
            for workload in DIRECT:
                ours, theirs, ratio = alternate(
                    partial(direct_read, mount.path(image_id), workload),
                    partial(direct_read, other, workload),
                )
                _tell(
                    report, f"compressed, {workload.name}", ours, "qemu-nbd and nbdfuse", theirs, workload.is_throughput
                )
                report.at_least("  median ratio", ratio, COMPRESSED_MIN)
    raw.unlink()
    qcow2.unlink()


def _first_read(report: Report, rig: Rig, scratch: Path) -> None:
    image = scratch / "large.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(20 * GIB)], check=True)
    writes = [argument for at in range(0, 20, 2) for argument in ("-c", f"write -P {at + 1} {at}G 1M")]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, image], check=True, capture_output=True)
    image_id = rig.place(image, "large", "qcow2")
    with BasefsMount(scratch / "large", rig.conf_lines()) as mount:
        path = mount.path(image_id)
        path.stat()
        _, before = settled_fetched_bytes(mount)
        with open(path, "rb", buffering=0) as file:
            found = os.pread(file.fileno(), 4096, 10 * GIB)
        _, after = settled_fetched_bytes(mount)
    report.at_most("requests of the first read of a 20 GiB image", after - before, ROUND_TRIPS_MAX)
    report.at_most("  wrong bytes", found.count(11) - 4096, 0)


def _boot(report: Report, rig: Rig, scratch: Path) -> None:
    guest = build()
    image = packed(guest)
    trace = replay.load_trace()
    image_id = rig.place(image, "debian12-packed", "qcow2")
    with BasefsMount(scratch / "boot", rig.conf_lines()) as mount:
        path = mount.path(image_id)
        cold_s = replay.replay(path, trace)
        fetched, requests = settled_fetched_bytes(mount)
        warm_s = replay.replay(path, trace)
        wrong = replay.differences(path, guest.disk, trace)
    report.tell("compressed Debian image", f"{image.stat().st_size / MB:,.0f} MB")
    report.at_most("  bytes fetched by the trace of its boot", fetched / MB, BOOT_FETCHED_MB_MAX, "MB")
    report.tell("  requests for bytes", requests)
    report.tell("  trace on a cold image", f"{cold_s:.2f} s")
    report.tell("  trace on a cached image", f"{warm_s:.2f} s")
    report.at_most("  reads with a wrong byte", wrong, 0)
