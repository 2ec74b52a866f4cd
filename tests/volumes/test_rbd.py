"""A volume of Cinder's stock RBD driver: librbd has it open, in a process of its own."""

import os
import signal
from pathlib import Path

import pytest
import trio

from basefs.volumes.base import ImageFacts
from tests.contract.volume_worlds import Notes, RealWorld

pytestmark = [pytest.mark.glance, pytest.mark.cinder, pytest.mark.ceph]
DATA = os.urandom(3_000_000)
DEBIAN_PACKAGES = Path("/usr/lib/python3/dist-packages")


@pytest.fixture
def world(ceph_rig, tmp_path, monkeypatch):
    # Debian's modules of Ceph, and nothing else of Debian's Python.
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("rados", "rbd"):
        for path in DEBIAN_PACKAGES.glob(f"{name}.cpython-*.so"):
            (modules / path.name).symlink_to(path)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    made = RealWorld(ceph_rig, tmp_path)
    yield made
    made.close()


def helper_of_ours() -> int:
    tasks = Path("/proc/self/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    (found,) = [pid for pid in children if b"basefs.volumes.helper" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(found)


def image_of(ceph_rig):
    return ImageFacts(image_id=ceph_rig.upload_cinder(DATA, "in rbd", backend="rbd"), size=len(DATA))


async def test_an_rbd_volume_is_read_and_reopened_and_goes(world, ceph_rig, nursery, tmp_path):
    links, note, image = world.links("node-a", nursery), Notes(), image_of(ceph_rig)
    attached = await links.attach(image, await links.find(image), note)
    assert (attached.record.connector, attached.record.device) == ("rbd", None)
    assert attached.bytes.fd_to_hold() is None
    assert attached.bytes.size == 1 << 30
    assert await trio.to_thread.run_sync(attached.bytes.read, 0, len(DATA)) == DATA
    assert await trio.to_thread.run_sync(attached.bytes.read, 1_234_567, 4096) == DATA[1_234_567:1_238_663]
    assert list((tmp_path / "locks").glob("brickrbd_*")) == [], "the key of the cluster is in no file any more"
    attached.bytes.close()
    reopened = await links.reopen(image, attached.record, note)
    assert await trio.to_thread.run_sync(reopened.bytes.read, 5, 100) == DATA[5:105]
    reopened.bytes.close()
    await links.detach(reopened.record, reopened.connection_fd, note)
    assert note.last is None
    os.close(attached.connection_fd)
    os.close(reopened.connection_fd)


async def test_when_its_process_is_killed_reads_fail_and_it_is_detached(world, ceph_rig, nursery):
    links, note, image = world.links("node-a", nursery), Notes(), image_of(ceph_rig)
    attached = await links.attach(image, await links.find(image), note)
    os.kill(helper_of_ours(), signal.SIGKILL)
    with pytest.raises(OSError, match=r"ended|reset|pipe"):
        await trio.to_thread.run_sync(attached.bytes.read, 0, 10)
    attached.bytes.close()
    await links.detach(attached.record, attached.connection_fd, note)
    assert note.last is None
    os.close(attached.connection_fd)
