"""docs/SEMANTICS.md, sections 9, 10 and 13."""

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.conftest import IMAGE_BYTES, Image, errno_of, opened, status
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]

ENOTSUP = errno.errorcode[errno.ENOTSUP]
F_OFD_GETLK, F_OFD_SETLK = 36, 37
FIBMAP, FIGETBSZ, FS_IOC_FIEMAP, FS_IOC_GETFLAGS = 1, 2, 0xC020660B, 0x80086601


def test_xattrs(rig: Rig, image: Image) -> None:
    """[S901] An image has the extended attributes `user.basefs.image_id`, `.name`, `.state`, `.cached_bytes` and
    `.source`.
    """
    image.path.read_bytes()
    assert os.getxattr(image.path, "user.basefs.image_id") == image.id.encode()
    assert os.getxattr(image.path, "user.basefs.name").decode() == image.report()["name"]
    assert os.getxattr(image.path, "user.basefs.state") == b"complete"
    assert os.getxattr(image.path, "user.basefs.cached_bytes") == str(IMAGE_BYTES).encode()
    assert os.getxattr(image.path, "user.basefs.source").startswith(b"ranged: ")
    assert sorted(os.listxattr(image.path)) == [
        f"user.basefs.{word}" for word in ("cached_bytes", "image_id", "name", "source", "state")
    ]


def virtual(image: Image) -> list[Path]:
    return [image.path, *[image.mount.mountpoint / ".basefs" / name for name in ("status.json", "by-id")]]


def test_other_xattrs(image: Image) -> None:
    """[S902] Reading any other extended attribute of a virtual file answers ENODATA."""
    for path in virtual(image):
        for name in (
            "user.other", "security.selinux", "security.capability", "trusted.libvirt.security.ref_dac",
            "system.posix_acl_access",
        ):  # fmt: skip
            assert errno_of(lambda path=path, name=name: os.getxattr(path, name)) == "ENODATA"


def test_setting_xattrs(image: Image) -> None:
    """[S903] Setting or removing an extended attribute of a virtual file answers ENOTSUP to root, never EPERM or
    EACCES.
    """
    for path in virtual(image):
        for name in ("user.basefs.state", "user.other", "security.selinux", "trusted.libvirt.security.dac"):
            assert errno_of(lambda path=path, name=name: os.setxattr(path, name, b"x")) == ENOTSUP
            assert errno_of(lambda path=path, name=name: os.removexattr(path, name)) == ENOTSUP


def test_statfs(image: Image, tmp_path: Path) -> None:
    """[S904] statfs gives the numbers of the lower directory's file system."""
    fields = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
    below = os.statvfs(image.mount.instances_path)
    for path in (image.path, image.mount.mountpoint):
        shown = os.statvfs(path)
        assert [getattr(shown, field) for field in fields] == [getattr(below, field) for field in fields]


def ofd_lock(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


def test_locks(image: Image) -> None:
    """[S905] Locks are the kernel's own: flock, POSIX and OFD locks work on images and lower files, and conflict as
    they do on a local disk.
    """
    lower = image.path.with_name("locked")
    lower.write_bytes(b"0123456789")
    for path, flags in ((image.path, os.O_RDONLY), (lower, os.O_RDWR)):
        with opened(path, flags) as one, opened(path, flags) as other:
            for byte in (100, 101, 201):  # as qemu does
                ofd_lock(one, fcntl.F_RDLCK, byte)
                ofd_lock(other, fcntl.F_RDLCK, byte)
            fcntl.flock(one, fcntl.LOCK_EX)
            assert errno_of(lambda other=other: fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)) == "EAGAIN"
            fcntl.flock(one, fcntl.LOCK_UN)
            fcntl.lockf(one, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 500)
            if flags == os.O_RDWR:
                assert errno_of(lambda other=other: ofd_lock(other, fcntl.F_WRLCK, 100)) == "EAGAIN"
                ofd_lock(other, fcntl.F_WRLCK, 300)
                assert errno_of(lambda one=one: ofd_lock(one, fcntl.F_RDLCK, 300)) == "EAGAIN"
    lower.unlink()


