"""docs/SEMANTICS.md, section 2."""

import ctypes
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.conftest import Image, errno_of, eventually, opened
from tools.mount import BasefsMount
from tools.rig import Rig

pytestmark = [pytest.mark.mount, pytest.mark.glance]

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def rename_with(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def install(image: Image, data: bytes) -> None:
    """As nova does at the end of a download."""
    part = image.path.with_name(image.name + ".part")
    part.write_bytes(data)
    part.rename(image.path)


def test_what_was_there_shows_through(mount: BasefsMount, lower_names: tuple[str, ...]) -> None:
    """[S201] What was in the directory before the mount shows through and can be read and written."""
    for name in lower_names:
        path = mount.mountpoint / name
        assert path.read_text() == f"{name} before the mount\n"
        with path.open("r+") as file:
            file.write(name.upper())
        assert path.read_text() == f"{name.upper()} before the mount\n"
        path.write_text(f"{name} before the mount\n")


def test_a_lower_file_wins(image: Image) -> None:
    """[S202] A lower file hides the image of the same name.

    [S203] A rename of a lower file onto the name of an image succeeds; the name is then the lower file's.

    [S205] When the lower file that hid an image is removed, the name is the image's again.
    """
    assert image.path.read_bytes() == image.content
    install(image, b"nova's own")
    assert image.path.read_bytes() == b"nova's own"
    image.path.write_bytes(b"and writable")
    assert image.path.read_bytes() == b"and writable"
    assert os.listdir(image.mount.mountpoint).count(image.name) == 1
    image.path.unlink()
    eventually(lambda: image.path.exists() and image.path.read_bytes() == image.content)


def test_a_lower_file_wins_over_an_image_nobody_looked_up(image: Image) -> None:
    """[S203] A rename of a lower file onto the name of an image succeeds; the name is then the lower file's."""
    part = image.path.with_name(image.name + ".converted")
    part.write_bytes(b"nova's own")
    rename_with(part, image.path, 0)
    assert image.path.read_bytes() == b"nova's own"
    assert image.report()["fetched_bytes"] <= 1 << 20


def test_an_open_handle_stays_with_the_image(image: Image) -> None:
    """[S204] A handle on an image that was opened before a lower file took its name goes on reading the image."""
    with opened(image.path) as fd:
        install(image, b"nova's own")
        assert os.pread(fd, 100, 2_000_000) == image.content[2_000_000:2_000_100]
        assert os.fstat(fd).st_size == len(image.content)
        image.path.unlink()
        assert os.pread(fd, 100, 2_900_000) == image.content[2_900_000:2_900_100]


def test_names_are_taken(image: Image, tmp_path: Path) -> None:
    """[S206] Nothing new can be made under the name of an image: O_CREAT with O_EXCL, mkdir, mknod, symlink, link and
    RENAME_NOREPLACE answer EEXIST.
    """
    other = image.path.with_name("another")
    other.write_bytes(b"")
    for attempt in (
        lambda: os.open(image.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        lambda: os.mkdir(image.path),
        lambda: os.mknod(image.path, stat.S_IFIFO | 0o600),
        lambda: os.symlink("target", image.path),
        lambda: os.link(other, image.path),
        lambda: rename_with(other, image.path, RENAME_NOREPLACE),
    ):
        assert errno_of(attempt) == "EEXIST"
    assert image.path.read_bytes() == image.content
    other.unlink()


def test_lower_files_take_everything(mount: BasefsMount) -> None:
    """[S207] Lower files take what their file system takes: data, truncation, times, owner, mode, extended attributes,
    hard and symbolic links, directories, FIFOs.
    """
    directory = mount.mountpoint / "directory"
    directory.mkdir(mode=0o750)
    file = directory / "file"
    with file.open("wb") as stream:
        stream.write(b"0123456789")
        stream.flush()
        os.fsync(stream.fileno())
        stream.truncate(5)
    os.utime(file, ns=(3_000_000_000, 4_000_000_000))
    os.chown(file, 1234, 4321)
    file.chmod(0o640)
    os.setxattr(file, "user.note", b"value")
    os.link(file, directory / "hard")
    os.symlink("file", directory / "soft")
    os.mkfifo(directory / "fifo")
    shown = file.stat()
    assert (directory / "soft").read_bytes() == (directory / "hard").read_bytes() == b"01234"
    assert (shown.st_mtime_ns, shown.st_uid, shown.st_gid, shown.st_nlink) == (4_000_000_000, 1234, 4321, 2)
    assert stat.S_IMODE(shown.st_mode) == 0o640
    assert os.getxattr(file, "user.note") == b"value"
    assert stat.S_ISFIFO((directory / "fifo").stat().st_mode)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    for path in sorted(directory.iterdir()):
        path.unlink()
    directory.rmdir()


def test_what_is_left_after_the_unmount(rig: Rig, basefs_mount: Callable[..., BasefsMount]) -> None:
    """[S208] What was made through the mount is in the lower directory once basefs is unmounted, and no image is.

    [S1205] `basefs unmount` is refused while a file is open, and the mount goes on.

    [S408] Inode numbers of images, of `.basefs` and of lower files are the same after a restart of basefs.

    [S703] Times, owner and mode of an image are the same after a restart of basefs.
    """
    ids = [rig.upload(b"image %d" % n * 1000, f"left{n}") for n in range(2)]
    mount = basefs_mount(start=False)
    (mount.mountpoint / "before").write_bytes(b"1")
    mount.start()
    image = mount.path(ids[0])
    with image.open("rb"):
        refused = mount.cli("unmount", check=False)
        assert refused.returncode != 0
        assert mount.is_mounted
        assert image.read_bytes() == b"image 0" * 1000
    (mount.mountpoint / "after").write_bytes(b"2")
    os.utime(image, ns=(5_000_000_000, 0))
    os.chown(image, 11, 12)
    image.chmod(0o600)
    numbers = inode_numbers(mount, ids)
    shown = image.stat()
    mount.unmount()
    assert sorted(os.listdir(mount.mountpoint)) == ["after", "before"]
    mount.start()
    assert inode_numbers(mount, ids) == numbers
    again = image.stat()
    assert [getattr(again, field) for field in KEPT] == [getattr(shown, field) for field in KEPT]
    assert (again.st_mtime_ns, again.st_atime_ns, again.st_uid, again.st_gid) == (0, 5_000_000_000, 11, 12)
    assert stat.S_IMODE(again.st_mode) == 0o600


KEPT = ("st_mode", "st_ino", "st_uid", "st_gid", "st_size", "st_blocks", "st_atime_ns", "st_mtime_ns")


def inode_numbers(mount: BasefsMount, ids: list[str]) -> dict[str, int]:
    names = [
        ".", "before", "after", ".basefs", ".basefs/by-id", ".basefs/images", ".basefs/status.json",
        *[mount.path(one).name for one in ids], *[f".basefs/images/{one}.json" for one in ids],
        *[f".basefs/by-id/{one}" for one in ids],
    ]  # fmt: skip
    return {name: os.lstat(mount.mountpoint / name).st_ino for name in names}
