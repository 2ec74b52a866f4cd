"""The rig's Ceph: Cinder's stock RBD driver and Glance's rbd store work on it."""

import os

import pytest

from tools.rig import ApiError, Rig

pytestmark = [pytest.mark.glance, pytest.mark.cinder, pytest.mark.ceph]


def test_glance_keeps_an_image_in_a_volume_of_the_rbd_driver(ceph_rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = ceph_rig.upload_cinder(data, "in a volume", backend="rbd")
    volume = ceph_rig.cinder_api().volume(ceph_rig.volume_of(image_id))
    assert (volume["volume_type"], volume["multiattach"]) == ("rbd", True)
    assert ceph_rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == data


def test_the_rbd_store_refuses_a_range_and_sends_the_whole_image(ceph_rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = ceph_rig.upload(data, "in an rbd image", store="ceph")
    assert ceph_rig.api().get(image_id)["direct_url"].startswith("rbd://")
    with pytest.raises(ApiError) as refused:
        ceph_rig.api().call("GET", f"/v2/images/{image_id}/file", headers={"Range": "bytes=5-9"})
    assert refused.value.status == 400
    assert ceph_rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == data
