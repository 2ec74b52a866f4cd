"""docs/SEMANTICS.md, section 12: what killed processes do to a mount."""

import os
import signal
from collections.abc import Callable, Iterator
from random import Random

import pytest

from tests.conftest import ExpectedWarnings
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import errno_of, eventually, status, wait_for_images
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

DATA = Random(9).randbytes(3_000_000)


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


def test_killed_processes(
    front: MisbehavingFront, basefs_mount: Callable[..., BasefsMount], expected_warnings: ExpectedWarnings
) -> None:
    """[S1201] When the server is killed, open handles go on: a read waits for the next server and has its bytes.

    [S1202] When the keeper is killed, the mount is served on.

    [S1203] When keeper and server are killed where no systemd keeps the session, every access answers ENOTCONN, until
    `basefs mount` makes the mount anew.
    """
    expected_warnings(r"server \d+ died \(signal SIGKILL\)")
    expected_warnings("removing the mount that a basefs left behind")
    image_id = front.glance.add(DATA)
    mount = basefs_mount(front.conf_lines())
    wait_for_images(mount, 1)
    path = mount.path(image_id)
    lower = mount.mountpoint / "lower"
    lower.write_bytes(b"0123456789")
    before = status(mount)
    number = path.stat().st_ino
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.pread(fd, 8192, 0) == DATA[:8192]
        os.kill(before["server_pid"], signal.SIGKILL)
        assert os.pread(fd, 1 << 20, 2_000_000) == DATA[2_000_000 : 2_000_000 + (1 << 20)]
        after = status(mount)
        assert after["server_pid"] != before["server_pid"]
        assert after["keeper_pid"] == before["keeper_pid"]
        assert os.fstat(fd).st_ino == path.stat().st_ino == number
        assert lower.read_bytes() == b"0123456789"

        os.kill(after["keeper_pid"], signal.SIGKILL)
        assert os.pread(fd, 1 << 20, 1_000_000) == DATA[1_000_000 : 1_000_000 + (1 << 20)]
        assert path.read_bytes() == DATA
        assert status(mount)["server_pid"] == after["server_pid"]

        os.kill(after["server_pid"], signal.SIGKILL)
        eventually(lambda: errno_of(path.stat) == "ENOTCONN")
        assert errno_of(lambda: os.pread(fd, 4096, 0)) == "ENOTCONN"
        assert errno_of(lambda: os.listdir(mount.mountpoint)) == "ENOTCONN"
    finally:
        errno_of(lambda: os.close(fd))  # ENOTCONN, and closed
    mount.start()
    assert path.read_bytes() == DATA
    assert lower.read_bytes() == b"0123456789"
