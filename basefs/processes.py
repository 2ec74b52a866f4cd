"""Who runs and who uses what, read from /proc by the standard library only; no file on a mount is touched."""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from basefs.mounts import Mount

KEEPER_MODULE = "basefs.keeper"


class MountUser(NamedTuple):
    """A process that has something on a mount open, and one path of it."""

    pid: int
    name: str
    path: str


def users_of(mount: Mount) -> list[MountUser]:
    """Processes with an open file, a mapping or their working directory on the mount, by pid.

    Processes that end meanwhile, or that we may not look into, are left out.
    """
    found = []
    for pid in all_pids():
        path = next((path for path in _paths_of(pid, mount) if _is_below(path, mount.mountpoint)), None)
        if path is not None:
            found.append(MountUser(pid=pid, name=_name_of(pid), path=path))
    return found


def describe_users(users: list[MountUser], *, shown_max: int = 5) -> str:
    """One line: `2 processes have files open on it: qemu-img (pid 12, …/abc), …`."""
    if not users:
        return "nobody in this pid namespace has a file open on it; another mount may lie on it, or a kernel user"
    shown = ", ".join(f"{user.name} (pid {user.pid}, {user.path})" for user in users[:shown_max])
    more = f" and {len(users) - shown_max} more" if len(users) > shown_max else ""
    count = "1 process has" if len(users) == 1 else f"{len(users)} processes have"
    return f"{count} files open on it: {shown}{more}"


def keeper_of(mountpoint: str | os.PathLike[str]) -> int | None:
    """The pid of the basefs keeper that was started for the mount point, or None."""
    for pid in all_pids():
        spec = _keeper_spec(pid)
        if spec is not None and spec.get("mountpoint") == os.fspath(mountpoint) and pid != os.getpid():
            return pid
    return None


def fds_on_path(pid: int, path: str, *, but_not_on: Mount) -> list[str]:
    """`/proc/<pid>/fd/<n>` of the process's fds on that path that are not of the mount: what lies under it."""
    base = f"/proc/{pid}"
    try:
        fds = os.listdir(f"{base}/fd")
    except OSError:
        return []
    return [
        f"{base}/fd/{fd}"
        for fd in fds
        if readlink(f"{base}/fd/{fd}") == path and _mount_id_of(f"{base}/fdinfo/{fd}") != but_not_on.mount_id
    ]


def is_running(pid: int) -> bool:
    """True while the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def command_of(pid: int) -> list[str]:
    """The process's arguments; none if it is gone."""
    try:
        return [argument.decode("utf-8", "replace") for argument in _argv(pid)]
    except OSError:
        return []


def json_argument(pid: int) -> dict[str, Any] | None:
    """The last argument of the process if it is a JSON object, as that of every keeper and server is."""
    try:
        return _parsed(_argv(pid)[-1])
    except (OSError, IndexError):
        return None


def _keeper_spec(pid: int) -> dict[str, Any] | None:
    try:
        argv = _argv(pid)
    except OSError:
        return None
    if KEEPER_MODULE.encode() not in argv[1:5] or not is_running(pid):
        return None
    return _parsed(argv[-1])


def _argv(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().split(b"\0")[:-1]


def _parsed(argument: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(argument)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def all_pids() -> list[int]:
    """Every process of our pid namespace."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def _is_below(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint + "/")


def _paths_of(pid: int, mount: Mount) -> Iterator[str]:
    base = f"/proc/{pid}"
    # The lower directory and its files have the same paths as the mount over them; the mount id tells them apart,
    # but means something in our own mount namespace only.
    has_our_mounts = readlink(f"{base}/ns/mnt") == readlink("/proc/self/ns/mnt")
    try:
        fds = os.listdir(f"{base}/fd")
    except OSError:
        return
    for fd in fds:
        if not has_our_mounts or _mount_id_of(f"{base}/fdinfo/{fd}") == mount.mount_id:
            yield readlink(f"{base}/fd/{fd}")
    yield readlink(f"{base}/cwd")
    yield readlink(f"{base}/root")
    try:
        with open(f"{base}/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.rstrip("\n").split(None, 5)
                if len(fields) == 6:
                    yield fields[5]
    except OSError:
        return


def readlink(path: str) -> str:
    """Where a link of /proc leads; empty if it is gone."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _mount_id_of(fdinfo: str) -> int | None:
    try:
        with open(fdinfo, encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("mnt_id:")), None)
    except OSError:
        return None
