"""Attributes while readers and servers are killed and stopped: never what was before a change that was answered."""

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.faults.readers import eventually
from tests.faults.test_reader_kills import READER_DIED, kill_one, looping, reader_pids
from tools.mount import BasefsMount
from tools.rig import Rig
from tools.soak.killer import KILLED_SERVERS_LOG, Killer, again, server_pid

pytestmark = [pytest.mark.mount, pytest.mark.glance]

NS = 10**9
_EMPTY_PATH, _FORCE_SYNC, _BASIC_STATS = 0x1000, 0x2000, 0x7FF
_MTIME_AT = 112


def mtime_ns(fd: int) -> int:
    """As fstat(2), but the file system is asked, however short a time ago it was asked before."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(fd, b"", _EMPTY_PATH | _FORCE_SYNC, _BASIC_STATS, buffer):
        raise OSError(ctypes.get_errno(), "statx")
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, _MTIME_AT)
    return int(seconds * NS + nanoseconds)


def asked_of_server(mount: BasefsMount) -> int:
    return int(mount.status()["fuse_requests"].get("getattr", 0))


def changer(fd: int) -> Callable[[], None]:
    """Sets a time and looks: nobody else sets one."""
    times = iter(range(1, 1 << 40))

    def step() -> None:
        mtime = next(times) * NS + 7
        os.utime(fd, ns=(mtime, mtime))
        for _ in range(5):
            found = mtime_ns(fd)
            assert found == mtime, f"{mtime} was set, {found} is there"

    return step


def pause_one(mount: BasefsMount) -> Callable[[], bool]:
    """Stops a reader for a moment, for a shorter time than the keeper takes it to hang."""

    def act() -> bool:
        for pid in reader_pids(mount)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                os.kill(pid, signal.SIGCONT)
        return True

    return act


def test_attributes_are_told_without_a_server_and_never_older_than_what_was_answered(
    rig: Rig, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(1 << 20))
    expected_warnings("|".join((READER_DIED, *KILLED_SERVERS_LOG)))
    mount = basefs_mount(rig, {"readers": 1})
    path = mount.path(rig.upload(tmp_path / "image", "image"))
    eventually(lambda: len(reader_pids(mount)) == 1)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.utime(fd, ns=(5 * NS, 5 * NS))

        def is_told_by_readers() -> bool:
            before = asked_of_server(mount)
            assert mtime_ns(fd) == 5 * NS
            return asked_of_server(mount) == before

        eventually(is_told_by_readers)
        pid = server_pid(mount)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            assert mtime_ns(fd) == 5 * NS, "and nobody waited for the server"
            os.close(os.dup(fd))
        finally:
            os.kill(pid, signal.SIGCONT)
        with (
            looping(changer(fd)) as (changing,),
            again(kill_one(mount, 1), least_s=0.1, most_s=0.5) as killing,
            again(pause_one(mount), least_s=0.05, most_s=0.2),
            again(Killer(mount), least_s=0.7, most_s=1.5) as killing_servers,
        ):
            eventually(lambda: killing.done >= 3 and killing_servers.done >= 2)
            rounds = changing.rounds
            eventually(lambda: changing.rounds > rounds or changing.error)
        eventually(lambda: mount.cli("upgrade", check=False).returncode == 0)  # not while a server is begun
        with looping(changer(fd)) as (changing,):
            eventually(lambda: changing.rounds >= 20 or changing.error)
    finally:
        os.close(fd)
