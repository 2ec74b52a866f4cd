"""nova's own code, and a real guest, on an image that is read from its Cinder volume."""

import os
import shutil

import pytest

from tests.conftest import MountFactory
from tests.faults.readers import eventually
from tests.nova.conftest import NOVA_USER_OF_GLANCE, mounted_site
from tests.nova.nova_node import NovaNode
from tests.nova.test_nova_on_basefs import LONG_AGO
from tests.qemu.test_guest_boot import assert_healthy, sent_bytes
from tools.guest import boot, build
from tools.linked import linking_options, state_of, wait_for_state
from tools.mount import base_name
from tools.rig import Rig

pytestmark = [pytest.mark.nova, pytest.mark.guest, pytest.mark.mount, pytest.mark.glance, pytest.mark.cinder]

HEADER_BYTES = 1 << 20


@pytest.mark.parametrize("nova", ["nova34"], indirect=True)
def test_a_guest_boots_from_the_overlay_that_nova_put_on_a_linked_image(
    nova: NovaNode, cinder_rig: Rig, basefs_mount: MountFactory
) -> None:
    guest = build()
    image_id = cinder_rig.place_cinder(guest.disk, "debian12", visibility="public")
    assert cinder_rig.api(NOVA_USER_OF_GLANCE).get(image_id)["status"] == "active"
    mount = basefs_mount(cinder_rig, linking_options("nova", detach_idle_s=0), start=False)
    site = mounted_site(nova, mount, cinder_rig)
    with open(site.path(image_id), "rb"):
        wait_for_state(site.path(image_id), "linked")
        instance, answer = site.boot(image_id, root_gb=4)
        assert answer.complaints == []
        assert answer.downloads == []
    assert state_of(site.path(image_id)) == "linked", "the instance's overlay needs it"
    assert_healthy(boot(site.disk(instance), guest, check=True), guest)
    assert sent_bytes(cinder_rig, image_id) <= HEADER_BYTES

    shutil.rmtree(site.disk(instance).parent)
    os.utime(site.path(image_id), (LONG_AGO, LONG_AGO))
    answer = site.node.manage_image_cache(uuids=[])
    assert base_name(image_id) in answer.result["removable"]
    assert answer.messages("ERROR") == []
    eventually(lambda: not cinder_rig.cinder_api().attachments())
    cinder_rig.api().delete(image_id)
