"""A large catalog, a large image, many readers: memory, start, listing, and one GET for two hundred readers."""

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.bench.report import Report
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

IMAGES = 1000
LARGE_BYTES = 20 << 30
READERS = 200
MIB = 1 << 20
STARTS = 5


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    return kib / 1024


def median_s(*argv: str) -> float:
    """Return the median of five runs of a command, in seconds."""
    seconds = []
    for _ in range(5):
        begun = time.monotonic()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - begun)
    return sorted(seconds)[2]


def read_all_over(path: Path) -> None:
    """Read 64 KiB at 500 places of the image, and 256 MiB in a row."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for number in range(500):
            os.pread(fd, 65536, number * (LARGE_BYTES // 500))
        for number in range(256):
            os.pread(fd, MIB, number * MIB)
    finally:
        os.close(fd)


def read_at_once(path: Path, offset: int) -> int:
    """Let READERS threads read the same 4 KiB at the same moment; returns how many got other bytes than the first."""
    barrier = threading.Barrier(READERS)

    def read() -> bytes:
        fd = os.open(path, os.O_RDONLY)
        try:
            barrier.wait()
            return os.pread(fd, 4096, offset)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(READERS) as pool:
        answers = [future.result() for future in [pool.submit(read) for _ in range(READERS)]]
    return sum(answer != answers[0] for answer in answers)


def run(report: Report, scratch: Path) -> None:
    """All of it on one Glance with IMAGES images."""
    report.part("scale", f"{IMAGES} images in the catalog, a {LARGE_BYTES >> 30} GiB sparse image, {READERS} readers")
    sparse = scratch / "sparse.raw"
    with open(sparse, "wb") as out:
        out.truncate(LARGE_BYTES)
    with Rig(scratch / "rig") as rig:
        large = rig.place(sparse, "large")
        first = rig.upload(os.urandom(4 * MIB), "small")
        rig.clone(first, IMAGES - 2)
        contended = rig.upload(os.urandom(64 * MIB), "contended")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            mount.wait_for_images(IMAGES)
            _listing(report, mount)
            mount.unmount()
            starts = []
            for _ in range(STARTS):
                starts.append(mount.start())
                mount.unmount()
            report.at_most(f"start to serving, {IMAGES} images known", sorted(starts)[STARTS // 2], 2.0, "s")
            mount.start()
            _readers(report, mount, rig, contended)
            read_all_over(mount.path(large))
            report.at_most("resident memory of the server", rss_mib(mount.status()["server_pid"]), 120, "MiB")
            report.tell("resident memory of the keeper", f"{rss_mib(mount.status()['keeper_pid']):.0f} MiB")


def _listing(report: Report, mount: BasefsMount) -> None:
    shown = len(os.listdir(mount.mountpoint))
    report.at_least("names that ls shows", shown, IMAGES)
    report.at_most("ls", median_s("ls", str(mount.mountpoint)), 0.2, "s")
    report.tell("ls -l", f"{median_s('ls', '-l', str(mount.mountpoint)):.2f} s")


def _readers(report: Report, mount: BasefsMount, rig: Rig, image_id: str) -> None:
    path = mount.path(image_id)
    os.stat(path)
    with open(path, "rb") as header:
        header.read(4096)
    before = len(rig.requests(f"{image_id}/file"))
    wrong = read_at_once(path, 32 * MIB)
    gets = len(rig.requests(f"{image_id}/file")) - before
    report.at_most(f"GETs that {READERS} readers of one cold chunk cause", gets, 1)
    report.at_most("  readers with other bytes", wrong, 0)
    assert path.name == base_name(image_id)
