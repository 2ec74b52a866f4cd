"""What the checks of cached chunks after a start cost: the first pass over an image, the next, and one without any."""

import os
import statistics
from pathlib import Path

from tools.bench.cached import fio_read
from tools.bench.report import Report
from tools.mount import BasefsMount
from tools.rig import Rig

IMAGE_BYTES = 1 << 30
ROUNDS = 3


def one_pass(path: Path) -> float:
    """Return bytes a second of one sequential pass past the kernel's page cache of the mount."""
    return fio_read(path, "--direct=1", "--rw=read", "--bs=1m", "--iodepth=4", f"--size={IMAGE_BYTES}")[1]


def random_iops(path: Path) -> float:
    """Return IOPS of 4 KiB reads at random places, each page once, in 64 MiB of the image."""
    return fio_read(
        path, "--direct=1", "--rw=randread", "--bs=4k", "--iodepth=16", "--size=64m", f"--offset={IMAGE_BYTES // 2}"
    )[0]


def _restart(mount: BasefsMount) -> None:
    mount.unmount()
    mount.start()
    mount.status()  # what answers commands is imported after the start, in competition with reads


def run(report: Report, scratch: Path) -> None:
    """Warm an image and read it; then start again, read it twice, `ROUNDS` times."""
    report.part("verify", f"checks of cached chunks after a start, {ROUNDS} starts, medians")
    image = scratch / "image.raw"
    block = os.urandom(16 << 20)
    with open(image, "wb") as out:
        out.writelines(block for _ in range(IMAGE_BYTES // len(block)))
    unchecked, first, second, first_iops, second_iops = [], [], [], [], []
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(image, "cached")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            path = mount.path(image_id)
            for _ in range(ROUNDS):
                mount.cli("image", "evict", image_id)
                mount.cli("image", "warm", image_id, "--wait", timeout_s=300)
                unchecked.append(one_pass(path))
                _restart(mount)
                first.append(one_pass(path))
                second.append(one_pass(path))
                _restart(mount)
                first_iops.append(random_iops(path))
                second_iops.append(random_iops(path))
    without, checked, after = (statistics.median(values) for values in (unchecked, first, second))
    report.tell("1 MiB sequential, nothing to check, GB/s", f"{without / 1e9:.2f}")
    report.tell("  first pass after a start, all is checked", f"{checked / 1e9:.2f}")
    report.tell("  second pass", f"{after / 1e9:.2f}")
    report.tell("  first pass / second pass", f"{checked / after:.2f}")
    report.at_least("  second pass / nothing to check", after / without, 0.95)
    report.tell("4 KiB random, first pass, IOPS", f"{statistics.median(first_iops):,.0f}")
    report.tell("  second pass", f"{statistics.median(second_iops):,.0f}")
