"""The rig's Cinder: what the tests believe of it, of Glance's images in it, and of what is left of it, is so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.rig import ApiError, Rig, leftovers
from tools.rig.leftovers import loop_devices_below, mounts_below, release

pytestmark = [pytest.mark.glance, pytest.mark.cinder]
LEFTOVERS = str(leftovers.__file__)
CONNECTOR = {"host": "node", "ip": "127.0.0.1", "platform": "x86_64", "os_type": "linux", "multipath": False}


def attach(rig: Rig, volume_id: str) -> tuple[str, dict[str, Any]]:
    """Attach read-only, as basefs does; returns the attachment's id and its connection_info."""
    cinder = rig.cinder_api()
    body = {"attachment": {"volume_uuid": volume_id, "mode": "ro"}}
    made = cinder.call("POST", "/attachments", body)[1]["attachment"]["id"]
    answer = cinder.call("PUT", f"/attachments/{made}", {"attachment": {"connector": CONNECTOR}})
    cinder.call("POST", f"/attachments/{made}/action", {"os-complete": made})
    return made, answer[1]["attachment"]["connection_info"]


def test_glance_keeps_an_image_in_a_volume_of_the_type_asked_for(cinder_rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = cinder_rig.upload_cinder(data, "in cinder", multiattach=False)
    volume = cinder_rig.cinder_api().volume(cinder_rig.volume_of(image_id))
    assert (volume["volume_type"], volume["multiattach"], volume["status"]) == ("plain", False, "available")
    assert volume["metadata"]["glance_image_id"] == image_id
    assert volume["metadata"]["image_size"] == "100000"
    assert cinder_rig.api().get(image_id)["direct_url"] == f"cinder://plain/{volume['id']}"
    assert cinder_rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == data


def test_a_multiattach_volume_is_a_read_only_device_that_all_its_attachments_share(
    cinder_rig: Rig, tmp_path: Path
) -> None:
    data = os.urandom(100_000)
    (tmp_path / "image").write_bytes(data)
    image_id = cinder_rig.place_cinder(tmp_path / "image", "placed")
    volume_id, cinder = cinder_rig.volume_of(image_id), cinder_rig.cinder_api()
    (first, connection), (second, again) = attach(cinder_rig, volume_id), attach(cinder_rig, volume_id)
    assert connection["driver_volume_type"] == "local"
    assert again["device_path"] == connection["device_path"]
    with open(connection["device_path"], "r+b", buffering=0) as device, pytest.raises(PermissionError):
        device.write(bytes(512))
    with open(connection["device_path"], "rb") as device:
        assert device.read(len(data)) == data
        assert os.lseek(device.fileno(), 0, os.SEEK_END) == 1 << 30
    assert cinder_rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == data, "Glance works on it meanwhile"
    cinder.delete_attachment(first)
    assert loop_devices_below(cinder_rig.directory) == [connection["device_path"]]
    cinder.delete_attachment(second)
    assert not loop_devices_below(cinder_rig.directory)
    cinder_rig.api().delete(image_id)


def test_a_second_attachment_of_a_plain_volume_is_refused(cinder_rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"plain")
    volume_id = cinder_rig.volume_of(cinder_rig.place_cinder(tmp_path / "image", "plain", multiattach=False))
    attachment_id, _ = attach(cinder_rig, volume_id)
    with pytest.raises(ApiError) as refused:
        attach(cinder_rig, volume_id)
    assert refused.value.status == 400
    cinder_rig.cinder_api().delete_attachment(attachment_id)


def test_a_user_sees_the_volumes_of_the_own_project_only(cinder_rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"of the service project")
    volume_id = cinder_rig.volume_of(cinder_rig.place_cinder(tmp_path / "image", "whose"))
    assert cinder_rig.cinder_api("basefs-service").volume(volume_id)["id"] == volume_id
    with pytest.raises(ApiError) as refused:
        cinder_rig.cinder_api("u1").volume(volume_id)
    assert refused.value.status == 404


def test_a_request_to_cinder_is_in_the_log_before_its_answer_is(cinder_rig: Rig) -> None:
    volume_id = cinder_rig.cinder_api().create_volume(1, "plain")
    cinder_rig.cinder_api().delete_volume(volume_id)
    last = cinder_rig.requests(volume_id, "cinder")[-1]
    assert (last.method, last.path, last.status) == ("DELETE", f"/v3/volumes/{volume_id}", 202)


def test_a_stopped_cinder_refuses_and_comes_back_with_its_volumes(cinder_rig: Rig) -> None:
    volume_id = cinder_rig.cinder_api().create_volume(1, "multi")
    cinder_rig.stop_service("cinder")
    try:
        with pytest.raises(ConnectionRefusedError):
            cinder_rig.cinder_api().volumes()
    finally:
        cinder_rig.start_service("cinder")
    assert cinder_rig.cinder_api().volume(volume_id)["status"] == "available"


def test_the_stock_nfs_driver_gives_a_file_below_a_mount(cinder_rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = cinder_rig.upload_cinder(data, "on nfs", multiattach=False, backend="nfs")
    attachment_id, connection = attach(cinder_rig, cinder_rig.volume_of(image_id))
    assert (connection["driver_volume_type"], connection["export"]) == ("nfs", "127.0.0.1:/rig")
    path = Path(cinder_rig.cinder.share, connection["name"])
    assert path.read_bytes()[: len(data)] == data
    cinder_rig.cinder_api().delete_attachment(attachment_id)
    seen = [image["id"] for image in cinder_rig.api("u1").list()]
    assert image_id not in seen, "a private image of another project"


def test_loop_devices_and_mounts_go_when_the_starter_is_killed(tmp_path: Path) -> None:
    lifeline, held = os.pipe()
    for name in ("file", "mounted"):
        (tmp_path / name).mkdir()
    (tmp_path / "file" / "volume").write_bytes(bytes(4096))
    watcher = subprocess.Popen([sys.executable, LEFTOVERS, tmp_path, str(lifeline)], pass_fds=[lifeline])
    os.close(lifeline)
    try:
        subprocess.run(["losetup", "--find", tmp_path / "file" / "volume"], check=True)
        subprocess.run(["mount", "--bind", tmp_path / "file", tmp_path / "mounted"], check=True)
        assert loop_devices_below(str(tmp_path))
        assert mounts_below(str(tmp_path))
        os.close(held)  # as the kernel does for a process that is killed
        assert watcher.wait(30) == 0
        assert not loop_devices_below(str(tmp_path))
        assert not mounts_below(str(tmp_path))
    finally:
        watcher.kill()
        release(str(tmp_path))
