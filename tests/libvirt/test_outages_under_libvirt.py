"""A guest that libvirt started, with qemu in namespaces of its own, waits through what makes others fail."""

import errno
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.libvirt.boot_sector import BootableImage
from tests.libvirt.domain import Domain
from tests.libvirt.libvirtd import libvirtd
from tests.qemu.shared_mount import server_pid
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.libvirt, pytest.mark.mount, pytest.mark.glance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted:
    """A guest that waits for its first pass; all but the header of its image is cold."""

    rig: Rig
    mount: BasefsMount
    image_id: str
    domain: Domain


@pytest.fixture
def booted(own_rig: Rig, basefs_mount: MountFactory, image: BootableImage) -> Iterator[Booted]:
    mount = basefs_mount(own_rig, {"other_io_deadline_s": 2})
    image_id = own_rig.upload(image.content, "bootable")
    with libvirtd(mount.instances_path) as libvirt:
        domain = Domain(libvirt, uuid.uuid4(), mount.path(image_id).name)
        domain.create()
        domain.virsh("start")
        yield Booted(rig=own_rig, mount=mount, image_id=image_id, domain=domain)


def test_a_guest_waits_for_a_frozen_glance_when_others_get_an_error(
    booted: Booted, image: BootableImage, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("did not come within 2 s")
    with booted.domain.console() as console:
        booted.rig.pause()
        console.begin_pass()
        with booted.mount.path(booted.image_id).open("rb") as other, pytest.raises(OSError) as raised:
            os.pread(other.fileno(), 4096, len(image.content) // 2)
        assert raised.value.errno == errno.EIO
        booted.rig.resume()
        assert console.end_pass() == (1, image.pass_hash)


def test_a_guest_does_not_notice_a_killed_server(
    booted: Booted, image: BootableImage, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(r"keeper server \d+ died")
    with booted.domain.console() as console:
        console.begin_pass()
        os.kill(server_pid(booted.mount), signal.SIGKILL)
        assert console.end_pass() == (1, image.pass_hash)
