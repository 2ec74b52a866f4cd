"""nova's own code, and the base files that basefs leaves to it."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.nova.conftest import NOVA_USER_OF_GLANCE, Site, mounted_site, same_guest_bytes
from tests.nova.nova_node import NovaNode
from tests.nova.test_nova_on_basefs import LONG_AGO
from tools.mount import base_name
from tools.rig import Rig

pytestmark = [pytest.mark.nova, pytest.mark.mount, pytest.mark.glance]


def described(path: Path) -> tuple[int, int, int, int, int]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size


def test_after_drain_and_unmount_nova_finds_what_its_own_download_would_have_left(
    nova: NovaNode, rig: Rig, plain_site: Site, basefs_mount: MountFactory, raw_file: Path, qcow2_file: Path
) -> None:
    raw, qcow2 = plain_site.upload(raw_file), plain_site.upload(qcow2_file, "qcow2")
    for image_id in (raw, qcow2):
        plain_site.boot(image_id)
    site = mounted_site(nova, basefs_mount(options={"graduate": True}, start=False), rig)
    instances = [site.boot(image_id)[0] for image_id in (raw, qcow2)]
    site.mount.cli("drain")
    again, answer = site.boot(raw)
    assert answer.glance_requests == []
    site.mount.unmount()
    assert sorted(os.listdir(site.base)) == sorted(os.listdir(plain_site.base))
    for image_id in (raw, qcow2):
        assert described(site.path(image_id)) == described(plain_site.path(image_id))
        assert site.path(image_id).read_bytes() == plain_site.path(image_id).read_bytes()
        assert site.path(image_id).stat().st_blocks <= 1.1 * plain_site.path(image_id).stat().st_blocks
    for instance in (*instances, again):
        assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")
        subprocess.run(["qemu-img", "check", "-q", site.disk(instance)], check=True)
    last, answer = site.boot(qcow2)
    assert answer.downloads == []
    assert same_guest_bytes(raw_file, site.disk(last), "qcow2")


def test_the_cache_manager_owns_the_file_and_after_it_the_image_is_lazy_again(
    nova: NovaNode, rig: Rig, basefs_mount: MountFactory, raw_file: Path
) -> None:
    image_id = rig.api(NOVA_USER_OF_GLANCE).upload(raw_file, "graduates")
    name = base_name(image_id)
    site = mounted_site(nova, basefs_mount(options={"graduate": True}, start=False), rig)
    instance, _ = site.boot(image_id)
    site.mount.cli("drain")
    assert site.control.image(image_id)["state"] == "graduated"
    os.utime(site.path(image_id), (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[instance])
    assert answer.result["active"] == [name]
    assert site.path(image_id).stat().st_mtime > LONG_AGO + 86400
    os.utime(site.path(image_id), (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[])
    assert name in answer.result["removable"]
    assert answer.messages("ERROR") == []
    assert site.control.image(image_id)["state"] == "cold"
    seen = site.node.look(name=name).result
    assert seen["size"] == raw_file.stat().st_size
    assert name not in seen["listing"]
    assert same_guest_bytes(raw_file, site.disk(instance), "qcow2")
