"""docs/SEMANTICS.md, section 20: images that are read from the Cinder volume behind them."""

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.semantics.conftest import eventually
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance, pytest.mark.cinder]

BYTES = 9_000_001
CONTENT = Random(20).randbytes(BYTES)
PATIENCE_S = 60.0
AUTO = {"template_image_handler": "auto", "lookup_deadline_s": 40}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def wait_for(mount: BasefsMount, image_id: str, link: str) -> dict[str, Any]:
    """What `image show` tells once the image stands so to its volume."""
    eventually(lambda: mount.image(image_id)["link"] == link, PATIENCE_S)
    return mount.image(image_id)


class Reader(threading.Thread):
    """Reads the image at random places through one handle, past the page cache, until `stop`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fd = os.open(path, os.O_RDONLY)
        self.is_stopped = False
        self.reads = 0
        self.trouble: list[str] = []
        self.start()

    def run(self) -> None:
        rng = Random(21)
        while not self.is_stopped and not self.trouble:
            offset = rng.randrange(BYTES)
            size = rng.choice([1, 4096, 70_000, 1 << 20])
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                if os.pread(self.fd, size, offset) != CONTENT[offset : offset + size]:
                    self.trouble.append(f"wrong bytes at {offset}")
            except OSError as exc:
                self.trouble.append(f"{exc} at {offset}")
            self.reads += 1

    def reads_on(self) -> None:
        """Return when some more reads were right."""
        wanted = self.reads + 20
        eventually(lambda: self.reads >= wanted or self.trouble, PATIENCE_S)
        assert self.trouble == []

    def stop(self) -> None:
        self.is_stopped = True
        self.join(PATIENCE_S)
        os.close(self.fd)
        assert self.trouble == []


def devices_of(rig: Rig) -> str:
    """Loop devices over the rig's volumes."""
    listed = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in listed.stdout.splitlines() if str(rig.directory) in line)


def test_an_image_is_read_from_its_volume(cinder_rig: Rig, basefs_mount: MountFactory, source: Path) -> None:
    """[S2001] An image whose bytes Glance keeps in a Cinder volume is read from that volume, attached read-only, from
    soon after its first open on; open and reads do not wait for it.

    [S2002] An image has the same bytes and the same size whichever way they come, also for who reads while it is
    linked or detached.

    [S2003] What is read from a volume is not fetched from Glance, and an image that is linked is not brought here in
    the background.

    [S2004] `basefs image show` and the extended attributes `user.basefs.volume_id`, `.clone_id`, `.attachment_id`,
    `.connector` and `.device` say what an image is linked to.

    [S2005] `basefs image warm` links an image that has a volume, instead of fetching it.

    [S2010] `basefs image detach` of an image in use is refused; with `--force` it is detached and read through Glance,
    until it is opened again.

    [S2011] After `basefs unmount` nothing of it is left in Cinder or on the host.
    """
    image_id, other_id = cinder_rig.place_cinder(source, "linked"), cinder_rig.place_cinder(source, "warmed")
    mount = basefs_mount(cinder_rig, {**AUTO, "hydrate_concurrency_max": 2, "hydrate_delay_s": 0})
    assert "is linked to its volume" in mount.cli("image", "warm", other_id).stdout
    path = mount.path(image_id)
    with path.open("rb", buffering=0) as file:
        assert file.read(10) == CONTENT[:10]
        image = wait_for(mount, image_id, "linked")
    assert (image["state"], image["handler"]) == ("linked", "volume-linking")
    assert image["volume_id"] == cinder_rig.volume_of(image_id)
    attached = {one["id"]: one["attach_mode"] for one in cinder_rig.cinder_api().attachments()}
    assert list(attached.values()) == ["ro", "ro"]
    assert image["attachment_id"] in attached
    assert Path(image["device"]).is_block_device()
    for name in ("volume_id", "attachment_id", "connector", "device"):
        assert os.getxattr(path, f"user.basefs.{name}").decode() == image[name]
    assert (image["clone_id"], path.stat().st_size) == (None, BYTES)

    fetched = mount.status()["fetched_bytes"]
    reader = Reader(path)
    reader.reads_on()
    assert path.read_bytes() == CONTENT
    status = mount.status()
    assert (status["fetched_bytes"], status["images_linked"]) == (fetched, 2)

    refused = mount.cli("image", "detach", image_id, check=False)
    assert refused.returncode == 1
    assert "in use (open" in refused.stderr
    mount.cli("image", "detach", "--force", image_id)
    reader.reads_on()
    assert mount.image(image_id)["link_reason"].startswith("an operator detached it")
    assert [one["volume_id"] for one in cinder_rig.cinder_api().attachments()] == [cinder_rig.volume_of(other_id)]
    reader.stop()
    mount.unmount()
    assert cinder_rig.cinder_api().attachments() == []
    assert devices_of(cinder_rig) == ""


