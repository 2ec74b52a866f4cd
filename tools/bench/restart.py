"""kill -9 of the server with a large catalog: how long a cached read and a stat wait; an upgrade; what it costs."""

import os
import signal
import time
from pathlib import Path

from basefs.cli.keeper_client import ask_keeper
from basefs.keeper_setup import lock_holder
from tools.bench.report import Report
from tools.bench.scale import rss_mib
from tools.mount import BasefsMount
from tools.rig import Rig

IMAGES = 1000
ROUNDS = 7
MIB = 1 << 20
BLOCK = 4096
STANDBY_LIMIT_S = 60.0


def keeper_status(mount: BasefsMount) -> dict[str, object]:
    """What the keeper says."""
    return ask_keeper(mount.directory / "control.sock", "status")


def wait_for_standby(mount: BasefsMount, state: str = "loaded") -> dict[str, object]:
    """Return when a server serves and another one is as far as `state`."""
    end = time.monotonic() + STANDBY_LIMIT_S
    while (status := keeper_status(mount))["standby_state"] != state or status["state"] != "serving":
        assert time.monotonic() < end, status
        time.sleep(0.05)
    return status


def first_answers_s(mount: BasefsMount, path: Path) -> tuple[float, float]:
    """Kill the server; seconds until a cached block was read, and until the file's attributes were had."""
    holder = lock_holder(mount.cache_dir)
    assert holder is not None
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.monotonic()
        os.kill(holder["server_pid"], signal.SIGKILL)
        os.pread(fd, BLOCK, 0)
        read_s = time.monotonic() - begun
        os.statvfs(path)
        return read_s, time.monotonic() - begun
    finally:
        os.close(fd)


def median(values: list[float]) -> float:
    """Return the middle one."""
    return sorted(values)[len(values) // 2]


def run(report: Report, scratch: Path) -> None:
    """All of it on one Glance with IMAGES images."""
    report.part("restart", f"{IMAGES} images known; kill -9 of the server, {ROUNDS} times; an upgrade")
    with Rig(scratch / "rig") as rig:
        image_id = rig.upload(os.urandom(4 * MIB), "small")
        rig.clone(image_id, IMAGES - 1)
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            mount.wait_for_images(IMAGES)
            measure(report, mount, mount.path(image_id))


def measure(report: Report, mount: BasefsMount, path: Path) -> None:
    """The figures of a mount that knows its images."""
    path.read_bytes()
    reads, stats = [], []
    for _ in range(ROUNDS):
        wait_for_standby(mount)
        read_s, stat_s = first_answers_s(mount, path)
        reads.append(read_s)
        stats.append(stat_s)
    report.at_most("kill -9 to the first cached read, median", median(reads), 0.5, "s")
    report.tell("  longest", f"{max(reads):.2f} s")
    report.at_most("kill -9 to read and statfs, median", median(stats), 0.5, "s")
    status = wait_for_standby(mount)
    os.kill(int(str(status["standby_pid"])), signal.SIGKILL)
    cold_s, _ = first_answers_s(mount, path)
    report.tell("without a standby", f"{cold_s:.2f} s")
    status = wait_for_standby(mount)
    report.tell("resident memory of the standby", f"{rss_mib(int(str(status['standby_pid']))):.0f} MiB")
    report.at_most("resident memory of the keeper", rss_mib(int(str(status["keeper_pid"]))), 15, "MiB")
    answer = ask_keeper(mount.directory / "control.sock", "upgrade", deadline_s=60.0)
    assert answer["upgraded"], answer
    report.tell("upgrade: seconds without a server", f"{answer['seconds_without_server']:.2f}")
