"""nova's own code, and a real guest, on a cold image that is read where Glance keeps it: in Ceph and in S3."""

from collections.abc import Iterator

import pytest

from tests.conftest import MountFactory
from tests.nova.conftest import mounted_site
from tests.nova.nova_node import NovaNode
from tests.qemu.test_guest_boot import assert_healthy, sent_bytes
from tools.guest import boot, build, packed
from tools.rig import Rig, radosgw

pytestmark = [
    pytest.mark.nova, pytest.mark.guest, pytest.mark.mount, pytest.mark.glance, pytest.mark.ceph,
]  # fmt: skip


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Without a Keystone, whose tokens the tests' nova does not know."""
    with Rig(tmp_path_factory.mktemp("stores-rig"), object_stores=True) as running:
        radosgw.allow_reader(running.ceph.s3_url)
        yield running


@pytest.mark.parametrize("nova", ["nova34"], indirect=True)
@pytest.mark.parametrize(("store", "source"), [("ceph", "rbd"), ("s3", "s3")])
def test_a_guest_boots_cold_from_the_store_and_glance_sends_no_byte_of_the_image(
    nova: NovaNode, rig: Rig, basefs_mount: MountFactory, store: str, source: str
) -> None:
    guest = build()
    image_id = rig.upload(packed(guest), f"debian12 in {store}", "qcow2", store=store, visibility="public")
    ours = len(rig.requests(f"{image_id}/file"))
    options = {
        "nova_user": "nobody",
        "rbd.pools": "images",
        "rbd.ceph_conf": rig.ceph.conf_path,
        "s3.endpoint": rig.ceph.s3_url,
        "s3.buckets": radosgw.BUCKET,
        "s3.access_key": radosgw.READER_KEY,
        "s3.secret_key": radosgw.READER_SECRET,
    }
    mount = basefs_mount(rig, options, start=False)
    site = mounted_site(nova, mount, rig)
    instance, answer = site.boot(image_id, root_gb=4)
    assert answer.complaints == []
    assert answer.downloads == []
    assert source in str(mount.image(image_id)["read_from"])
    assert_healthy(boot(site.disk(instance), guest, check=True), guest)
    assert len(rig.requests(f"{image_id}/file")) == ours
    assert sent_bytes(rig, image_id) == 0
