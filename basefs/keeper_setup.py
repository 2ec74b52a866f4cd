"""What a keeper does once around its servers: lock, mount point, kernel settings, systemd. Standard library only."""

import contextlib
import fcntl
import json
import logging
import os
import stat
import time
from types import TracebackType
from typing import Any, Self

from basefs import mounts, processes
from basefs.errors import MountError

log = logging.getLogger("basefs.keeper")

LOCK_NAME = "lock"
FUSECTL = "/sys/fs/fuse/connections"
PROBE_S = 3.0
LOCK_PATIENCE_S = 10.0
"""When keeper and server are dead, readers and a standby (at low priority) still end; they have the lock, too. A server
that was just being started does when Python has come up far enough to see it. 2 s were too few at a load of 38."""


class CacheLock:
    """The exclusive right to a cache directory, held as long as the keeper or one of its servers has the fd.

    The file also tells other commands who holds it: `keeper_pid`, `server_pid`, `mountpoint`.
    """

    def __init__(self, cache_dir: str, mountpoint: str, fd: int = -1) -> None:
        """`fd` is the lock as an earlier keeper has taken it, or -1."""
        self._cache_dir = cache_dir
        self._mountpoint = mountpoint
        self.fd = fd

    def __enter__(self) -> Self:
        if self.fd >= 0:
            # A mount that goes on needs no cache disk that works.
            self._note(server_pid=None)
            return self
        try:
            os.makedirs(self._cache_dir, mode=0o700, exist_ok=True)
            _make_private(self._cache_dir)
            self.fd = os.open(os.path.join(self._cache_dir, LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take()
            self.write(server_pid=None)
        except OSError as exc:
            self._close()
            raise MountError(f"cannot use cache_dir {self._cache_dir}: {exc.strerror}") from None
        except MountError:
            self._close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._close()

    def _take(self) -> None:
        end = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock_holder(self._cache_dir) or {}
                pids = [holder.get("keeper_pid"), holder.get("server_pid")]
                running = [pid for pid in pids if isinstance(pid, int) and processes.is_running(pid)]
                if running or time.monotonic() > end:
                    raise MountError(_in_use(self._cache_dir, holder)) from None
                time.sleep(0.05)
            else:
                return

    def write(self, *, server_pid: int | None) -> None:
        """Say who holds the lock now."""
        holder = {"keeper_pid": os.getpid(), "server_pid": server_pid, "mountpoint": self._mountpoint}
        data = json.dumps(holder).encode()
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))

    def note_server(self, server_pid: int) -> None:
        """Say which server holds the lock now. A disk that went read-only must not end a keeper that serves."""
        self._note(server_pid=server_pid)

    def _note(self, *, server_pid: int | None) -> None:
        try:
            self.write(server_pid=server_pid)
        except OSError as exc:
            log.warning("cannot note server %s in the lock file of %s: %s", server_pid, self._cache_dir, exc.strerror)

    def _close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # the disk under it may be gone
                os.close(self.fd)
            self.fd = -1


def _make_private(cache_dir: str) -> None:
    """Close the directory to others: it holds the bytes of every tenant's images.

    Raises:
        MountError: It is another user's, who could open it again, or put other bytes there.
    """
    status = os.stat(cache_dir)
    if status.st_uid != os.geteuid():
        raise MountError(f"cache_dir {cache_dir} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: chown it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        os.chmod(cache_dir, 0o700)
        log.info("cache_dir %s had the mode %o and is closed to others now", cache_dir, stat.S_IMODE(status.st_mode))


def lock_holder(cache_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`keeper_pid`, `server_pid` and `mountpoint` of the last basefs on the cache directory, running or not."""
    try:
        with open(os.path.join(cache_dir, LOCK_NAME), encoding="utf-8") as file:
            holder = json.load(file)
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _in_use(cache_dir: str, holder: dict[str, Any]) -> str:
    return (
        f"cache_dir {cache_dir} is in use by another basefs: keeper pid {holder.get('keeper_pid')}, server pid "
        f"{holder.get('server_pid')}, mounted on {holder.get('mountpoint')}"
    )


def open_lower_directory(mountpoint: str) -> int:
    """An fd of the directory under the mount point, after dead basefs mounts were taken off it.

    Raises:
        MountError: A live basefs is mounted there, or it is no directory.
    """
    while (mount := mounts.mount_at(mountpoint)) is not None and mount.is_basefs:
        keeper_pid = processes.keeper_of(mountpoint)
        if keeper_pid is not None:
            raise MountError(f"{mountpoint} is already mounted by basefs, keeper pid {keeper_pid}")
        state = mounts.probe(mountpoint, deadline_s=PROBE_S)
        if state != "dead":
            raise MountError(
                f"{mountpoint} is already mounted by a basefs whose keeper is gone ({state}): run basefs unmount first"
            )
        log.warning("%s: removing the mount that a basefs left behind when it died", mountpoint)
        mounts.unmount(mountpoint, is_lazy=True)
    try:
        return os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(f"cannot use the mount point {mountpoint}: {exc.strerror}") from None


class ReadyPipe:
    """The pipe on which `basefs mount --background` waits; `fd` is None where nobody does."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def answer(self, answer: dict[str, object]) -> None:
        """Say how it went, once; what is said later is not."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with contextlib.suppress(OSError):  # It went away.
            os.write(fd, json.dumps(answer).encode())
        with contextlib.suppress(OSError):
            os.close(fd)


def tune_mount(mount: mounts.Mount, read_ahead_kib: int, max_background: int) -> None:
    """Raise the kernel's readahead and the number of background requests; what is refused is logged."""
    connection = f"{FUSECTL}/{mount.minor}"
    if not os.path.isdir(connection):
        # systemd has this mounted; a bare system or a container may not.
        with contextlib.suppress(OSError):
            mounts.mount_fusectl(FUSECTL)
    for path, value in (
        (f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb", read_ahead_kib),
        (f"{connection}/max_background", max_background),
        (f"{connection}/congestion_threshold", max(1, max_background * 3 // 4)),
    ):
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(str(value))
        except OSError as exc:
            log.warning("cannot write %d to %s: %s; reads will be slower", value, path, exc.strerror)
