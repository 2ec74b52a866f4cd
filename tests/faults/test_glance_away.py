"""No Glance: at the start, for a while, for ever; and a guest that waits through it."""

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.keystone import FakeKeystone
from tests.faults.conftest import HEADER_BYTES, MIB, Site
from tests.faults.readers import (
    LIMIT_S,
    errno_of,
    eventually,
    guest_copying,
    opened,
    pread,
    read_at,
    reader_threads,
)
from tools.mount import base_name
from tools.rig import Rig

pytestmark = pytest.mark.mount

PART = 64 * 1024
NOBODY = "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
DEADLINES = {"other_io_deadline_s": 1.0, "lookup_deadline_s": 20.0, "guest_io_deadline_s": 60.0}


def test_a_start_without_glance_ever_serves_the_lower_directory_and_knows_no_image(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("Glance is away.*refused")
    expected_warnings("lookup answered EIO.*cannot be asked")
    mount = basefs_mount(NOBODY, DEADLINES, start=False)
    (mount.mountpoint / "swap_512").write_bytes(b"swap")
    mount.start()
    for _ in range(3):
        assert errno_of((mount.mountpoint / base_name("unknown")).stat) == errno.EIO, "unknown is not absent"
    assert (mount.mountpoint / "swap_512").read_bytes() == b"swap"
    assert errno_of((mount.mountpoint / f"{base_name('unknown')}.part").stat) == errno.ENOENT
    assert set(os.listdir(mount.mountpoint)) == {".basefs", "swap_512"}
    assert mount.status()["glance_reachable"] is False


def test_a_start_while_glance_is_away_serves_known_names_and_what_is_cached(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(4 * MIB)
    with MisbehavingFront() as front:
        image_id = front.glance.add(data)
        mount = basefs_mount(front.conf_lines(), DEADLINES)
        path = mount.mountpoint / base_name(image_id)
        assert read_at(path, 2 * MIB, PART) == data[2 * MIB :][:PART]
        mount.unmount()
    expected_warnings("Glance is away.*refused")
    mount.start()
    assert path.name in os.listdir(mount.mountpoint)
    assert path.stat().st_size == len(data)
    assert read_at(path, 0, HEADER_BYTES) == data[:HEADER_BYTES]
    assert read_at(path, 2 * MIB, PART) == data[2 * MIB :][:PART]
    expected_warnings("read answered EIO.*refused")
    assert errno_of(lambda: read_at(path, len(data) - PART, PART)) == errno.EIO


@pytest.mark.glance
def test_a_glance_that_is_stopped_and_started_loses_no_guest_and_no_byte(
    own_rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    data = os.urandom(3 * MIB + 5)
    image_id = own_rig.upload(data, "disk")
    mount = basefs_mount(own_rig, DEADLINES)
    path = mount.mountpoint / base_name(image_id)
    path.stat()
    own_rig.stop_service("glance")
    expected_warnings("Glance is away.*refused")
    expected_warnings("read answered EIO.*refused")
    out = tmp_path / "out"
    with guest_copying(tmp_path, path, out=out) as guest, opened(path) as fd:
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        assert pread(fd, 0, PART) == data[:PART]
        eventually(lambda: out.stat().st_size == HEADER_BYTES)
        assert guest.poll() is None, "the guest waits"
        own_rig.start_service("glance")
        assert guest.wait(LIMIT_S) == 0
        assert out.read_bytes() == data
        assert pread(fd, HEADER_BYTES, PART) == data[HEADER_BYTES:][:PART]


@pytest.mark.glance
def test_a_glance_that_is_frozen_loses_no_reader_and_delays_nobody_who_needs_it_not(
    own_rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    expected_warnings.may_come("Glance is away: no answer")  # after 10 s
    data = os.urandom(2 * MIB)
    image_id = own_rig.upload(data, "disk")
    mount = basefs_mount(own_rig, {"lookup_deadline_s": 60.0, "other_io_deadline_s": 60.0})
    path = mount.mountpoint / base_name(image_id)
    path.stat()
    own_rig.pause()
    out = tmp_path / "out"
    with guest_copying(tmp_path, path, out=out) as guest, opened(path) as fd, reader_threads(2) as pool:
        try:
            missing = pool.submit(pread, fd, HEADER_BYTES, PART)
            unknown = pool.submit(errno_of, (mount.mountpoint / base_name("unknown")).stat)
            eventually(lambda: out.stat().st_size == HEADER_BYTES)
            for _ in range(3):
                assert path.name in os.listdir(mount.mountpoint)
                assert path.stat().st_size == len(data)
                assert pread(fd, 0, PART) == data[:PART]
            assert not missing.done()
            assert not unknown.done()
            assert guest.poll() is None
        finally:
            own_rig.resume()
        assert missing.result() == data[HEADER_BYTES:][:PART]
        assert unknown.result() == errno.ENOENT
        assert guest.wait(LIMIT_S) == 0
    assert out.read_bytes() == data


@pytest.mark.parametrize("code", [401, 403, 429, 503])
def test_a_guest_waits_through_what_an_operator_can_mend(
    code: int, site: Site, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    image = site.add()
    image.path.stat()
    expected_warnings(f"image {image.image_id}.*{code}")
    site.front.on(image.file_path).respond(answers.status(code))
    out = tmp_path / "out"
    with guest_copying(tmp_path, image.path, out=out) as guest:
        eventually(lambda: out.stat().st_size == HEADER_BYTES)
        assert errno_of(lambda: read_at(image.path, 2 * MIB, PART)) == errno.EIO, "nobody else waits that long"
        assert guest.poll() is None
        site.front.behave()
        assert guest.wait(LIMIT_S) == 0
    assert out.read_bytes() == image.data


# --- tokens ------------------------------------------------------------------------------------------


def test_a_401_authenticates_again_once_and_the_reader_sees_nothing(
    front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    keystone = FakeKeystone(front)
    data = os.urandom(2 * MIB)
    paths = [base_name(front.glance.add(data)) for _ in range(3)]
    mount = basefs_mount(keystone.conf_lines())
    for name in paths:
        with opened(mount.mountpoint / name) as fd:
            issued = len(keystone.issued)
            keystone.revoke()
            assert pread(fd, HEADER_BYTES, PART) == data[HEADER_BYTES:][:PART]
            assert len(keystone.issued) == issued + 1


def test_a_401_to_every_token_is_eio_and_costs_keystone_little(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    keystone = FakeKeystone(front)
    data = os.urandom(2 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(keystone.conf_lines(), DEADLINES)
    path = mount.mountpoint / base_name(image_id)
    with opened(path) as fd:
        front.on("/file").respond(answers.status(401))
        expected_warnings(f"image {image_id}.*401")
        issued = len(keystone.issued)
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        assert len(keystone.issued) <= issued + 1
        front.behave()
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == data[HEADER_BYTES:][:PART])


@pytest.mark.keystone
def test_reads_go_on_while_tokens_of_seconds_expire(keystone_rig: Rig, basefs_mount: MountFactory) -> None:
    """Tokens live 34 s and are renewed 30 s before their end: a new one every four seconds."""
    data = os.urandom(5 * MIB)
    image_id = keystone_rig.upload(data, "disk")
    mount = basefs_mount(keystone_rig)
    path = mount.mountpoint / base_name(image_id)
    tokens = len(token_requests(keystone_rig))
    pause = threading.Event()
    with opened(path) as fd:
        for offset in range(0, len(data), MIB):
            assert pread(fd, offset, PART) == data[offset:][:PART]
            pause.wait(1.2)
    assert len(token_requests(keystone_rig)) >= tokens + 1


def token_requests(rig: Rig) -> list[str]:
    """The requests for a token that Keystone has answered."""
    log = Path(rig.directory) / "log" / "keystone-requests.jsonl"
    return [line for line in log.read_text().splitlines() if "auth/tokens" in line and "POST" in line]
