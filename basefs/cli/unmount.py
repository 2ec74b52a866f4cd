"""`basefs unmount`: take the mount away, whatever state its server is in, and wait until everything has ended."""

import argparse
import contextlib
import errno
import os
import select
import signal
import time
from pathlib import Path

from basefs import mounts, processes
from basefs.cli.common import BasefsCommand, say_error
from basefs.cli.systemd_stop import make_way_for_restart
from basefs.errors import MountError
from basefs.keeper_setup import FUSECTL, lock_holder

END_DEADLINE_S = 35.0
"""A keeper gives its server 5 s, with volumes to detach 25 s, and kills it then."""
PROBE_S = 3.0


class Unmount(BasefsCommand):
    """Unmount basefs; what nova sees then is what lies under the mount."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--lazy",
            action="store_true",
            help="detach the mount although files on it are open; they are served until they are closed",
        )
        parser.add_argument(
            "--for-systemd",
            metavar="UNIT",
            help="for ExecStop= in the unit: if systemd restarts it, keep a mount that is in use for the next start",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the mount is gone and, unless its files are still in use, keeper and server are, too."""
        # Read before anything is stopped: with a configuration that stops the next start, nothing makes way for it.
        mountpoint = self.settings.mountpoint
        if parsed_args.for_systemd is not None:
            make_way_for_restart(parsed_args.for_systemd)
            return
        mount = _our_mount(mountpoint)
        pids = _pids_behind(mountpoint, self.settings.cache_dir)
        users = processes.users_of(mount) if parsed_args.lazy else []
        was_dead = _unmount(mount, is_lazy=parsed_args.lazy)
        is_connected = False if was_dead else _is_connected(mount)
        # Until the kernel has let go of the connection somebody may read a guest's disk through it: nobody is
        # waited for, and above all nobody is killed.
        if is_connected:
            who = (
                processes.describe_users(users) if users else "by another mount namespace, or by who opened it just now"
            )
            say_error(f"unmounted; its files are still served until they are closed: {who}")
            return
        _wait_for_end(pids, may_kill=is_connected is False)


def _our_mount(mountpoint: Path) -> mounts.Mount:
    mount = mounts.mount_at(mountpoint)
    if mount is None:
        raise MountError(f"basefs is not mounted on {mountpoint}")
    if not mount.is_basefs:
        raise MountError(f"{mountpoint}: the topmost mount is no basefs but {mount.fstype} ({mount.source})")
    return mount


def _pids_behind(mountpoint: Path, cache_dir: Path) -> list[int]:
    """Keeper and server of the mount, as far as they run."""
    holder = lock_holder(cache_dir) or {}
    pids = {processes.keeper_of(mountpoint)}
    if holder.get("mountpoint") == str(mountpoint):
        pids |= {holder.get("keeper_pid"), holder.get("server_pid")}
    return sorted(pid for pid in pids if isinstance(pid, int) and processes.is_running(pid))


def _unmount(mount: mounts.Mount, *, is_lazy: bool) -> bool:
    """Take the mount away; whether it was a dead one, which goes whoever has files open on it."""
    try:
        mounts.unmount(mount.mountpoint, is_lazy=is_lazy)
    except OSError as exc:
        if exc.errno == errno.EPERM:
            raise MountError(f"cannot unmount {mount.mountpoint}: {exc.strerror}; run it as root") from None
        if exc.errno != errno.EBUSY:
            raise MountError(f"cannot unmount {mount.mountpoint}: {exc.strerror}") from None
        if mounts.probe(mount.mountpoint, deadline_s=PROBE_S) == "dead":
            mounts.unmount(mount.mountpoint, is_lazy=True)
            return True
        users = processes.describe_users(processes.users_of(mount))
        raise MountError(f"{mount.mountpoint} is busy: {users}; --lazy detaches it all the same") from None
    return False


def _is_connected(mount: mounts.Mount) -> bool | None:
    """Whether the kernel still has the FUSE connection of a mount that was taken away; None if it does not tell."""
    if mounts.mount_at(FUSECTL) is None:
        return None
    return os.path.isdir(f"{FUSECTL}/{mount.minor}")


def _wait_for_end(pids: list[int], *, may_kill: bool) -> None:
    """Wait until the processes have ended; `may_kill` those that hang."""
    end = time.monotonic() + END_DEADLINE_S
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if _has_ended(pidfd, end - time.monotonic()):
                continue
            if may_kill:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not may_kill or not _has_ended(pidfd, PROBE_S):
                raise MountError(f"unmounted, but process {pid} does not end; see its log")
        finally:
            os.close(pidfd)


def _has_ended(pidfd: int, limit_s: float) -> bool:
    return bool(select.select([pidfd], [], [], max(0.0, limit_s))[0])
