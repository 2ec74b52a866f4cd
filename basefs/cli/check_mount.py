"""Checks of the mount and its processes, from outside: nothing here waits for a server that hangs."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from basefs import mounts, processes
from basefs.cli.check_host import free_space
from basefs.cli.findings import Finding, error, ok, warning
from basefs.cli.keeper_client import ask_keeper
from basefs.config import Settings
from basefs.control.client import ControlClient
from basefs.errors import ControlError
from basefs.keeper_setup import lock_holder

PROBE_S = 5.0
ANSWER_DEADLINE_S = 5.0
WANTED_OPTIONS = frozenset({"nosuid", "nodev", "noexec", "allow_other", "default_permissions"})


def check_mount(settings: Settings) -> Iterator[Finding]:
    """The mount, who is behind it, the control socket, and the directory below."""
    mount = mounts.mount_at(settings.mountpoint)
    if mount is None or not mount.is_basefs:
        yield _not_mounted(settings, mount)
        yield from _lower_directory(settings.mountpoint)
        return
    yield _options(mount)
    yield _answer(mount)
    yield from _processes(settings)
    yield from _control_socket(settings)
    yield from _readers(settings)
    lower = _lower_path(settings, mount)
    if lower is None:
        yield warning("lower directory", "cannot be seen: no process of this basefs holds it; run this as root")
    else:
        yield from _lower_directory(lower)


def _not_mounted(settings: Settings, mount: mounts.Mount | None) -> Finding:
    if any(other.is_basefs and other.mountpoint == str(settings.mountpoint) for other in mounts.mount_table()):
        assert mount is not None
        return error("mount", f"a mount of type {mount.fstype} lies over basefs on {mount.mountpoint}: unmount it")
    holder = lock_holder(settings.cache_dir) or {}
    pids = [holder.get("keeper_pid"), holder.get("server_pid")]
    running = [str(pid) for pid in pids if isinstance(pid, int) and processes.is_running(pid)]
    if running and holder.get("mountpoint") == str(settings.mountpoint):
        return error(
            "mount",
            f"nothing is mounted on {settings.mountpoint}, but processes {', '.join(running)} of it run on: it was "
            "unmounted lazily, or mounted in another mount namespace",
        )
    return warning("mount", f"basefs is not mounted on {settings.mountpoint}: run `basefs mount --background`")


def _options(mount: mounts.Mount) -> Finding:
    options = set(mount.options.split(",")) | set(mount.super_options.split(","))
    missing = sorted(WANTED_OPTIONS - options)
    if missing:
        return error("mount", f"{mount.mountpoint} lacks the options {', '.join(missing)}: unmount and mount again")
    return ok("mount", f"{mount.mountpoint}, FUSE connection {mount.minor}, {', '.join(sorted(WANTED_OPTIONS))}")


def _answer(mount: mounts.Mount) -> Finding:
    state = mounts.probe(mount.mountpoint, deadline_s=PROBE_S)
    if state == "dead":
        return error(
            "mount answers",
            "Transport endpoint is not connected: keeper and server died; run `basefs unmount`, then `basefs mount`",
        )
    if state == "hung":
        return error(
            "mount answers",
            f"no answer to statfs within {PROBE_S:g} s: the server hangs; kill the server (kill -9), its keeper "
            "starts another, and no read is lost",
        )
    return ok("mount answers", "statfs from another process came back")


def _processes(settings: Settings) -> Iterator[Finding]:
    holder = lock_holder(settings.cache_dir) or {}
    for name, if_missing in (
        ("keeper", "the server serves on, but nobody would start it again: unmount and mount when no guest runs"),
        ("server", "the keeper starts another; if this lasts, see the log"),
    ):
        pid = holder.get(f"{name}_pid")
        if isinstance(pid, int) and processes.is_running(pid):
            yield ok(name, f"pid {pid} runs")
        else:
            yield error(name, f"pid {pid} does not run: {if_missing}")


def _control_socket(settings: Settings) -> Iterator[Finding]:
    try:
        status = ControlClient(settings.control_socket, answer_deadline_s=ANSWER_DEADLINE_S).status()
    except ControlError as exc:
        yield error("control socket", str(exc))
        return
    detail = f"{settings.control_socket}: {status.get('state')}, {status.get('images')} images"
    if status.get("mountpoint") != str(settings.mountpoint):
        yield error("control socket", f"{detail}, but of another mount point: {status.get('mountpoint')}")
        return
    yield ok("control socket", detail)
    for name, endpoint in status.get("endpoints", {}).items():
        yield _endpoint(name, endpoint)


def _readers(settings: Settings) -> Iterator[Finding]:
    """Whether as many reader processes serve as are configured; nothing where there are to be none."""
    try:
        status = ask_keeper(settings.control_socket, "status", deadline_s=ANSWER_DEADLINE_S)
    except ControlError:
        return  # Said of the keeper already.
    wanted, ready = status.get("readers_wanted", 0), status.get("readers", 0)
    if ready < wanted or (settings.readers and not wanted):
        why = status.get("readers_reason") or "they are being started; if this lasts, see the log"
        yield warning("readers", f"{ready} of {wanted or settings.readers} run: {why}")
    elif wanted:
        yield ok("readers", f"{ready} run, {status.get('reader_deaths')} have died")


def _endpoint(name: str, endpoint: dict[str, Any]) -> Finding:
    """What the server has seen of Glance or Keystone; the checks further down see it from here."""
    check, last = f"server's {name}", f"last error: {endpoint['error'] or 'none'}"
    if endpoint["state"] == "answers":
        return ok(check, f"answers; {last}")
    since = "" if endpoint["since"] is None else time.strftime(" since %F %T", time.localtime(endpoint["since"]))
    return warning(check, f"{endpoint['state']}{since}; {last}; guests wait until it is back, what is cached is served")


def _lower_path(settings: Settings, mount: mounts.Mount) -> Path | None:
    """A path to the directory under the mount: through the fd by which keeper or server hold it."""
    holder = lock_holder(settings.cache_dir) or {}
    for pid in (holder.get("keeper_pid"), holder.get("server_pid")):
        if not isinstance(pid, int):
            continue
        for link in processes.fds_on_path(pid, mount.mountpoint, but_not_on=mount):
            return Path(link)
    return None


def _lower_directory(path: Path) -> Iterator[Finding]:
    try:
        names = os.listdir(path)
        owner = os.stat(path).st_uid
        space = free_space("lower space", path, "nova's own downloads, ephemeral and swap disks")
    except OSError as exc:
        yield error("lower directory", f"cannot be read: {exc.strerror}")
        return
    yield ok("lower directory", f"holds {len(names)} names, owned by uid {owner}")
    yield space
