"""The system calls that libvirt and qemu make on a base, one by one, as their own users (nova-contract, section 5)."""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess

import pytest

from tests.libvirt.conftest import Base
from tests.libvirt.libvirtd import QEMU_GID, QEMU_UID

pytestmark = [pytest.mark.mount, pytest.mark.glance]

FUSE_SUPER_MAGIC = 0x65735546
BLKSSZGET = 0x1268
NO_SUCH_ATTRIBUTE = {errno.ENODATA, errno.ENOTSUP}
ATTRIBUTES_LIBVIRT_READS = [
    "system.posix_acl_access",
    "security.selinux",
    "trusted.libvirt.security.ref_dac",
    "trusted.libvirt.security.dac",
    "trusted.libvirt.security.timestamp_dac",
]


@pytest.mark.parametrize("name", ATTRIBUTES_LIBVIRT_READS)
def test_reading_an_attribute_says_that_there_is_none(base: Base, name: str) -> None:
    with pytest.raises(OSError) as raised:
        os.getxattr(base.path, name)
    assert raised.value.errno in NO_SUCH_ATTRIBUTE


@pytest.mark.parametrize("name", ["security.selinux", "trusted.libvirt.security.dac"])
def test_setting_an_attribute_is_not_supported(base: Base, name: str) -> None:
    with pytest.raises(OSError) as raised:
        os.setxattr(base.path, name, b"x")
    assert raised.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_DIRECT])
def test_opening_for_writing_is_a_read_only_file_system(base: Base, flags: int) -> None:
    with pytest.raises(OSError) as raised:
        os.open(base.path, flags)
    assert raised.value.errno == errno.EROFS


def test_the_owner_given_by_chown_is_the_owner_reported(base: Base) -> None:
    os.chown(base.path, QEMU_UID, QEMU_GID)
    status = base.path.stat()
    assert (status.st_uid, status.st_gid) == (QEMU_UID, QEMU_GID)
    assert status.st_mode & 0o777 == 0o644
    assert base.path.read_bytes() == base.image.content


def test_statfs_of_an_open_base_tells_a_file_system_that_is_not_nfs(base: Base) -> None:
    buffer = ctypes.create_string_buffer(256)
    fd = os.open(base.path, os.O_RDONLY)
    try:
        assert ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) == 0
    finally:
        os.close(fd)
    assert struct.unpack_from("l", buffer)[0] == FUSE_SUPER_MAGIC


def test_the_block_size_of_a_device_is_no_question_for_it(base: Base) -> None:
    with base.path.open("rb") as file, pytest.raises(OSError) as raised:
        fcntl.ioctl(file, BLKSSZGET, bytes(4))
    assert raised.value.errno == errno.ENOTTY


def test_read_locks_of_two_openers_stand_side_by_side(base: Base) -> None:
    """The bytes qemu locks: 100 + permission, 200 + what it shares."""
    with base.path.open("rb") as one, base.path.open("rb") as other:
        for byte in (100, 103, 201, 203):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(one, fcntl.F_OFD_SETLK, lock)
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
        found = fcntl.fcntl(other, fcntl.F_OFD_GETLK, wanted)
        assert struct.unpack_from("h", found)[0] == fcntl.F_RDLCK, "a lock of the first opener is seen by the second"


def test_the_qemu_user_reads_with_o_direct_after_its_alignment_probe(base: Base) -> None:
    """qemu tries 1 byte at 0, then 4096; then what the guest asks."""
    content = base.image.content
    assert read_as_qemu(base, "bs=1", "count=1") == content[:1]
    assert read_as_qemu(base, "bs=4096", "count=1") == content[:4096]
    assert read_as_qemu(base, "bs=48K") == content


def read_as_qemu(base: Base, *how: str) -> bytes:
    # By a directory fd, for pytest's directories are closed to everybody but root.
    directory = os.open(base.path.parent, os.O_PATH)
    try:
        reader = subprocess.run(
            ["dd", f"if=/proc/self/fd/0/{base.path.name}", "iflag=direct", "status=none", *how],
            stdin=directory,
            user=QEMU_UID,
            group=QEMU_GID,
            extra_groups=[],
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
    finally:
        os.close(directory)
    return reader.stdout


def test_o_direct_reads_at_the_end_are_short_and_past_it_empty(base: Base) -> None:
    size = len(base.image.content)
    buffer = mmap.mmap(-1, 1 << 16)
    fd = os.open(base.path, os.O_RDONLY | os.O_DIRECT)
    try:
        last_block = size // 4096 * 4096
        assert os.preadv(fd, [buffer], last_block) == size - last_block
        assert buffer[: size - last_block] == base.image.content[last_block:]
        assert os.preadv(fd, [buffer], last_block + 4096) == 0
    finally:
        os.close(fd)
