"""What the pass-through half does to the lower directory: functions over fds, blocking, run in threads.

Directories and files are named by fds and single names, never by paths, so nothing resolves outside the
lower directory. Each function either succeeds whole or leaves no fd and no half-made file behind.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from basefs.fuse.lower_syscalls import open_cached, proc_path, set_times

# Of an opener's flags only these reach the lower file. O_DIRECT would want aligned buffers from us, O_APPEND
# would make the lower kernel ignore the offsets that the mount's kernel worked out, O_CREAT and O_EXCL are
# decided before, and the rest says how a path is resolved.
KEPT_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME | os.O_NONBLOCK

Found = tuple[int, os.stat_result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Creator:
    """Whom a new file belongs to, and its permission bits as asked, the umask already taken off."""

    uid: int
    gid: int
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeChange:
    """The attributes to set; None leaves one alone. `kills_set_id`: a change of size takes set-id bits away."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    kills_set_id: bool = True


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Iterator[int]:
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def _removed_on_error(parent_fd: int, name: bytes) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
                os.rmdir(name, dir_fd=parent_fd)
            else:
                os.unlink(name, dir_fd=parent_fd)
        raise


def find_name(parent_fd: int, name: bytes) -> Found:
    """An O_PATH fd on the entry, and its status. OSError: EXDEV for a directory of another file system."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent_fd)
    with _closed_on_error(fd):
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode) and status.st_dev != os.fstat(parent_fd).st_dev:
            raise OSError(errno.EXDEV, "a file system mounted in the lower directory is not shown", os.fsdecode(name))
        return fd, status


def find_cached_name(parent_fd: int, name: bytes) -> Found | None:
    """Like find_name, but never blocks on a file system of this host; None if only the disk can tell."""
    fd = open_cached(parent_fd, name)
    if fd is None:
        return None
    with _closed_on_error(fd):
        return fd, os.fstat(fd)


def find_names(parent_fd: int, names: Sequence[bytes]) -> list[tuple[bytes, int, os.stat_result]]:
    """Like find_name for those of `names` that can be shown; the others are left out."""
    found: list[tuple[bytes, int, os.stat_result]] = []
    try:
        for name in names:
            try:
                found.append((name, *find_name(parent_fd, name)))
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.EXDEV, errno.ESTALE):
                    raise
    except BaseException:
        close_all([fd for _, fd, _ in found])
        raise
    return found


def find_inode(root_fd: int, st_ino: int, entries_max: int) -> Found:
    """Searches the lower directory's tree for an inode number, looking at no more than `entries_max` entries.

    FileNotFoundError if it is not there. The kernel asks for a number that this server never gave out only after
    a restart of the server. Names that go or come meanwhile hide none that stay.
    """
    left = entries_max
    pending = [os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=root_fd)]
    try:
        while pending and left > 0:
            with contextlib.closing(_Fd(pending.pop())) as parent, contextlib.suppress(OSError):
                for name, entry_ino, is_directory in _entries(parent.fd):
                    left -= 1
                    if entry_ino != st_ino and not is_directory:
                        continue
                    try:
                        fd, status = find_name(parent.fd, name)
                    except OSError:
                        continue  # It is gone since it was listed, or on another file system.
                    if status.st_ino == st_ino:
                        return fd, status
                    pending.append(fd)
    finally:
        close_all(pending)
    raise FileNotFoundError(errno.ENOENT, f"no lower file has inode number {st_ino}")


def list_directory(fd: int) -> list[bytes]:
    """The names in a directory, in its own order, without `.` and `..`."""
    return [name for name, _, _ in _entries(fd)]


def _entries(fd: int) -> list[tuple[bytes, int, bool]]:
    """(name, inode number, is a directory) of each entry."""
    with contextlib.closing(_Fd(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd))) as directory:
        with os.scandir(directory.fd) as entries:
            return [(os.fsencode(e.name), e.inode(), e.is_dir(follow_symlinks=False)) for e in entries]


class _Fd:
    """An fd for `contextlib.closing`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


def create_file(parent_fd: int, name: bytes, flags: int, creator: Creator) -> tuple[int, int, os.stat_result]:
    """A new regular file: (fd opened with `flags`, O_PATH fd, status).

    If the name exists: FileExistsError when the opener said O_EXCL, else ESTALE, at which the kernel looks the
    name up again and opens what it finds, its permissions checked.
    """
    open_flags = (flags & KEPT_FLAGS & ~os.O_TRUNC) | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        fd = os.open(name, open_flags, creator.mode, dir_fd=parent_fd)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        raise OSError(errno.ESTALE, "appeared since it was looked up", os.fsdecode(name)) from None
    with _closed_on_error(fd), _removed_on_error(parent_fd, name):
        status = _hand_over(parent_fd, fd, creator)
        return fd, os.open(proc_path(fd), os.O_PATH), status


def make_directory(parent_fd: int, name: bytes, creator: Creator) -> Found:
    """A new directory."""
    os.mkdir(name, creator.mode, dir_fd=parent_fd)
    return _adopt_new(parent_fd, name, creator)