def test_fsync(image: Image) -> None:
    """[S906] fsync, fdatasync and close of an image succeed."""
    with opened(image.path) as fd:
        os.fsync(fd)
        os.fdatasync(fd)


def test_access(image: Image) -> None:
    """[S907] access says that an image is readable and not executable."""
    assert os.access(image.path, os.F_OK)
    assert os.access(image.path, os.R_OK)
    assert not os.access(image.path, os.X_OK)


# -- .basefs


def test_status_json(mount: BasefsMount) -> None:
    """[S1001] `.basefs/status.json` holds what `basefs status -f json` prints, less what that asks the keeper."""
    passing = ("uptime_s", "fuse_requests", "catalog_refreshed_at", "fetched_bytes", "fetch_requests")
    printed, held = mount.status(), status(mount)
    of_keeper = {"standby_pid", "standby_state", "deaths", "last_death", "held_fds", "config_error"}
    of_keeper |= {"readers", "reader_deaths", "readers_reason"}
    assert printed.keys() - held.keys() == of_keeper
    assert {key: printed[key] for key in held if key not in passing} == {
        key: value for key, value in held.items() if key not in passing
    }


def test_by_id(rig: Rig, image: Image) -> None:
    """[S1002] `.basefs/by-id` has for every image in root's listing a link of the image's id to its file."""
    mount = image.mount
    refused = rig.upload(b"refused", "no link", container_format="ovf")
    assert not mount.path(refused).exists()
    links = mount.mountpoint / ".basefs" / "by-id"
    assert os.readlink(links / image.id) == f"../../{image.name}"
    assert (links / image.id).read_bytes() == image.content
    names = os.listdir(links)
    assert refused not in names
    assert not (links / refused).exists()
    listed = {name for name in os.listdir(mount.mountpoint) if len(name) == 40}
    assert {mount.path(image_id).name for image_id in names} == listed


def test_image_json(rig: Rig, image: Image) -> None:
    """[S1003] `.basefs/images/<image id>.json` holds what `basefs image show -f json` prints, also for a refused
    image.
    """
    refused = rig.upload(b"refused", "json", container_format="ovf")
    assert not image.mount.path(refused).exists()
    directory = image.mount.mountpoint / ".basefs" / "images"
    for image_id in (image.id, refused):
        assert json.loads((directory / f"{image_id}.json").read_text()) == image.mount.image(image_id)
        assert f"{image_id}.json" in os.listdir(directory)
        assert (directory / f"{image_id}.json").stat().st_size > 100
    assert not (directory / "unknown.json").exists()


def test_a_file_says_how_things_stand_at_its_opening(image: Image) -> None:
    """[S1004] A file of `.basefs` says how things stand when it is opened, and the same to the end of that open
    file.
    """
    path = image.mount.mountpoint / ".basefs" / "images" / f"{image.id}.json"
    with path.open("rb") as before:
        image.path.read_bytes()
        assert json.loads(path.read_bytes())["state"] == "complete"
        assert json.loads(before.read())["state"] == "unchecked"


