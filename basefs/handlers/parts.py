"""Files that are being made in the lower directory, `.basefs.<name>.<host>.part`, and how they get their final name.

Functions over fds and single names, blocking, run in threads. Nothing half-made ever has a final name: what has it was
written, given its owner and times, compared in size and synced before.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import select
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from basefs.cache.chunk_file import ChunkFile
from basefs.cache.renames import RENAME_NOREPLACE, rename_with_flags
from basefs.core.chunk_map import PAGE

_FICLONE = 0x40049409
NOT_CLONED = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
"""What a file system says that shares no blocks between these two files."""
NO_FLAGS = (errno.EINVAL, errno.ENOSYS)
"""What one says that knows no RENAME_NOREPLACE."""
NOT_MOVED = (errno.EXDEV, *NO_FLAGS)
KILLED_WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownFile:
    """What a finished file has: as the image showed it until then."""

    size: int
    uid: int
    gid: int
    mode: int
    atime_ns: int
    mtime_ns: int


def host_name() -> str:
    """What stands for this host in the names of its parts: several hosts may share a lower directory."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:64]


def part_name(base_name: str, host: str) -> str:
    """The name of an image's file until it is finished. nova's cache manager ignores what is no 40 hex digits."""
    return f".basefs.{base_name}.{host}.part"


def is_part_name(name: str) -> bool:
    """Whether a file of that name is not finished."""
    return name.startswith(".basefs.") and name.endswith(".part")


def create_part(lower_fd: int, name: str) -> int:
    """A new empty file, ours alone, for reading and writing, in place of one that could not be removed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=lower_fd)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=lower_fd)


def remove_part(lower_fd: int, name: str) -> None:
    """It is not wanted any more. Never fails: the next server's start removes what is left."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=lower_fd)


def clone(source_fd: int, part_fd: int) -> bool:
    """Have the part share the blocks of the source; False where the file system does not (OSError: it fails)."""
    try:
        fcntl.ioctl(part_fd, _FICLONE, source_fd)
    except OSError as exc:
        if exc.errno in NOT_CLONED:
            return False
        raise
    return True


def copy_chunks(file: ChunkFile, part_fd: int, first: int, count: int) -> bool:
    """Write `count` chunks from `first` on as their checksums say they are; False if one is damaged.

    Chunks of zeros stay holes. What is written are the very bytes that were checked.
    """
    step = file.header.chunk_bytes
    zeros = memoryview(bytes(step))
    for index, chunk in enumerate(file.verify(first, count), start=first):
        if chunk is None:
            return False
        offset = index * step
        while len(chunk) and chunk != zeros[: len(chunk)]:
            written = os.pwrite(part_fd, chunk, offset)
            chunk = chunk[written:]
            offset += written
    return True


def takes_direct_io(part_fd: int) -> bool:
    """Whether the file system takes O_DIRECT, tried as nova does (`nova/privsep/utils.py`); the part is empty after."""
    try:
        fd = os.open(f"/proc/self/fd/{part_fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return False
        raise
    try:
        with mmap.mmap(-1, PAGE) as page:
            os.write(fd, page)
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)
        os.ftruncate(part_fd, 0)
    return True


def free_bytes(lower_fd: int) -> int:
    """What the lower file system has free for us."""
    status = os.fstatvfs(lower_fd)
    return status.f_bavail * status.f_frsize


def finish(fd: int, shown: ShownFile) -> int:
    """Give the file what it was shown with and sync it; its allocated bytes.

    Raises:
        OSError: it is not as long as it was shown, or the disk failed.
    """
    os.fchown(fd, shown.uid, shown.gid)
    os.fchmod(fd, shown.mode)
    status = os.fstat(fd)
    if status.st_size != shown.size:
        raise OSError(errno.EIO, f"it is {status.st_size} bytes long and was shown with {shown.size}")
    os.utime(fd, ns=(shown.atime_ns, shown.mtime_ns))
    os.fsync(fd)
    return status.st_blocks * 512


def make_private(fd: int) -> None:
    """What `finish` did to a chunk file that stays one is taken back."""
    os.fchmod(fd, 0o600)
    os.fchown(fd, os.geteuid(), os.getegid())


def reopened(fd: int) -> int:
    """An fd for reading on the same file."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def is_same_device(lower_fd: int, directory: Path) -> bool:
    """Whether a rename from the directory to the lower one may work."""
    return os.fstat(lower_fd).st_dev == os.stat(directory).st_dev


def move(path: str, lower_fd: int, name: str) -> None:
    """Make the finished file at `path` the lower file `name`, durably. FileExistsError: there is one already.

    Never by a link: a chunk file that had two names for a moment might be changed by its old one after a kill.
    """
    rename_with_flags(-1, os.fsencode(path), lower_fd, os.fsencode(name), RENAME_NOREPLACE)
    sync_directory(lower_fd)


def publish(lower_fd: int, part: str, name: str) -> None:
    """Give a finished part its final name, durably. FileExistsError: there is one already, ours is as before."""
    try:
        rename_with_flags(lower_fd, os.fsencode(part), lower_fd, os.fsencode(name), RENAME_NOREPLACE)
    except OSError as exc:
        if exc.errno not in NO_FLAGS:
            raise
        # NFS has no flags; a link replaces nothing either.
        os.link(part, name, src_dir_fd=lower_fd, dst_dir_fd=lower_fd, follow_symlinks=False)
        os.unlink(part, dir_fd=lower_fd)
    sync_directory(lower_fd)


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable."""
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_left_over(lower_fd: int, host: str) -> None:
    """Remove the parts that a killed server of this host left, and end who still writes to them."""
    pattern = re.compile(rf"\.basefs\.[0-9a-f]{{40}}\.{re.escape(host)}\.part")
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=lower_fd)
    try:
        names = [name for name in os.listdir(directory) if pattern.fullmatch(name)]
    finally:
        os.close(directory)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=lower_fd)
    if names:
        _end_writers(names)


def _end_writers(names: list[str]) -> None:
    """End what a killed server had started: it would hold the space of parts that have no name."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry))  # before the look, so that the signal goes to who was looked at
            try:
                if _writes_to(entry, names):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], KILLED_WAIT_S)
            finally:
                os.close(pidfd)


def _writes_to(pid: str, names: list[str]) -> bool:
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if all(os.path.basename(argument) != b"qemu-img" for argument in arguments):
        return False
    targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return any(os.path.basename(target).removesuffix(" (deleted)") in names for target in targets)
