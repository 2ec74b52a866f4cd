"""A first boot by nova's own code: how many FUSE requests, and whether Glance is asked."""

import os
import uuid
from pathlib import Path

from tools.bench.nova_process import Nova
from tools.bench.report import Report
from tools.guest import build
from tools.mount import BasefsMount
from tools.rig import Rig

COUNTED = {"read": 10, "getattr": 5}


def run(report: Report, scratch: Path) -> None:
    """Boot twice from one image: the first boot resolves the name and caches the header, the second is counted."""
    report.part("nova", "first boot by the code of nova 34 (disks only), the image's header cached")
    guest = build()
    with Rig(scratch / "rig") as rig, BasefsMount(scratch / "mount", rig.conf_lines()) as mount, Nova("nova34") as nova:
        image_id = rig.place(guest.disk, "debian12", visibility="public")
        instances = str(mount.instances_path)
        nova.run("configure", instances_path=instances, glance_url=rig.glance_url, token=rig.token("u1"))
        os.stat(mount.path(image_id))  # resolves the name: basefs reads and checks the header
        before, asked = mount.status()["fuse_requests"], len(rig.requests())
        answer = nova.run("boot", uuid=str(uuid.uuid4()), image_id=image_id, root_gb=3)
        after, asked_after = mount.status()["fuse_requests"], len(rig.requests())
        counts = {name: count - before.get(name, 0) for name, count in after.items()}
        for name, bound in COUNTED.items():
            report.at_most(name.upper(), counts.pop(name, 0), bound)
        others = {name: count for name, count in counts.items() if count}
        report.tell("other requests", ", ".join(f"{count} {name}" for name, count in sorted(others.items())) or "none")
        report.at_most("requests to Glance", asked_after - asked, 0)
        report.tell("seconds", f"{answer['seconds']:.2f} s")
