"""The keeper dies, or is restarted, under systemd: the mount and its readers go on. A real mount, the stub server."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from basefs import mounts, processes
from basefs.keeper_session_store import PARTS
from basefs.keeper_setup import lock_holder
from basefs.keeper_spec import command_line
from tests.keeper.conftest import Mounting
from tests.keeper.readers import Readers, reading
from tests.keeper.systemd_stand_in import SystemdStandIn

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def systemd(mounting: Mounting, tmp_path: Path) -> Iterator[SystemdStandIn]:
    stand_in = SystemdStandIn(tmp_path / "systemd", command_line(mounting.spec))
    try:
        yield stand_in
    finally:
        while mounting.is_mounted():
            mounts.unmount(mounting.mountpoint, is_lazy=True)
        stand_in.clean_up()


def readers(mounting: Mounting) -> AbstractContextManager[Readers]:
    return reading(mounting.mountpoint / "img")


def server_of(mounting: Mounting) -> int:
    return mounting.server_pids()[-1]


def mount_id(mounting: Mounting) -> int:
    mount = mounts.mount_at(mounting.mountpoint)
    assert mount is not None
    return mount.mount_id


def wait_for_another_server(mounting: Mounting, systemd: SystemdStandIn, than: int) -> None:
    systemd.wait_for(
        lambda: (
            server_of(mounting) != than
            and any(
                message.startswith("STATUS=serving") and f"server {server_of(mounting)}" in message
                for message in systemd.messages
            )
        )
    )


def parts(systemd: SystemdStandIn) -> list[str]:
    return sorted(name.split(".")[2] for name in systemd.names())


def test_a_session_is_stored_when_it_begins_and_removed_when_it_ends(mounting, systemd):
    systemd.start()
    assert parts(systemd) == ["c1", *sorted(PARTS)]
    mounts.unmount(mounting.mountpoint)
    assert systemd.wait() == 0
    systemd.wait_for(lambda: not systemd.stored)


@pytest.mark.parametrize("what", ["keeper", "keeper and server"])
def test_readers_go_on_when_it_is_killed(mounting, systemd, what):
    systemd.start()
    before = mount_id(mounting)
    with readers(mounting) as running:
        for _ in range(2):
            server = server_of(mounting)
            systemd.kill(*([server] if what == "keeper and server" else []))
            systemd.start()
            running.must_go_on()
            wait_for_another_server(mounting, systemd, server)
            assert not processes.is_running(server), "two servers would take each other's requests"
    assert mount_id(mounting) == before
    assert lock_holder(mounting.spec.cache_dir)["keeper_pid"] == systemd.pid
    assert systemd.stop()
    assert not mounting.is_mounted()


def test_readers_go_on_when_the_unit_is_restarted(mounting, systemd):
    systemd.start()
    before = mount_id(mounting)
    with readers(mounting) as running:
        first = systemd.pid
        systemd.restart()
        assert not processes.is_running(first)
        running.must_go_on()
    assert mount_id(mounting) == before
    assert "stays mounted for the next keeper" in systemd.log
    assert "Traceback" not in systemd.log


def test_an_idle_mount_is_made_anew_by_a_restart(mounting, systemd):
    systemd.start()
    systemd.restart()
    assert "going on with" not in systemd.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    assert parts(systemd) == ["c1", *sorted(PARTS)]


def test_a_stop_of_a_busy_mount_is_refused_and_of_an_idle_one_unmounts(mounting, systemd):
    systemd.start()
    with open(mounting.mountpoint / "img", "rb", buffering=0) as file:
        assert not systemd.stop(limit_s=1.0)
        assert mounting.is_mounted()
        assert file.read(10) == CONTENT[:10]
    systemd.process.terminate()
    assert systemd.wait() == 0


def test_a_busy_mount_is_not_parked_where_the_unit_has_no_fd_store(mounting, tmp_path):
    systemd = SystemdStandIn(tmp_path / "systemd", command_line(mounting.spec), store_max=0)
    try:
        systemd.start()
        with open(mounting.mountpoint / "img", "rb", buffering=0) as file:
            systemd._set_job("restart")
            assert "has no FileDescriptorStoreMax=" in systemd.run_exec_stop()
            assert file.read(10) == CONTENT[:10]
    finally:
        mounts.unmount(mounting.mountpoint, is_lazy=True)
        systemd.clean_up()


def test_a_keeper_without_a_service_manager_does_not_park(mounting):
    keeper = mounting.start_ready()
    with open(mounting.mountpoint / "img", "rb"):
        keeper.process.send_signal(signal.SIGUSR1)
        keeper.wait_for_log("not stopped")
    assert mounting.is_mounted()


def test_a_keeper_that_hangs_is_taken_over_from_by_a_restart(mounting, systemd):
    systemd.start()
    old, old_server = systemd.process, server_of(mounting)
    os.kill(old.pid, signal.SIGSTOP)
    with readers(mounting):
        systemd.start()
        assert old.wait(30) == -signal.SIGKILL
        wait_for_another_server(mounting, systemd, old_server)
        assert not processes.is_running(old_server)


def test_a_dead_session_in_the_store_is_dropped_and_mounted_anew(mounting, systemd):
    systemd.start()
    first = set(systemd.names())
    systemd.kill(server_of(mounting))
    mount = mounts.mount_at(mounting.mountpoint)
    Path(f"/sys/fs/fuse/connections/{mount.minor}/abort").write_text("1")
    systemd.start()
    assert "was unmounted, or its FUSE connection aborted" in systemd.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    systemd.wait_for(lambda: len(systemd.stored) == len(PARTS) + 1)
    assert not first & set(systemd.names())


def test_a_damaged_session_is_told_and_mounted_anew(mounting, systemd):
    systemd.start()
    systemd.kill(server_of(mounting))
    damaged = os.memfd_create("damaged")
    for number, (name, fd) in enumerate(systemd.stored):
        if name.endswith(".session"):
            data = bytearray(os.pread(fd, 100_000, 0))
            data[100] ^= 1
            os.write(damaged, data)
            systemd.stored[number] = (name, damaged)
            os.close(fd)
    systemd.start()
    assert "the session that systemd kept cannot be adopted: its checksum is wrong" in systemd.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_fds_that_are_not_ours_are_closed_and_change_nothing(mounting, systemd):
    systemd.start()
    mine, theirs = socket.socketpair()
    with mine, theirs:
        systemd.kill()
        systemd.start(extra=[("web.socket", theirs.fileno()), ("basefs.only-half", theirs.fileno())])
        theirs.close()
        mine.settimeout(30)
        assert mine.recv(1) == b"", "nobody has the other end open"
    assert "none of ours: web.socket" in systemd.log
    assert "going on with the mount" in systemd.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_a_lazily_unmounted_session_is_served_to_its_last_close_by_the_next_keeper(mounting, systemd):
    systemd.start()
    with readers(mounting):
        mounts.unmount(mounting.mountpoint, is_lazy=True)
        systemd.kill(server_of(mounting))
        systemd.start()
    assert systemd.wait() == 0


def test_another_configuration_waits_until_it_is_unmounted(mounting, systemd, tmp_path):
    systemd.start()
    systemd.kill()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    systemd._command = command_line(mounting.spec._replace(mountpoint=str(elsewhere)))
    systemd.start()
    assert f"mounted already: mountpoint {mounting.mountpoint}" in systemd.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    assert list(elsewhere.iterdir()) == []


def test_a_lock_file_that_cannot_be_opened_keeps_no_session_from_being_adopted(mounting, systemd):
    systemd.start()
    lock = Path(mounting.spec.cache_dir) / "lock"
    subprocess.run(["chattr", "+i", str(lock)], check=True)  # as on a disk that became read-only
    try:
        with pytest.raises(PermissionError):
            lock.open("r+")
        with readers(mounting):
            systemd.kill(server_of(mounting))
            systemd.start()
    finally:
        subprocess.run(["chattr", "-i", str(lock)], check=True)