def test_servers_that_are_killed(
    cinder_rig: Rig, basefs_mount: MountFactory, source: Path, expected_warnings: ExpectedWarnings
) -> None:
    """[S2010] `basefs image detach` of an image in use is refused; with `--force` it is detached and read through
    Glance, until it is opened again.

    [S2006] A volume that cannot be attached more than once is cloned for this host, and the clone is deleted after
    it was detached.

    [S2007] When the server is killed, the next one reads on from the same device.

    [S2008] When keeper and server are killed, the next mount detaches what is not used, and links anew what is opened.

    [S2009] An attachment that somebody deletes in Cinder costs no read.
    """
    expected_warnings("server .* died")
    expected_warnings("removing the mount that a basefs left behind")
    cinder = cinder_rig.cinder_api()
    image_id = cinder_rig.place_cinder(source, "cloned", multiattach=False)
    mount = basefs_mount(cinder_rig, {**AUTO, "volume_linking.detach_idle_s": 0})
    with mount.path(image_id).open("rb", buffering=0) as file:
        assert file.read(10) == CONTENT[:10]
        wait_for(mount, image_id, "linked")
        mount.cli("image", "detach", "--force", image_id)
    reader = Reader(mount.path(image_id))
    image = wait_for(mount, image_id, "linked")
    assert image["clone_id"] not in (None, cinder_rig.volume_of(image_id))
    os.kill(mount.status()["server_pid"], signal.SIGKILL)
    reader.reads_on()
    again = wait_for(mount, image_id, "linked")
    assert (again["attachment_id"], again["device"]) == (image["attachment_id"], image["device"])
    cinder.delete_attachment(image["attachment_id"])
    reader.reads_on()
    reader.stop()

    status = mount.status()
    for pid in (status["keeper_pid"], status["server_pid"]):
        os.kill(pid, signal.SIGKILL)
    mount.start()
    eventually(lambda: not any("basefs_host" in one["metadata"] for one in cinder.volumes()), PATIENCE_S)
    assert mount.path(image_id).read_bytes() == CONTENT


def test_only_images_with_a_volume(cinder_rig: Rig, basefs_mount: MountFactory, source: Path) -> None:
    """[S2012] With `template_image_handler = volume-linking` an image without a volume is ENOENT, and `basefs image
    show` says why.
    """
    linked_id, other_id = cinder_rig.place_cinder(source, "has a volume"), cinder_rig.upload(CONTENT, "has none")
    mount = basefs_mount(cinder_rig, {**AUTO, "template_image_handler": "volume-linking"})
    assert mount.path(linked_id).read_bytes() == CONTENT
    with pytest.raises(OSError) as refusal:
        mount.path(other_id).stat()
    assert refusal.value.errno == errno.ENOENT
    image = mount.image(other_id)
    assert image["state"] == "refused"
    assert image["refused_reason"].startswith("template_image_handler is volume-linking:")
