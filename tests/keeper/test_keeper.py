import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from basefs import mounts, processes
from basefs.keeper_setup import lock_holder

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 4096


def test_ready_is_told_when_the_mount_serves(mounting):
    keeper = mounting.start()
    answer = keeper.answer()
    assert answer == {"ready": True, "keeper_pid": keeper.process.pid, "server_pid": mounting.server_pids()[-1]}
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_the_mount_has_the_options_of_the_design(mounting):
    mounting.start_ready()
    mount = mounts.mount_at(mounting.mountpoint)
    assert (mount.fstype, mount.source) == ("fuse.basefs", "basefs")
    assert {"nosuid", "nodev", "noexec"} <= set(mount.options.split(","))
    assert {"user_id=0", "group_id=0", "allow_other", "default_permissions"} <= set(mount.super_options.split(","))


def test_the_kernel_settings_are_raised(mounting):
    keeper = mounting.start_ready(read_ahead_kib=2048, max_background=77)
    keeper.wait_for_log("serves")
    mount = mounts.mount_at(mounting.mountpoint)
    assert Path(f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb").read_text().strip() == "2048"
    assert Path(f"/sys/fs/fuse/connections/{mount.minor}/max_background").read_text().strip() == "77"


def test_the_service_manager_hears_ready_and_stopping(mounting, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(30)

        def hear() -> bytes:
            while (message := receiver.recv(4096)).startswith(b"FDSTORE"):
                pass  # test_keeper_death.py
            return message

        keeper = mounting.start_ready({"NOTIFY_SOCKET": str(path)})
        assert hear() == b"READY=1"
        assert hear().startswith(b"STATUS=serving")
        keeper.process.send_signal(signal.SIGTERM)
        assert hear() == b"STOPPING=1"
        assert keeper.wait() == 0


@pytest.mark.parametrize("step", ["start", "serve", "switch"])
@pytest.mark.parametrize("what", ["exit", "fail"])
def test_a_first_server_that_cannot_start_leaves_no_mount(mounting, step, what):
    mounting.set_mode(at=step, do=what)
    keeper = mounting.start()
    answer = keeper.answer()
    assert answer["ready"] is False
    assert ("stub failed as told" if what == "fail" else "exit code 3") in answer["error"]
    assert keeper.wait() == 1
    assert not mounting.is_mounted()


@pytest.mark.parametrize("step", ["start", "serve"])
def test_a_first_server_that_hangs_is_given_up_after_the_deadline(mounting, step):
    mounting.set_mode(at=step, do="hang")
    keeper = mounting.start(start_deadline_s=3.0)
    assert "hangs" in keeper.answer()["error"]
    assert keeper.wait() == 1
    assert not mounting.is_mounted()
    assert not processes.is_running(lock_holder(mounting.spec.cache_dir)["server_pid"])


def test_a_stop_before_ready_leaves_nothing(mounting):
    mounting.set_mode(at="serve", do="hang")
    keeper = mounting.start()
    _wait_for_mount(mounting)
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.wait() == 1
    assert not mounting.is_mounted()


def _wait_for_mount(mounting) -> None:
    with open("/proc/self/mountinfo", "rb") as table:
        poller = select.poll()
        poller.register(table, select.POLLPRI)
        while not mounting.is_mounted():
            assert poller.poll(30_000), "no mount"


def test_no_read_fails_when_the_server_is_killed_again_and_again(mounting):
    keeper = mounting.start_ready()
    stop = threading.Event()
    failures: list[str] = []
    rounds = [0, 0, 0]

    def read_on(number: int) -> None:
        while not stop.is_set():
            try:
                if (mounting.mountpoint / "img").read_bytes() != CONTENT:
                    failures.append("wrong bytes")
            except OSError as exc:
                failures.append(repr(exc))
            rounds[number] += 1

    readers = [threading.Thread(target=read_on, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(3):
            os.kill(mounting.server_pids()[-1], signal.SIGKILL)
            keeper.wait_for_log("again")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert failures == []
    assert min(rounds) > 0
    assert len(mounting.server_pids()) == 4


def test_a_file_open_across_a_restart_reads_on(mounting):
    keeper = mounting.start_ready()
    with (mounting.mountpoint / "img").open("rb", buffering=0) as file:
        assert file.read(10) == CONTENT[:10]
        os.kill(mounting.server_pids()[-1], signal.SIGKILL)
        keeper.wait_for_log("again")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 100, 500_000) == CONTENT[500_000:500_100]


def test_a_later_server_that_fails_is_tried_again_and_logged_once(mounting):
    keeper = mounting.start_ready()
    mounting.set_mode(at="start", do="fail")
    os.kill(mounting.server_pids()[-1], signal.SIGKILL)
    keeper.wait_for_log("stub failed as told; trying again")
    _wait_for_starts(mounting, 4)
    assert mounting.is_mounted()
    mounting.set_mode()
    keeper.wait_for_log("again")
    assert "stub failed" not in keeper.log
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def _wait_for_starts(mounting, count: int) -> None:
    while len(mounting.started_pids()) < count:
        pidfd = os.pidfd_open(mounting.keepers[0].process.pid)
        try:
            assert not select.select([pidfd], [], [], 0.05)[0], "the keeper ended"
        finally:
            os.close(pidfd)


def test_a_server_program_that_goes_missing_is_waited_for(mounting, tmp_path):
    program = tmp_path / "server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    keeper = mounting.start_ready(server_command=[str(program), mounting.spec.server_command[1]])
    program.rename(tmp_path / "away")
    os.kill(mounting.server_pids()[-1], signal.SIGKILL)
    keeper.wait_for_log(f"cannot start {program}: No such file or directory; trying again")
    (tmp_path / "away").rename(program)
    keeper.wait_for_log("again")
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_a_full_cache_disk_does_not_keep_the_mount_without_a_server(mounting):
    cache = Path(mounting.spec.cache_dir)
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(cache)], check=True)
    try:
        keeper = mounting.start_ready()
        (cache / "lock").write_bytes(b"")
        with contextlib.suppress(OSError):
            (cache / "fill").write_bytes(bytes(1 << 20))
        os.kill(mounting.server_pids()[-1], signal.SIGKILL)
        keeper.wait_for_log("again")
        assert (mounting.mountpoint / "img").read_bytes() == CONTENT
        keeper.process.send_signal(signal.SIGTERM)
        assert keeper.wait() == 0
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


def test_a_stop_while_a_file_is_open_is_refused_and_logged(mounting):
    keeper = mounting.start_ready()
    with (mounting.mountpoint / "img").open("rb"):
        keeper.process.send_signal(signal.SIGTERM)
        line = keeper.wait_for_log("not stopped")
        assert f"(pid {os.getpid()}, {mounting.mountpoint}/img)" in line
        assert "1 process has files open" in line
        assert mounting.is_mounted()
    keeper.process.send_signal(signal.SIGINT)
    assert keeper.wait() == 0
    assert not mounting.is_mounted()
    assert not processes.is_running(mounting.server_pids()[-1])


def test_sighup_replaces_the_server(mounting):
    keeper = mounting.start_ready()
    keeper.process.send_signal(signal.SIGHUP)
    keeper.wait_for_log("upgrade: {")
    first, second = mounting.server_pids()
    assert not processes.is_running(first)
    assert lock_holder(mounting.spec.cache_dir)["server_pid"] == second
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_an_unmount_from_outside_ends_keeper_and_server_with_0(mounting):
    keeper = mounting.start_ready()
    mounts.unmount(mounting.mountpoint)
    assert keeper.wait() == 0
    assert not processes.is_running(mounting.server_pids()[-1])


def test_a_hung_server_does_not_outlive_the_unmount(mounting):
    keeper = mounting.start_ready()
    os.kill(mounting.server_pids()[-1], signal.SIGSTOP)
    mounts.unmount(mounting.mountpoint)
    assert keeper.wait() == 0
    assert not processes.is_running(mounting.server_pids()[-1])


def test_after_a_lazy_unmount_open_files_are_served_to_their_last_close(mounting):
    keeper = mounting.start_ready()
    with (mounting.mountpoint / "img").open("rb", buffering=0) as file:
        mounts.unmount(mounting.mountpoint, is_lazy=True)
        keeper.wait_for_log("lazily")
        os.kill(mounting.server_pids()[-1], signal.SIGKILL)
        keeper.wait_for_log("again")
        assert file.read(4096) == CONTENT[:4096]
    assert keeper.wait() == 0


def test_an_aborted_connection_ends_the_keeper_with_1_and_leaves_no_dead_mount(mounting):
    keeper = mounting.start_ready()
    keeper.wait_for_log("serves")
    mount = mounts.mount_at(mounting.mountpoint)
    Path(f"/sys/fs/fuse/connections/{mount.minor}/abort").write_text("1")
    assert keeper.wait() == 1
    assert not mounting.is_mounted()


def test_a_mount_left_over_from_a_crash_is_replaced(mounting):
    first = mounting.start_ready()
    first.process.kill()
    first.process.wait()
    os.kill(mounting.server_pids()[-1], signal.SIGKILL)
    while mounts.probe(mounting.mountpoint, deadline_s=30.0) != "dead":
        pass  # the server's last fd of the session is closed a moment after the signal
    second = mounting.start_ready()
    second.wait_for_log("left behind when it died")
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    assert [mount.mountpoint for mount in mounts.mount_table()].count(str(mounting.mountpoint)) == 1


def test_the_server_goes_on_when_its_keeper_is_killed(mounting):
    keeper = mounting.start_ready()
    keeper.process.kill()
    keeper.process.wait()
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    refused = mounting.start()
    assert f"server pid {mounting.server_pids()[0]}" in refused.answer()["error"]


def test_a_second_basefs_on_the_same_cache_directory_is_refused(mounting, tmp_path):
    first = mounting.start_ready()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second = mounting.start(mountpoint=str(elsewhere))
    error = second.answer()["error"]
    assert "is in use by another basefs" in error
    assert f"keeper pid {first.process.pid}" in error
    assert str(mounting.mountpoint) in error
    assert second.wait() == 1
    assert mounts.mount_at(elsewhere) is None


def test_a_second_basefs_on_the_same_mount_point_is_refused(mounting, tmp_path):
    first = mounting.start_ready()
    second = mounting.start(cache_dir=str(tmp_path / "other cache"))
    assert f"already mounted by basefs, keeper pid {first.process.pid}" in second.answer()["error"]
    assert second.wait() == 1
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_a_mount_point_that_is_no_directory_is_refused(mounting, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    keeper = mounting.start(mountpoint=str(path))
    assert "Not a directory" in keeper.answer()["error"]
    assert keeper.wait() == 1


def test_a_cache_directory_that_cannot_be_made_is_refused(mounting, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    keeper = mounting.start(cache_dir=str(path / "cache"))
    assert f"cannot use cache_dir {path}/cache" in keeper.answer()["error"]
    assert keeper.wait() == 1


def test_a_server_program_that_is_missing_is_an_error(mounting):
    keeper = mounting.start(server_command=["/nonexistent/server"])
    assert "cannot start /nonexistent/server" in keeper.answer()["error"]
    assert keeper.wait() == 1


def test_the_lower_directory_is_what_was_there_before_the_mount(mounting):
    (mounting.mountpoint / "swap_1024").write_text("lower")
    keeper = mounting.start_ready()
    assert not (mounting.mountpoint / "swap_1024").exists()
    lower_fds = [
        link
        for link in Path(f"/proc/{mounting.server_pids()[-1]}/fd").iterdir()
        if os.readlink(link) == str(mounting.mountpoint) and (link / "swap_1024").exists()
    ]
    assert len(lower_fds) == 1
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.wait() == 0


def test_the_lock_file_names_keeper_and_server(mounting):
    keeper = mounting.start_ready()
    holder = json.loads(Path(mounting.spec.cache_dir, "lock").read_text())
    assert holder == {
        "keeper_pid": keeper.process.pid,
        "server_pid": mounting.server_pids()[-1],
        "mountpoint": str(mounting.mountpoint),
    }


def test_the_keeper_imports_the_standard_library_only():
    # Some packages' .pth files (of paste, of an editable install) load modules into every interpreter.
    code = (
        "import sys; before = set(sys.modules); import basefs.keeper; "
        "print([n for n in sys.modules if n not in before and n.partition('.')[0] not in sys.stdlib_module_names "
        "and not n.startswith(('basefs', '__'))])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
