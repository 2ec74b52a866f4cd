"""Reads of a graduated base through the mount, beside the minimal file system.

Told besides: by a symbolic link to the file where it lies outside of the mount, which basefs does not make
(docs/OPERATIONS.md, "Other things"). The link leads to the very file: what its ratio is off 1 is the machine's noise.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.bench.cached import (
    DIRECT,
    IMAGE_BYTES,
    ROUNDS,
    Workload,
    alternate,
    buffered_read,
    compare,
    direct_read,
    minimal_mount,
)
from tools.bench.report import Report
from tools.mount import BasefsMount, base_name
from tools.rig import Rig

IMAGE_ID = "8d2f4bd5-7b6c-4f0f-9ff4-3f1a1d3f1c55"
"""Glance has no such image: what nova downloaded and what we graduated are read alike."""


def run(report: Report, scratch: Path) -> None:
    """Read one lower file through the mount, through the minimal file system, by a link, and as it is."""
    report.part("graduated", f"reads of a lower file of 512 MiB, {ROUNDS} alternating rounds, medians")
    with Rig(scratch / "rig") as rig:
        mount = BasefsMount(scratch / "mount", rig.conf_lines())
        plain = mount.path(IMAGE_ID)
        block = os.urandom(16 << 20)
        with open(plain, "wb") as out:
            out.writelines(block for _ in range(IMAGE_BYTES // len(block)))
        with _visible_outside(mount.mountpoint, scratch / "outside") as outside, mount:
            lower = outside / base_name(IMAGE_ID)
            with minimal_mount(lower, scratch / "minimal") as other:
                subprocess.run(["cmp", str(plain), str(other)], check=True)
                for workload in DIRECT:
                    compare(report, workload, plain, other)
                ours, theirs, ratio = alternate(lambda: buffered_read(plain), lambda: buffered_read(other))
                report.tell("buffered sequential: basefs", f"{ours / 1e9:.2f} GB/s")
                report.tell("  minimal pyfuse3", f"{theirs / 1e9:.2f} GB/s")
                report.at_least("  median ratio", ratio, 0.9)
            link = mount.mountpoint / "link"
            link.symlink_to(lower)
            for workload in DIRECT:
                _tell_link(report, workload, link, lower)


@contextlib.contextmanager
def _visible_outside(directory: Path, outside: Path) -> Iterator[Path]:
    """The directory below the mount, bind-mounted beside it."""
    outside.mkdir()
    subprocess.run(["mount", "--bind", str(directory), str(outside)], check=True)
    try:
        yield outside
    finally:
        subprocess.run(["umount", "-l", str(outside)], check=True)


def _tell_link(report: Report, workload: Workload, link: Path, plain: Path) -> None:
    ours, theirs, ratio = alternate(lambda: direct_read(link, workload), lambda: direct_read(plain, workload))
    scale, unit = (1e9, "GB/s") if workload.is_throughput else (1.0, "IOPS")
    shown = "{:,.2f} {}" if workload.is_throughput else "{:,.0f} {}"
    report.tell(f"O_DIRECT {workload.name}: by a link", shown.format(ours / scale, unit))
    report.tell("  plain file", shown.format(theirs / scale, unit))
    report.tell("  median ratio", f"{ratio:.2f}")