def make_node(parent_fd: int, name: bytes, rdev: int, creator: Creator) -> Found:
    """A new file of the type in `creator.mode`: regular, FIFO, socket or device."""
    os.mknod(name, creator.mode, rdev, dir_fd=parent_fd)
    return _adopt_new(parent_fd, name, creator)


def make_symlink(parent_fd: int, name: bytes, target: bytes, creator: Creator) -> Found:
    """A new symbolic link."""
    os.symlink(target, name, dir_fd=parent_fd)
    return _adopt_new(parent_fd, name, creator)


def make_link(fd: int, parent_fd: int, name: bytes) -> Found:
    """A further name for the inode behind `fd`; a duplicate of `fd`, and the new status."""
    os.link(proc_path(fd), name, dst_dir_fd=parent_fd, follow_symlinks=True)
    copy = os.dup(fd)
    with _closed_on_error(copy):
        return copy, os.fstat(copy)


def remove_file(parent_fd: int, name: bytes) -> None:
    """Removes a name that is no directory."""
    os.unlink(name, dir_fd=parent_fd)


def remove_directory(parent_fd: int, name: bytes) -> None:
    """Removes an empty directory."""
    os.rmdir(name, dir_fd=parent_fd)


def read_link(fd: int) -> bytes:
    """The target of the symbolic link behind `fd`."""
    return os.readlink(b"", dir_fd=fd)


def _adopt_new(parent_fd: int, name: bytes, creator: Creator) -> Found:
    with _removed_on_error(parent_fd, name):
        fd, _ = find_name(parent_fd, name)
        with _closed_on_error(fd):
            return fd, _hand_over(parent_fd, fd, creator)


def _hand_over(parent_fd: int, fd: int, creator: Creator) -> os.stat_result:
    """Gives a file just made its owner, group and mode, as the kernel would have; its status after that."""
    parent, status = os.fstat(parent_fd), os.fstat(fd)
    mode = stat.S_IMODE(creator.mode)
    gid = creator.gid
    if parent.st_mode & stat.S_ISGID:
        # The lower file system did the inheriting: the group is right, and a directory has the bit.
        gid = status.st_gid
        mode |= stat.S_ISGID if stat.S_ISDIR(status.st_mode) else 0
    if (status.st_uid, status.st_gid) != (creator.uid, gid):
        os.chown(proc_path(fd), creator.uid, gid)
        status = os.fstat(fd)
    if not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(status.st_mode) != mode:
        os.chmod(proc_path(fd), mode)
        status = os.fstat(fd)
    return status


def open_inode(path_fd: int, flags: int) -> Found:
    """The regular file behind an O_PATH fd, opened with those of the `flags` that concern a lower file."""
    if not stat.S_ISREG(os.fstat(path_fd).st_mode):
        raise OSError(errno.EOPNOTSUPP, "only regular files are opened by the server")
    fd = os.open(proc_path(path_fd), (flags & KEPT_FLAGS) | os.O_NOCTTY)
    with _closed_on_error(fd):
        if flags & os.O_TRUNC:
            kill_set_id(fd)
        return fd, os.fstat(fd)


def find_open(fds: Sequence[int]) -> list[Found]:
    """For each open file an O_PATH fd on its inode, which may have no name any more, and the status."""
    found: list[Found] = []
    try:
        for fd in fds:
            found.append((os.open(proc_path(fd), os.O_PATH), os.fstat(fd)))  # noqa: PERF401  (closed on error)
    except BaseException:
        close_all([fd for fd, _ in found])
        raise
    return found


def change_attributes(fd: int, file_fd: int | None, change: AttributeChange) -> os.stat_result:
    """Sets attributes of the inode behind `fd` (O_PATH); the new status. `file_fd`, open for writing, is truncated.

    Owner before mode, as a change of owner clears set-id bits; times last, as all else changes them.
    """
    path = proc_path(fd)
    if change.uid is not None or change.gid is not None:
        os.chown(path, -1 if change.uid is None else change.uid, -1 if change.gid is None else change.gid)
    if change.size is not None:
        os.truncate(path if file_fd is None else file_fd, change.size)
        if change.kills_set_id:
            kill_set_id(fd)
    if change.mode is not None:
        os.chmod(path, stat.S_IMODE(change.mode))
    if change.atime_ns is not None or change.mtime_ns is not None:
        set_times(fd, change.atime_ns, change.mtime_ns)
    return os.fstat(fd)


def kill_set_id(fd: int) -> None:
    """Takes away set-user-id, and set-group-id of an executable, as the kernel does when a file is changed."""
    mode = os.fstat(fd).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.chmod(proc_path(fd), stat.S_IMODE(kept))


def sync_directory(fd: int) -> None:
    """Makes the names in a directory durable."""
    with contextlib.closing(_Fd(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd))) as directory:
        os.fsync(directory.fd)


def close_all(fds: Sequence[int]) -> None:
    """Closes every fd. What close(2) reports is lost: these fds have no opener left to tell."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
