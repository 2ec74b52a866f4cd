"""A mount point that is busy, mounted already or left over from a crash, and options that cannot be meant."""

import errno
import os
import subprocess

import pytest

from basefs.keeper_setup import lock_holder
from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import MIB, Site
from tests.faults.readers import errno_of, eventually, opened, pread, read_at
from tests.faults.test_cache_disk import refusal
from tests.faults.test_kill import chunks_asked, kill
from tools.mount import base_name

pytestmark = pytest.mark.mount

PART = 64 * 1024


def test_a_mount_that_a_crash_left_behind_is_replaced_while_files_on_it_are_open(
    front: MisbehavingFront, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    data = os.urandom(2 * MIB)
    image_id = front.glance.add(data)
    mount = basefs_mount(front.conf_lines())
    path = mount.mountpoint / base_name(image_id)
    with opened(path) as fd:
        assert pread(fd, MIB, PART) == data[MIB:][:PART]
        holder = lock_holder(mount.cache_dir)
        assert holder is not None
        kill(holder["keeper_pid"], holder["server_pid"])
        # A reader process that ends by itself may have taken a request: ECONNABORTED.
        eventually(lambda: errno_of(lambda: os.listdir(mount.mountpoint)) == errno.ENOTCONN)
        expected_warnings("removing the mount that a basefs left behind")
        asked = front.count("/file")
        mount.start()
        assert read_at(path, MIB, PART) == data[MIB:][:PART]
        assert not chunks_asked(front, asked), "what was here is here"
        assert errno_of(lambda: pread(fd, 0, PART)) == errno.ENOTCONN, "the old file is lost"


def test_a_mount_point_that_is_mounted_already_is_refused_and_served_on(
    site: Site, basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    other = basefs_mount(site.front.conf_lines(), {"mountpoint": site.mount.mountpoint}, name="other", start=False)
    expected_warnings("is already mounted by basefs")
    done = other.cli("mount", "--background", check=False)
    assert done.returncode == 1
    assert str(site.mount.mountpoint) in done.stderr
    assert str(site.status()["keeper_pid"]) in done.stderr
    assert read_at(image.path, 0, PART) == image.part(0, PART)


def test_a_file_system_on_the_mount_point_becomes_the_lower_directory(
    front: MisbehavingFront, basefs_mount: MountFactory
) -> None:
    mount = basefs_mount(front.conf_lines(), start=False)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount.mountpoint)], check=True)
    try:
        (mount.mountpoint / "swap_1").write_bytes(b"below")
        mount.start()
        assert (mount.mountpoint / "swap_1").read_bytes() == b"below"
        mount.unmount()
        assert (mount.mountpoint / "swap_1").read_bytes() == b"below"
    finally:
        subprocess.run(["umount", "-l", str(mount.mountpoint)], check=True)


def test_an_unmount_of_a_busy_mount_is_refused_and_changes_nothing(site: Site) -> None:
    image = site.add()
    with opened(image.path) as fd:
        done = site.mount.cli("unmount", check=False)
        assert done.returncode == 1
        assert str(os.getpid()) in done.stderr
        assert pread(fd, 2 * MIB, PART) == image.part(2 * MIB, PART)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mont_point": "/x"}, "unknown key mont_point"),
        ({"surprise.key": "1"}, r"unknown section [surprise]"),
        ({"chunk_bytes": "70000"}, "chunk_bytes = 70000 is no power of two"),
        ({"other_io_deadline_s": "soon"}, "other_io_deadline_s"),
        ({"cache_dir": "relative/dir"}, "cache_dir must be an absolute path"),
        ({"cache_dir": "/proc/nothing"}, "/proc/nothing"),
        ({"mountpoint": "/nonexistent/dir"}, "mountpoint = /nonexistent/dir: No such file or directory"),
        ({"mountpoint": "/etc/passwd"}, "mountpoint = /etc/passwd is no directory"),
        ({"control_socket": "/proc/nothing/control.sock"}, "control"),
        ({"glance.auth_type": "mind_reading"}, "there is no such auth plugin"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_meant_is_told_by_name_and_nothing_is_mounted(
    options: dict[str, str], said: str, basefs_mount: MountFactory
) -> None:
    options = {"DEFAULT.log_file": "/dev/null", **options}  # a record of it, too, if it is the keeper that finds out
    mount = basefs_mount("[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n", options, start=False)
    stderr = refusal(mount)
    assert said in stderr, stderr
    assert not mount.pids()
