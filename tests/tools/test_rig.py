"""The rig: what the tests believe about Glance is so."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.mount import ROOT
from tools.rig import ApiError, Rig

pytestmark = pytest.mark.glance


def test_the_file_store_answers_a_range_with_exactly_its_bytes(rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = rig.upload(data, "ranged")
    headers, body = rig.api().call("GET", f"/v2/images/{image_id}/file", headers={"Range": "bytes=5-70004"})
    assert (headers["Content-Range"], body) == ("bytes 5-70004/100000", data[5:70005])


def test_the_http_store_refuses_a_range_and_sends_the_whole_image(rig: Rig) -> None:
    data = os.urandom(100_000)
    image_id = rig.upload_web(data, "streamed")
    with pytest.raises(ApiError) as refused:
        rig.api().call("GET", f"/v2/images/{image_id}/file", headers={"Range": "bytes=5-9"})
    assert refused.value.status == 400
    assert rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == data


def test_clones_are_images_with_bytes_of_their_own_id(rig: Rig) -> None:
    original = rig.upload(b"bytes of all", "original")
    for image_id in rig.clone(original, 3):
        assert rig.api().call("GET", f"/v2/images/{image_id}/file")[1] == b"bytes of all"


def test_a_placed_file_is_an_image_that_was_never_sent(rig: Rig, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with open(source, "wb") as out:
        out.truncate(1 << 30)
        os.pwrite(out.fileno(), b"far", (1 << 30) - 3)
    image_id = rig.place(source, "placed")
    assert rig.api().get(image_id)["size"] == 1 << 30
    last = {"Range": f"bytes={(1 << 30) - 4}-"}
    assert rig.api().call("GET", f"/v2/images/{image_id}/file", headers=last)[1] == b"\0far"
    assert os.stat(rig.data_path(image_id)).st_blocks * 512 < 1 << 20


def test_a_request_is_in_the_log_before_its_answer_is(rig: Rig) -> None:
    image_id = rig.upload(b"0123456789", "logged")
    rig.api().call("GET", f"/v2/images/{image_id}/file", headers={"Range": "bytes=2-4"})
    put, get = rig.requests(f"{image_id}/file")
    assert (put.method, put.status) == ("PUT", 204)
    assert (get.method, get.range, get.status, get.length) == ("GET", "bytes=2-4", 206, 3)


def test_an_expired_token_is_unauthorized(rig: Rig) -> None:
    token = rig.token("u2")
    rig.expire(token)
    with pytest.raises(ApiError) as refused:
        rig.api("u2").list()
    assert refused.value.status == 401


def test_a_stopped_glance_refuses_connections_and_comes_back_on_its_port(own_rig: Rig) -> None:
    image_id = own_rig.upload(b"kept", "kept")
    own_rig.stop_service("glance")
    with pytest.raises(ConnectionRefusedError):
        own_rig.api().list()
    own_rig.start_service("glance")
    assert [image["id"] for image in own_rig.api().list()] == [image_id]


@pytest.mark.keystone
def test_keystone_hands_out_tokens_that_glance_takes(keystone_rig: Rig) -> None:
    image_id = keystone_rig.api("u1").upload(b"of u1", "private of u1")
    assert image_id in [image["id"] for image in keystone_rig.api("u1").list()]
    assert image_id not in [image["id"] for image in keystone_rig.api("u2").list()]
    assert keystone_rig.api("basefs").get(image_id)["name"] == "private of u1"


def test_services_end_when_their_starter_is_killed(tmp_path: Path) -> None:
    program = "import sys; from tools.rig import Rig; r = Rig(sys.argv[1]); r.start(); print(*r.pids.values()); input()"
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    watched = [os.pidfd_open(int(pid)) for pid in starter.stdout.readline().split()]
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    for pidfd in watched:
        _wait_for_end(pidfd)


def _wait_for_end(pidfd: int) -> None:
    try:
        assert select.select([pidfd], [], [], 10)[0], "still running 10 s later"
    finally:
        os.close(pidfd)
