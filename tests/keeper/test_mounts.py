import os
import select
import signal

import pytest

from basefs import mounts, processes


def test_resolved_follows_every_link(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "real")
    (tmp_path / "relative").symlink_to("absolute/deep/../deep")
    assert mounts.resolved(tmp_path / "relative" / "new") == tmp_path / "real" / "deep" / "new"
    assert mounts.resolved(f"{tmp_path}/absolute/./deep//..") == tmp_path / "real"


def test_resolved_agrees_with_realpath(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "c").symlink_to("../b/d")
    for path in ("a", "b", "b/c", "b/c/e", "b/../b/x", "."):
        assert str(mounts.resolved(tmp_path / path)) == os.path.realpath(tmp_path / path)


def test_a_loop_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        mounts.resolved(tmp_path / "a")


def test_the_mount_table_has_the_root():
    root = mounts.mount_at("/")
    assert root is not None
    assert mounts.mount_by_id(root.mount_id) == root


def test_a_mount_point_with_a_space_is_read_as_it_is():
    line = r"36 35 98:0 / /mnt/a\040b\134c rw,noatime master:1 - fuse.basefs basefs rw,user_id=0"
    mount = mounts._parse_line(line)
    assert (mount.mountpoint, mount.fstype, mount.minor) == ("/mnt/a b\\c", "fuse.basefs", 0)
    assert mount.is_basefs


@pytest.mark.mount
def test_nothing_behind_a_basefs_mount_is_asked(mounting):
    keeper = mounting.start_ready()
    (mounting.mountpoint.parent / "link").symlink_to(mounting.mountpoint)
    os.kill(mounting.server_pids()[-1], signal.SIGSTOP)  # a server that hangs: whoever asks it waits
    try:
        expected = mounting.mountpoint / "sub" / "dir"
        assert mounts.resolved(mounting.mountpoint / "sub" / "x" / ".." / "dir") == expected
        assert mounts.resolved(mounting.mountpoint.parent / "link" / "sub" / "dir") == expected
        assert mounts.probe(mounting.mountpoint, deadline_s=0.2) == "hung"
        assert processes.keeper_of(mounting.mountpoint) == keeper.process.pid
    finally:
        os.kill(mounting.server_pids()[-1], signal.SIGCONT)
    assert mounts.probe(mounting.mountpoint, deadline_s=30.0) == "live"


@pytest.mark.mount
def test_the_lower_directory_is_not_taken_for_the_mount(mounting):
    mounting.start_ready()
    mount = mounts.mount_at(mounting.mountpoint)
    assert processes.users_of(mount) == []
    with (mounting.mountpoint / "img").open("rb"):
        assert [user.pid for user in processes.users_of(mount)] == [os.getpid()]


def test_a_zombie_does_not_run():
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [])
    os.close(pidfd)
    assert not processes.is_running(pid)
    os.waitpid(pid, 0)
    assert processes.is_running(os.getpid())
