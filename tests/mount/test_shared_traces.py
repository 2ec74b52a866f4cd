"""A node that never booted an image knows from Glance what a boot of it reads."""

import json
import os

import pytest

from basefs.core.boot_trace import UNIT_BYTES, BootTrace, TracedImage, TraceRange
from basefs.core.trace_property import PROPERTY, property_of
from tests.conftest import MountFactory
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]
MIB = 1 << 20


def test_a_trace_that_another_node_left_in_glance_is_replayed(rig: Rig, basefs_mount: MountFactory) -> None:
    data = os.urandom(12 * MIB)
    image_id = rig.upload(data, "traced", "raw")
    _, image = rig.api().call("GET", f"/v2/images/{image_id}")
    traced = TracedImage(
        image_id=image_id, size=len(data), os_hash_algo=image["os_hash_algo"], os_hash_value=image["os_hash_value"]
    )
    ranges = (TraceRange(8 * MIB // UNIT_BYTES, 20, 0), TraceRange(4 * MIB // UNIT_BYTES, 3, 90))
    text = property_of(BootTrace(image=traced, boots=2, by_guest=True, ranges=ranges))
    change = [{"op": "add", "path": f"/{PROPERTY}", "value": text}]
    rig.api().call(
        "PATCH", f"/v2/images/{image_id}", change, content_type="application/openstack-images-v2.1-json-patch"
    )
    mount = basefs_mount(rig, options={"trace.share": "glance"})
    mount.path(image_id).stat()
    rows = {row["image_id"]: row for row in json.loads(mount.cli("trace", "list", "-f", "json").stdout)}
    assert (rows[image_id]["traced_bytes"], rows[image_id]["boots"]) == (23 * UNIT_BYTES, 2)
    mount.cli("image", "warm", "--boot", image_id)
    before = mount.status()["fetched_bytes"]
    with open(mount.path(image_id), "rb") as disk:
        assert os.pread(disk.fileno(), 20 * UNIT_BYTES, 8 * MIB) == data[8 * MIB :][: 20 * UNIT_BYTES]
        assert os.pread(disk.fileno(), UNIT_BYTES, 4 * MIB) == data[4 * MIB :][:UNIT_BYTES]
    assert mount.status()["planner"]["in_flight"] >= 3
    assert before >= 24 * UNIT_BYTES
