"""Single facts about the mounted lower directory, each against what is beneath the mount."""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import select
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.lower_mount import LowerMount, LowerSubdirectory

pytestmark = pytest.mark.mount

MIB = 1 << 20
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def whole_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LowerMount]:
    """One mount for the tests of this file."""
    with LowerMount(tmp_path_factory.mktemp("lower") / "base") as mounted:
        yield mounted


@pytest.fixture
def mount(whole_mount: LowerMount, request: pytest.FixtureRequest) -> Iterator[LowerSubdirectory]:
    """An empty directory of it; at the end everything is forgotten."""
    with LowerSubdirectory(whole_mount, request.node.name) as directory:
        yield directory
    assert whole_mount.forget_all() == [0, 0, 0]


def rename(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def test_status_is_that_of_the_file_beneath(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.write_bytes(b"x" * 70_000)
    os.chmod(path, 0o640)
    os.chown(path, 12, 34)
    os.utime(path, ns=(1_600_000_000_000_000_001, 1_700_000_000_999_999_999))
    os.sync()
    shown, beneath = os.stat(path), os.stat(mount.beneath / "file")
    for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
        assert getattr(shown, f"st_{name}") == getattr(beneath, f"st_{name}"), name
    assert shown.st_ino == 1 << 63 | beneath.st_ino
    assert shown.st_blksize == 128 * 1024


def test_utime_now_works_as_nova_does_it(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.touch()
    os.chown(path, 1234, 1234)
    os.utime(path, ns=(0, 0))
    os.utime(path)
    subprocess.run(["touch", "-a", "-d", "2001-01-01 UTC", path], check=True)
    status = os.stat(path)
    assert status.st_atime == 978_307_200
    assert abs(status.st_mtime - status.st_ctime) < 60


def test_whole_listing_is_shown_once_each(mount: LowerSubdirectory) -> None:
    for number in range(700):
        (mount.beneath / f"{number:03}-{'n' * (number % 200)}").touch()
    (mount.beneath / "sub").mkdir()
    assert sorted(os.listdir(mount.path)) == sorted(os.listdir(mount.beneath))
    assert len(os.listdir(mount.path)) == 701
    with os.scandir(mount.path) as entries:
        assert {entry.name for entry in entries if entry.is_dir()} == {"sub"}


def test_listing_does_not_bring_back_an_old_size(mount: LowerSubdirectory) -> None:
    """A directory opened before a file grew: its listing must not make the kernel believe the old size."""
    path = mount.path / "file"
    path.write_bytes(b"old")
    with os.scandir(mount.path) as entries:
        path.write_bytes(b"new and longer")
        assert [entry.name for entry in entries] == ["file"]
    assert path.read_bytes() == b"new and longer"


def test_file_made_beneath_is_there_at_once(mount: LowerSubdirectory) -> None:
    assert not (mount.path / "file").exists()
    (mount.beneath / "file").write_bytes(b"bytes")
    assert (mount.path / "file").read_bytes() == b"bytes"


def test_unlinked_open_file_is_read_and_written(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"0123456789")
    os.unlink(path)
    assert (os.listdir(mount.path), os.listdir(mount.beneath)) == ([], [])
    os.pwrite(fd, b"abc", 2)
    os.ftruncate(fd, 8)
    os.fchmod(fd, 0o600)
    os.fchown(fd, 5, 6)
    os.utime(fd, ns=(1, 2))
    assert os.pread(fd, 100, 0) == b"01abc567"
    status = os.fstat(fd)
    assert (status.st_nlink, status.st_size, status.st_uid, status.st_mtime_ns) == (0, 8, 5, 2)
    with os.fdopen(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), "rb") as again:
        assert again.read() == b"01abc567"
    path.write_bytes(b"another")
    assert os.pread(fd, 100, 0) == b"01abc567"
    os.close(fd)


def test_space_of_a_removed_file_comes_back_at_its_last_close(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", base], check=True)
    try:
        with LowerMount(base) as mount:
            fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
            os.write(fd, bytes(4 * MIB))
            before = os.statvfs(mount.path).f_bfree
            os.unlink(mount.path / "file")
            assert os.statvfs(mount.path).f_bfree == before
            os.close(fd)
            assert mount.forget_all() == [0, 0, 0]
            assert os.statvfs(mount.path).f_bfree > before
    finally:
        subprocess.run(["umount", base], check=True)


def test_full_lower_file_system_says_no_space(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", base], check=True)
    try:
        with LowerMount(base) as mount:
            with pytest.raises(OSError) as caught:
                (mount.path / "file").write_bytes(bytes(5 * MIB))
            assert caught.value.errno == errno.ENOSPC
            os.unlink(mount.path / "file")
            (mount.path / "small").write_bytes(b"fits")
            assert (mount.beneath / "small").read_bytes() == b"fits"
    finally:
        subprocess.run(["umount", base], check=True)


def test_read_only_lower_directory_says_so(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "file").write_bytes(b"bytes")
    subprocess.run(["mount", "--bind", base, base], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", base], check=True)
        with LowerMount(base) as mount:
            assert (mount.path / "file").read_bytes() == b"bytes"
            for call in (
                lambda: (mount.path / "new").touch(),
                lambda: (mount.path / "file").write_bytes(b""),
                lambda: os.utime(mount.path / "file"),
                lambda: os.unlink(mount.path / "file"),
                lambda: os.mkdir(mount.path / "dir"),
            ):
                with pytest.raises(OSError) as caught:
                    call()
                assert caught.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", base], check=True)


def test_rename_replaces_exchanges_or_refuses(mount: LowerSubdirectory) -> None:
    a, b = mount.path / "a", mount.path / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    with pytest.raises(FileExistsError):
        rename(a, b, RENAME_NOREPLACE)
    rename(a, b, RENAME_EXCHANGE)
    assert (a.read_bytes(), b.read_bytes()) == (b"b", b"a")
    with open(b, "rb") as replaced:
        os.rename(a, b)
        assert (b.read_bytes(), replaced.read()) == (b"b", b"a")
    assert os.listdir(mount.beneath) == ["b"]
    (mount.path / "dir" / "deep").mkdir(parents=True)
    os.rename(b, mount.path / "dir" / "deep" / "b")
    os.rename(mount.path / "dir", mount.path / "moved")
    assert (mount.beneath / "moved" / "deep" / "b").read_bytes() == b"b"


def test_downloads_as_nova_makes_them(mount: LowerSubdirectory) -> None:
    """CREATE .part, 64 KiB writes, fsync, rename; a reader of the old name goes on with the old bytes."""
    data = os.urandom(3 * MIB + 17)
    part, name = mount.path / "x.part", mount.path / "x"
    name.write_bytes(b"old")
    with open(name, "rb") as old:
        with open(part, "wb") as file:
            file.writelines(data[start : start + 65536] for start in range(0, len(data), 65536))
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, name)
        assert old.read() == b"old"
    assert name.read_bytes() == (mount.beneath / "x").read_bytes() == data


def test_temporary_file_as_rsync_makes_it(mount: LowerSubdirectory) -> None:
    data = os.urandom(MIB) + bytes(8 * MIB) + os.urandom(MIB)
    temporary = mount.path / ".x.aB3dE9"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    for start in range(0, len(data), 256 * 1024):  # --sparse: seeks over zeros, truncates at the end
        piece = data[start : start + 256 * 1024]
        if any(piece):
            os.pwrite(fd, piece, start)
    os.ftruncate(fd, len(data))
    os.close(fd)
    os.chown(temporary, 1234, 1234)
    os.utime(temporary, ns=(1_700_000_000_000_000_000, 1_700_000_000_000_000_000))
    os.chmod(temporary, 0o644)
    os.rename(temporary, mount.path / "x")
    status = os.stat(mount.beneath / "x")
    assert (status.st_uid, stat.S_IMODE(status.st_mode), status.st_mtime) == (1234, 0o644, 1_700_000_000)
    assert status.st_blocks * 512 < 4 * MIB
    assert (mount.path / "x").read_bytes() == data


def test_exclusive_create_has_one_winner(mount: LowerSubdirectory) -> None:
    def create(number: int) -> bool:
        try:
            os.close(os.open(mount.path / f"file{number % 20}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(160))) == 20


def test_open_or_create_by_many_at_once_never_fails(mount: LowerSubdirectory) -> None:
    def touch(number: int) -> None:
        os.close(os.open(mount.path / f"file{number % 10}", os.O_CREAT | os.O_WRONLY))
        if number % 3 == 0:
            (mount.path / f"file{number % 10}").unlink(missing_ok=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(touch, range(300)))


def test_file_that_appears_while_it_is_created_is_opened(mount: LowerSubdirectory) -> None:
    """Between the kernel's lookup and its create another host makes the file: open() must open that one."""
    fd = os.open(mount.path / "appears.1", os.O_CREAT | os.O_RDWR)
    assert os.read(fd, 100) == b"made by another host"
    os.close(fd)
    with pytest.raises(FileExistsError):
        os.open(mount.path / "appears.2", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    os.chmod(mount.beneath / "appears.2", 0o600)


def test_appends_of_two_openers_do_not_overwrite_each_other(mount: LowerSubdirectory) -> None:
    fds = [os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for number in range(100):
        os.write(fds[number % 2], b"%03d\n" % number)
    for fd in fds:
        os.close(fd)
    assert (mount.beneath / "file").read_bytes() == b"".join(b"%03d\n" % number for number in range(100))


def test_truncating_open_empties_the_file(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.write_bytes(b"x" * 10_000)
    with open(path, "rb") as reader:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        assert reader.read() == b""
    assert os.stat(mount.beneath / "file").st_size == 0


def test_memory_mapped_reads_and_writes(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    data = bytearray(os.urandom(300_000))
    path.write_bytes(data)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        assert view[:] == data
        view[100_000:100_005] = b"hello"
        view.flush()
        data[100_000:100_005] = b"hello"
        assert (mount.beneath / "file").read_bytes() == data
        assert file.read() == data


def test_kernel_side_copies(mount: LowerSubdirectory) -> None:
    data = os.urandom(MIB)
    (mount.path / "from").write_bytes(data)
    with open(mount.path / "from", "rb") as source, open(mount.path / "to", "wb") as target:
        done = 0
        while done < len(data):
            done += os.copy_file_range(source.fileno(), target.fileno(), len(data) - done)
        done = 0
        while done < len(data):
            done += os.sendfile(target.fileno(), source.fileno(), done, len(data) - done)
    assert (mount.beneath / "to").read_bytes() == data + data


def test_sparse_file_takes_no_space(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")
    status = os.stat(path)
    assert (status.st_size, status.st_blocks < 100) == (1 << 40, True)
    with open(path, "rb") as file:
        assert os.pread(file.fileno(), 16, (1 << 39) - 5) == b"\0\0\0\0\0middle\0\0\0\0\0"


def test_direct_io_of_one_mebibyte(mount: LowerSubdirectory) -> None:
    fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    data = os.urandom(4 * MIB)
    with mmap.mmap(-1, MIB) as page:
        for start in range(0, len(data), MIB):
            page[:] = data[start : start + MIB]
            assert os.pwrite(fd, page, start) == MIB
        assert (mount.beneath / "file").read_bytes() == data
        for start in range(0, len(data), MIB):
            assert os.preadv(fd, [page], start) == MIB
            assert page[:] == data[start : start + MIB]
        assert os.pread(fd, 1, 12_345) == data[12_345:12_346]
        assert os.pread(fd, 4096, len(data) - 10) == data[-10:]
    assert (mount.path / "file").read_bytes() == data
    os.close(fd)


def test_direct_write_is_seen_by_a_cached_reader(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.write_bytes(b"a" * 8192)
    assert path.read_bytes() == b"a" * 8192
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"b" * 4096
        os.pwrite(fd, page, 4096)
    os.close(fd)
    assert path.read_bytes() == b"a" * 4096 + b"b" * 4096


def test_many_readers_and_a_writer_see_whole_bytes(mount: LowerSubdirectory) -> None:
    data = os.urandom(8 * MIB)
    path = mount.path / "file"
    path.write_bytes(data)
    os.posix_fadvise(fd := os.open(mount.beneath / "file", os.O_RDWR), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(number: int) -> bool:
        with open(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file, mmap.mmap(-1, MIB) as page:
            start = (number * 37 * 4096) % (7 * MIB)
            os.preadv(file.fileno(), [page], start)
            return page[:] == data[start : start + MIB]

    def write(number: int) -> bool:
        with open(mount.path / f"other{number}", "wb") as file:
            file.writelines(os.urandom(100_000) for _ in range(10))
        os.unlink(mount.path / f"other{number}")
        return True

    with ThreadPoolExecutor(8) as pool:
        readers = pool.map(read, range(100))
        writers = pool.map(write, range(10))
        assert all(readers)
        assert all(writers)
    os.close(fd)


def test_statfs_is_the_lower_file_systems(mount: LowerSubdirectory) -> None:
    shown, beneath = os.statvfs(mount.path), os.statvfs(mount.beneath)
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(shown, name) == getattr(beneath, name), name
    assert shown.f_bavail > 0


def test_open_file_description_locks_work(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.write_bytes(bytes(1000))
    fds = [os.open(path, os.O_RDWR) for _ in range(2)]
    region = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
    fcntl.fcntl(fds[0], fcntl.F_OFD_SETLK, region)
    with pytest.raises(BlockingIOError):
        fcntl.fcntl(fds[1], fcntl.F_OFD_SETLK, region)
    os.close(fds[0])
    fcntl.fcntl(fds[1], fcntl.F_OFD_SETLK, region)
    fcntl.flock(fds[1], fcntl.LOCK_EX)
    os.close(fds[1])


def test_special_files_are_the_kernels(mount: LowerSubdirectory) -> None:
    os.mkfifo(mount.path / "fifo")
    reader = os.open(mount.path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(mount.path / "fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert select.select([reader], [], [], 5)[0] == [reader]
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)
    os.mknod(mount.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert os.stat(mount.path / "null").st_rdev == os.makedev(1, 3)
    with pytest.raises(PermissionError):  # nodev
        os.open(mount.path / "null", os.O_RDONLY)


def test_symlinks_are_followed_by_the_caller_only(mount: LowerSubdirectory, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"outside")
    relative = os.path.relpath(tmp_path / "outside", mount.path)
    os.symlink(relative, mount.path / "relative")
    os.symlink(tmp_path / "outside", mount.path / "absolute")
    os.symlink("loop", mount.path / "loop")
    assert (mount.path / "relative").read_bytes() == (mount.path / "absolute").read_bytes() == b"outside"
    assert os.readlink(mount.path / "relative") == relative
    with pytest.raises(OSError) as caught:
        os.stat(mount.path / "loop")
    assert caught.value.errno == errno.ELOOP


def test_extended_attributes_pass_through(mount: LowerSubdirectory) -> None:
    path = mount.path / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "trusted.libvirt.security.dac", b"+0:+0")
    assert sorted(os.listxattr(mount.beneath / "file")) == ["trusted.libvirt.security.dac", "user.a"]
    assert sorted(os.listxattr(path)) == ["trusted.libvirt.security.dac", "user.a"]
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    for call in (lambda: os.getxattr(path, "user.none"), lambda: os.setxattr(path, "user.b", b"", os.XATTR_REPLACE)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENODATA
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with pytest.raises(OSError) as caught:
            os.getxattr(path, name)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_name_of_255_bytes_works_and_of_256_does_not(mount: LowerSubdirectory) -> None:
    (mount.path / ("n" * 255)).touch()
    with pytest.raises(OSError) as caught:
        (mount.path / ("n" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG
    odd = os.fsdecode(b"\xff\xfe \n%s")
    (mount.path / odd).write_bytes(b"odd")
    assert (mount.beneath / odd).read_bytes() == b"odd"


def test_file_system_mounted_in_the_lower_directory_is_not_shown(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "other").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base / "other"], check=True)
    other_fd = os.open(base / "other", os.O_PATH)
    try:
        (base / "other" / "inside").touch()
        (base / "file").touch()
        with LowerMount(base) as mount:
            assert os.listdir(mount.path) == ["file"]
            with pytest.raises(OSError) as caught:
                os.stat(mount.path / "other" / "inside")
            assert caught.value.errno == errno.EXDEV
    finally:
        os.close(other_fd)
        subprocess.run(["umount", base / "other"], check=True)


def test_killed_writers_leave_nothing_open(mount: LowerSubdirectory) -> None:
    writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={mount.path}/file", "bs=1M"], stderr=subprocess.DEVNULL)
    while not (mount.path / "file").exists() or os.stat(mount.path / "file").st_size < 4 * MIB:
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    os.unlink(mount.path / "file")


def test_directories_can_be_synced(mount: LowerSubdirectory) -> None:
    fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def test_bytes_survive_all_ways_of_reading(mount: LowerSubdirectory) -> None:
    data = os.urandom(2 * MIB + 4321)
    (mount.beneath / "file").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    for command in (["sha256sum"], ["dd", "bs=1000", "status=none"], ["dd", "bs=3M", "status=none"]):
        if command[0] == "dd":
            got = subprocess.run([*command, f"if={mount.path}/file"], capture_output=True, check=True).stdout
            assert hashlib.sha256(got).hexdigest() == digest
        else:
            got = subprocess.run([*command, mount.path / "file"], capture_output=True, check=True).stdout
            assert got.split()[0].decode() == digest
