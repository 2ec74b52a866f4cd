"""The kernel's mount table and mount(2), by the standard library only.

Nothing here touches what lies *in* a mount: a path is never stat'ed, because a stat on a FUSE mount whose
server hangs never comes back, and one from the server itself is a deadlock. `/proc/self/mountinfo` and
`readlink` are answered by the kernel alone.
"""

import ctypes
import errno
import os
import select
import signal
import struct
import sys
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

FUSE_TYPE = "fuse.basefs"
FUSE_SOURCE = "basefs"

# struct fuse_out_header (16 bytes), then major, minor, max_readahead, flags (include/uapi/linux/fuse.h)
_INIT_FLAGS_AT = 28
_INIT_IN_FLAGS2_AT = 40 + 16
_FUSE_HAS_RESEND = 1 << 39
_FUSE_AUTO_INVAL_DATA = 1 << 12
_FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_NOTIFY_RESEND = struct.pack("<IiQ", 16, 7, 0)
"""Written to /dev/fuse (Linux >= 6.9): hand out again the requests that were taken and not answered."""

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_MOUNTINFO = "/proc/self/mountinfo"
_SYMLINKS_MAX = 40
_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """One line of mountinfo. `minor` names the FUSE connection when the type is FUSE."""

    mount_id: int
    major: int
    minor: int
    mountpoint: str
    options: str
    fstype: str
    source: str
    super_options: str

    @property
    def is_basefs(self) -> bool:
        """True for a mount that a basefs keeper made."""
        return self.fstype == FUSE_TYPE


def mount_table() -> list[Mount]:
    """All mounts of this process's mount namespace, in the order they were made."""
    with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as table:
        return [_parse_line(line) for line in table.read().splitlines()]


def mount_at(mountpoint: str | os.PathLike[str]) -> Mount | None:
    """The topmost mount exactly on the path, or None. The path must be absolute and resolved."""
    wanted = os.fspath(mountpoint)
    return next((mount for mount in reversed(mount_table()) if mount.mountpoint == wanted), None)


def mount_by_id(mount_id: int) -> Mount | None:
    """The mount with that id while it is attached somewhere, or None."""
    return next((mount for mount in mount_table() if mount.mount_id == mount_id), None)


def resolved(path: str | os.PathLike[str]) -> "Path":
    """The absolute path with every symbolic link followed, as mountinfo would spell it.

    Components that do not exist, and those inside a basefs mount, are kept as they are. None is stat'ed.

    Raises:
        OSError: ELOOP for a loop of links.
    """
    from pathlib import Path  # the keeper never comes here, and saves 0.6 MiB

    ours = {mount.mountpoint for mount in mount_table() if mount.is_basefs}
    pending = os.path.abspath(path).split("/")[1:][::-1]
    done = "/"
    links = 0
    while pending:
        name = pending.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            done = os.path.dirname(done)
            continue
        candidate = os.path.join(done, name)
        if candidate in ours:
            return Path(os.path.normpath(os.path.join(candidate, *pending[::-1])))
        try:
            target = os.readlink(candidate)
        except OSError:
            done = candidate
            continue
        links += 1
        if links > _SYMLINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
        if target.startswith("/"):
            done = "/"
        pending.extend(target.split("/")[::-1])
    return Path(done)


def tuned_init_answer(answer: bytes) -> bytes:
    """Libfuse's answer to FUSE_INIT with two flags changed that pyfuse3 cannot change.

    Less FUSE_AUTO_INVAL_DATA: with it the kernel asks for the attributes before every read once they are a second
    old, and drops the answer if an asynchronous read was completed meanwhile (fs/fuse/file.c: fuse_aio_complete): a
    guest with several reads in flight then cost one GETATTR for every six READs (measured). Images never change; a
    lower file's page cache is dropped at each open.

    Plus FUSE_PARALLEL_DIROPS (Linux >= 4.7): without it one lookup that waits for Glance holds up every listing and
    every other first lookup in `_base` (measured: as long as lookup_deadline_s).
    """
    if len(answer) < _INIT_FLAGS_AT + 4:
        return answer
    (flags,) = struct.unpack_from("<I", answer, _INIT_FLAGS_AT)
    changed = bytearray(answer)
    struct.pack_into("<I", changed, _INIT_FLAGS_AT, flags & ~_FUSE_AUTO_INVAL_DATA | _FUSE_PARALLEL_DIROPS)
    return bytes(changed)


def has_resend(init_request: bytes) -> bool:
    """Whether the kernel that sent this FUSE_INIT knows FUSE_NOTIFY_RESEND."""
    if len(init_request) < _INIT_IN_FLAGS2_AT + 4:
        return False
    (flags2,) = struct.unpack_from("<I", init_request, _INIT_IN_FLAGS2_AT)
    return bool(flags2 & _FUSE_HAS_RESEND >> 32)


def mount_fuse(fuse_fd: int, mountpoint: str, *, root_mode: int = 0o40000) -> None:
    """Attach the FUSE connection of `fuse_fd` (an open /dev/fuse) to the directory.

    Raises:
        OSError: What mount(2) said, with the path.
    """
    options = f"fd={fuse_fd},rootmode={root_mode:o},user_id=0,group_id=0,allow_other,default_permissions"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    target = os.fsencode(mountpoint)
    if _libc.mount(FUSE_SOURCE.encode(), target, FUSE_TYPE.encode(), flags, options.encode()):
        _raise_errno(mountpoint)


def mount_fusectl(directory: str) -> None:
    """Show the kernel's FUSE connections in the directory, as systemd does.

    Raises:
        OSError: What mount(2) said.
    """
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc.mount(b"fusectl", os.fsencode(directory), b"fusectl", flags, b""):
        _raise_errno(directory)


def unmount(mountpoint: str | os.PathLike[str], *, is_lazy: bool = False) -> None:
    """Take the topmost mount off the path; with `is_lazy` also while files on it are open.

    Raises:
        OSError: EBUSY while files on it are open, EINVAL where nothing is mounted.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if is_lazy else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags):
        _raise_errno(os.fspath(mountpoint))


def probe(mountpoint: str | os.PathLike[str], *, deadline_s: float) -> Literal["live", "dead", "hung"]:
    """Whether anybody answers on a FUSE mount, asked by a statfs from a process that may be left behind.

    `dead`: the connection is gone ("Transport endpoint is not connected"). `hung`: no answer within `deadline_s`;
    the asking process is killed, and goes away when the kernel lets it.
    """
    code = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as exc: sys.exit(exc.errno)"
    argv = [sys.executable, "-I", "-S", "-c", code, os.fspath(mountpoint)]
    # Not our pipes: whoever reads them to their end would wait for it, too.
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    pid = os.posix_spawn(sys.executable, argv, os.environ, file_actions=quiet)
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(deadline_s * 1000):
            os.kill(pid, signal.SIGKILL)
            return "hung"
    finally:
        os.close(pidfd)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "dead" if exit_code in {errno.ENOTCONN, errno.ECONNABORTED} else "live"


def _raise_errno(path: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def _parse_line(line: str) -> Mount:
    fields = line.split(" ")
    separator = fields.index("-", 6)
    major, minor = fields[2].split(":")
    return Mount(
        mount_id=int(fields[0]),
        major=int(major),
        minor=int(minor),
        mountpoint=_unescape(fields[4]),
        options=fields[5],
        fstype=fields[separator + 1],
        source=_unescape(fields[separator + 2]),
        super_options=fields[separator + 3],
    )


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\043", "#"), ("\\134", "\\")):
        text = text.replace(octal, char)
    return text
