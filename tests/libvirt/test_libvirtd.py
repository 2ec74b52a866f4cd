"""The private libvirtd of these tests leaves nothing on the machine, however its test ends."""

import os
import select
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.libvirt.boot_sector import bootable_image
from tests.libvirt.domain import Domain
from tests.libvirt.libvirtd import COMMAND_DEADLINE_S, INSTANCES, libvirtd

pytestmark = [pytest.mark.libvirt]

LIBVIRTS_OWN = [Path("/run/libvirt"), Path("/var/lib/libvirt"), Path("/var/log/libvirt"), Path("/etc/libvirt")]
ROOT = Path(__file__).resolve().parents[2]


def start_a_domain(instances: Path) -> None:
    """What the killed test does: one domain that runs on a plain file, then the PIDs of all there is on its stdout."""
    (instances / "_base").mkdir(parents=True)
    (instances / "_base" / "plain").write_bytes(bootable_image(70_000, seed=1).content)
    with libvirtd(instances) as libvirt:
        domain = Domain(libvirt, uuid.uuid4(), "plain")
        domain.create()
        domain.virsh("start")
        print("started", domain.name, flush=True)
        sys.stdin.read()


def state_of_the_machine() -> dict[Path, list[str]]:
    return {path: sorted(os.listdir(path)) if path.exists() else [] for path in LIBVIRTS_OWN}


def processes_of(instances: Path) -> list[int]:
    """Those that see the directory as nova's: the daemon, the guest, and what holds the namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mounts = (entry / "mountinfo").read_text()
        except OSError:
            continue
        if f"/{instances.parent.name}/{instances.name} {INSTANCES} " in mounts:
            found.append(int(entry.name))
    return found


def test_a_killed_test_leaves_no_daemon_no_guest_and_no_file(tmp_path: Path) -> None:
    before = state_of_the_machine()
    instances = tmp_path / "instances"
    script = f"from tests.libvirt.test_libvirtd import *; start_a_domain(Path({str(instances)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as test:
        assert test.stdout is not None
        assert test.stdout.readline().startswith("started instance-")
        running = {pid: os.pidfd_open(pid) for pid in processes_of(instances)}
        assert len(running) >= 3
        test.send_signal(signal.SIGKILL)
    try:
        for death in running.values():
            assert select.select([death], [], [], COMMAND_DEADLINE_S)[0], "it lives on"
    finally:
        for death in running.values():
            os.close(death)
    assert processes_of(instances) == []
    assert state_of_the_machine() == before
