"""A real guest from a compressed qcow2 in Glance: its boot on the cold image, and on the complete one."""

from pathlib import Path

from tools.bench.report import Report
from tools.guest import build
from tools.guest.boot import boot, create_overlay
from tools.guest.packed import packed
from tools.mount import BasefsMount
from tools.rig import Rig

MB = 1_000_000


def run(report: Report, scratch: Path) -> None:
    """Boot cold, bring all of the image, boot again from a new overlay."""
    guest = build()
    disk = packed(guest)
    report.part("guest", f"Debian 12 (TCG) from a compressed qcow2 of {disk.stat().st_size / MB:,.0f} MB, cache=none")
    with Rig(scratch / "rig") as rig:
        image_id = rig.place(disk, "debian12-packed", "qcow2")
        with BasefsMount(scratch / "mount", rig.conf_lines()) as mount:
            base = mount.path(image_id)
            create_overlay(base, scratch / "cold")
            cold = boot(scratch / "cold", guest)
            report.at_most("bytes fetched by the cold boot", mount.image(image_id)["fetched_bytes"] / MB, 40, "MB")
            mount.cli("image", "warm", image_id)
            create_overlay(base, scratch / "complete")
            complete = boot(scratch / "complete", guest)
    report.tell("multi-user.target on the cold image", f"{cold.ready_s:.1f} s")
    report.tell("  on the complete one", f"{complete.ready_s:.1f} s")
    report.at_most("  ratio", cold.ready_s / complete.ready_s, 1.25)
