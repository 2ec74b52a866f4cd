"""docs/SEMANTICS.md, section 12: the keeper dies, or its unit is restarted, under systemd (a stand-in for it)."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from basefs import mounts, processes
from basefs.keeper_setup import lock_holder
from basefs.keeper_spec import KeeperSpec, command_line
from tests.conftest import MountFactory
from tests.fakes.front import MisbehavingFront
from tests.keeper.systemd_stand_in import SystemdStandIn
from tests.semantics.conftest import eventually
from tools.mount import BasefsMount, base_name

pytestmark = pytest.mark.mount

# What a guest and qemu do, in a process of its own: one that has a file of the mount open can start no keeper.
GUEST = """
import hashlib, json, os, sys
fds = {}
for line in sys.stdin:
    action, path = json.loads(line)
    try:
        if action == "open":
            fds[path] = os.open(path, os.O_RDWR if "lower" in path else os.O_RDONLY)
            answer = "open"
        elif action == "unlink":
            answer = os.unlink(path)
        else:
            fd = fds[path]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            answer = hashlib.sha256(os.pread(fd, 1 << 30, 0)).hexdigest()
            if "lower" in path:
                os.pwrite(fd, b"written", 0)
    except OSError as exc:
        answer = repr(exc)
    print(json.dumps(answer), flush=True)
"""


class Guest:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def does(self, action: str, path: Path) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([action, str(path)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def clean_up(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.clean_up()


def server_of(mount: BasefsMount) -> int:
    """The server that the lock file tells of, once it tells: a keeper notes itself before its server."""
    told: list[int] = []

    def is_told() -> bool:
        holder = lock_holder(mount.cache_dir)
        told[:] = [int(holder["server_pid"])] if holder is not None and holder["server_pid"] is not None else []
        return bool(told)

    eventually(is_told)
    return told[0]


def test_what_is_open_outlives_keeper_and_server_and_what_is_opened_in_between(
    front: MisbehavingFront,
    basefs_mount: MountFactory,
    tmp_path: Path,
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[S1230] Under systemd, when the keeper is killed, or keeper and server at once, the next keeper goes on with the
    mount: reads wait and have their bytes.

    [S1231] `systemctl restart` of a mount that is in use keeps it: reads wait and have their bytes.

    [S1232] `systemctl stop` of a mount that is in use is refused, and nothing is killed.

    [S1233] Lower files that are open when the keeper is killed, or are opened before the next one is there, are read
    and written on, also when they have no name any more.
    """
    data = random.Random(3).randbytes(3_000_001)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines(), start=False)
    for name, value in mount.environment.items():
        monkeypatch.setenv(name, value)
    image, first, second = (mount.mountpoint / name for name in (base_name(image_id), "lower1", "lower2"))
    for path in (first, second):
        path.write_bytes(b"nothing")
    spec = KeeperSpec(
        mountpoint=str(mount.mountpoint),
        cache_dir=str(mount.cache_dir),
        config_files=[str(mount.conf_path)],
        config_dirs=[],
    )
    systemd = SystemdStandIn(tmp_path / "systemd", command_line(spec))
    try:
        systemd.start()
        first_server = server_of(mount)
        assert guest.does("open", image) == guest.does("open", first) == "open"
        assert guest.does("unlink", first) is None
        before = {path: guest.does("read", path) for path in (image, first)}
        systemd.kill()  # the server serves on, and what it wants to be held waits for the next keeper
        assert guest.does("open", second) == "open"
        assert guest.does("unlink", second) is None
        assert guest.does("read", second) == before[first]
        systemd.start()
        written = guest.does("read", first)
        assert written == guest.does("read", second) != before[first]
        assert guest.does("read", image) == before[image]
        assert server_of(mount) != first_server
        systemd.kill(server_of(mount))
        systemd.start()
        assert [guest.does("read", path) for path in (image, first, second)] == [before[image], written, written]
        systemd.restart()
        assert [guest.does("read", path) for path in (image, first, second)] == [before[image], written, written]
        assert "stays mounted for the next keeper" in systemd.log
        running = (systemd.pid, server_of(mount))
        assert not systemd.stop(limit_s=1.0)
        assert [guest.does("read", path) for path in (image, first, second)] == [before[image], written, written]
        assert all(processes.is_running(pid) for pid in running)
        guest.clean_up()
        assert systemd.stop(), systemd.log
        assert os.listdir(mount.mountpoint) == []
    finally:
        guest.clean_up()
        while mounts.mount_at(mount.mountpoint) is not None:
            mounts.unmount(mount.mountpoint, is_lazy=True)
        systemd.clean_up()
