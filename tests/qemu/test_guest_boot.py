"""A real Debian guest on a cold image: it boots, it does not notice a killed server, and little is fetched."""

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.qemu.shared_mount import server_pid
from tools.guest import BootResult, Guest, boot, build, create_overlay, packed
from tools.rig import Rig

pytestmark = [pytest.mark.guest, pytest.mark.mount, pytest.mark.glance]

MB = 1_000_000
# The recorded boot touches 43 MB at 64 KiB (traces/debian12-boot.json), the check 34 MB more; 489 MB are allocated.
FETCHED_BYTES_MAX = 150 * MB
# Of 202 MB stored; the payload, which does not compress, is 34 of them.
PACKED_BYTES_MAX = 100 * MB
LOOK_AGAIN_S = 0.5
TROUBLE = re.compile(r"I/O error|EXT4-fs (error|warning)|blk_update_request|critical medium|Remounting filesystem|hung")


@pytest.fixture(scope="module")
def guest() -> Guest:
    return build()


@pytest.fixture(scope="module")
def image_id(rig: Rig, guest: Guest) -> Iterator[str]:
    """The guest's disk, 3 GiB, in Glance."""
    uploaded = rig.place(guest.disk, "debian12")
    yield uploaded
    rig.api().delete(uploaded)


def assert_healthy(result: BootResult, guest: Guest) -> None:
    assert TROUBLE.findall(result.console) == []
    assert result.payload_sha256 == guest.payload_sha256


def sent_bytes(rig: Rig, image_id: str) -> int:
    """What Glance has sent of the image."""
    return sum(one.length for one in rig.requests(f"{image_id}/file") if one.method == "GET")


def test_a_guest_boots_on_a_cold_compressed_qcow2_image_and_fetches_little_of_it(
    basefs_mount: MountFactory, rig: Rig, guest: Guest, tmp_path: Path
) -> None:
    image_id = rig.place(packed(guest), "debian12-packed", "qcow2")
    mount = basefs_mount()
    try:
        base = mount.path(image_id)
        assert base.stat().st_size == guest.disk.stat().st_size
        create_overlay(base, tmp_path / "overlay")
        assert_healthy(boot(tmp_path / "overlay", guest, check=True), guest)
        assert mount.image(image_id)["fetched_bytes"] <= PACKED_BYTES_MAX
    finally:
        rig.api().delete(image_id)


def test_a_guest_does_not_notice_that_the_server_is_killed_again_and_again(
    rig: Rig,
    basefs_mount: MountFactory,
    expected_warnings: ExpectedWarnings,
    guest: Guest,
    image_id: str,
    tmp_path: Path,
) -> None:
    expected_warnings(r"keeper server \d+ died")
    mount = basefs_mount()
    base = mount.path(image_id)
    create_overlay(base, tmp_path / "overlay")
    with ThreadPoolExecutor(1) as pool:
        booting = pool.submit(boot, tmp_path / "overlay", guest, check=True)
        servers: list[int] = []
        for present_mb in (5, 25, 45, 65):
            while base.stat().st_blocks * 512 < present_mb * MB:
                wait([booting], timeout=LOOK_AGAIN_S)
                assert not booting.done(), f"the guest ended after {len(servers)} kills"
            servers.append(server_pid(mount))
            os.kill(servers[-1], signal.SIGKILL)
        assert_healthy(booting.result(), guest)
    assert len(set(servers)) == len(servers), "each kill hit another server"
    assert sent_bytes(rig, image_id) <= FETCHED_BYTES_MAX