def test_read_only(image: Image) -> None:
    """[S1005] Every attempt to change something in `.basefs`, or `.basefs` itself, answers EROFS to root."""
    root = image.mount.mountpoint
    basefs = root / ".basefs"
    report = basefs / "images" / f"{image.id}.json"
    link = basefs / "by-id" / image.id
    lower = root / "to be moved"
    lower.write_bytes(b"")
    attempts: dict[str, Callable[[], object]] = {
        "make a file": lambda: (basefs / "new").write_bytes(b""),
        "make a file by id": lambda: (basefs / "by-id" / "new").write_bytes(b""),
        "make a directory": (basefs / "new").mkdir,
        "make a link": lambda: (basefs / "new").symlink_to("x"),
        "make a hard link": lambda: os.link(lower, basefs / "new"),
        "make a FIFO": lambda: os.mkfifo(basefs / "new"),
        "rename into": lambda: lower.rename(basefs / "new"),
        "rename out": lambda: report.rename(root / "moved"),
        "rename itself": lambda: basefs.rename(root / "moved"),
        "remove a file": (basefs / "status.json").unlink,
        "remove a report": report.unlink,
        "remove a link": link.unlink,
        "remove a directory": (basefs / "images").rmdir,
        "remove itself": basefs.rmdir,
        "truncate": lambda: os.truncate(basefs / "status.json", 0),
        "chmod": lambda: report.chmod(0o777),
        "chown": lambda: os.chown(basefs, 1, 1),
        "utime": lambda: os.utime(basefs / "status.json"),
        "open for writing": lambda: os.open(basefs / "status.json", os.O_WRONLY),
        "open for reading and writing": lambda: os.open(report, os.O_RDWR),
        "open and truncate": lambda: os.open(report, os.O_RDONLY | os.O_TRUNC),
        "append": lambda: os.open(basefs / "status.json", os.O_WRONLY | os.O_APPEND),
    }
    assert {name: errno_of(attempt) for name, attempt in attempts.items()} == dict.fromkeys(attempts, "EROFS")
    lower.unlink()


def test_a_lower_file_of_that_name(mount: BasefsMount) -> None:
    """[S1006] A lower file or directory called `.basefs` is hidden and untouched."""
    assert sorted(os.listdir(mount.mountpoint / ".basefs")) == ["by-id", "images", "status.json"]
    assert os.listdir(mount.mountpoint).count(".basefs") == 1
    below = open_lower(mount) / ".basefs" / "precious"
    assert below.read_text() == "an operator's\n"


def open_lower(mount: BasefsMount) -> Path:
    """The lower directory, by the fd that the server holds."""
    fds = Path(f"/proc/{status(mount)['server_pid']}/fd")
    wanted = str(mount.mountpoint)
    return next(fd for fd in fds.iterdir() if os.readlink(fd) == wanted and (fd / ".basefs" / "precious").exists())


# -- not offered


def test_fallocate(image: Image) -> None:
    """[S1301] fallocate answers EOPNOTSUPP, also on lower files; programs fall back to writing."""
    lower = image.path.with_name("allocated")
    with opened(lower, os.O_RDWR | os.O_CREAT) as fd:
        subprocess.run(["fallocate", "-l", "4096", lower], capture_output=True, check=False)
        assert os.fstat(fd).st_size == 0
        done = subprocess.run(["fallocate", "-l", "4096", lower], capture_output=True, text=True, check=False)
        assert "not supported" in done.stderr
        os.posix_fallocate(fd, 0, 8192)
        assert os.fstat(fd).st_size == 8192
    lower.unlink()


def test_tmpfile(mount: BasefsMount) -> None:
    """[S1302] O_TMPFILE answers EOPNOTSUPP; a file needs a name."""
    assert errno_of(lambda: os.open(mount.mountpoint, os.O_TMPFILE | os.O_RDWR)) == ENOTSUP


def test_ioctls(image: Image) -> None:
    """[S1303] ioctls that ask for block maps or file flags fail with ENOTTY or EOPNOTSUPP, as on any file that is no
    block device.
    """
    with opened(image.path) as fd:
        for request in (FS_IOC_GETFLAGS, FS_IOC_FIEMAP, 0x1268, 0x5401):  # the last: BLKSSZGET, TCGETS
            assert errno_of(lambda request=request: fcntl.ioctl(fd, request, bytes(64))) in ("ENOTTY", ENOTSUP)


assert sys.maxsize > 2**32, "struct flock is packed for 64 bits"
