"""What the unit's ExecStop= does: tell the stop that is half of a restart from one that is meant."""

import os
import select
import signal
import subprocess

from basefs.cli.common import say_error
from basefs.keeper_session_store import PARTS
from basefs.processes import KEEPER_MODULE, command_of

SYSTEMCTL_LIMIT_S = 5.0
END_LIMIT_S = 10.0
"""A keeper gives its server 5 s. systemd's TimeoutStopSec= is above it."""


def make_way_for_restart(unit: str) -> None:
    """Returns when the keeper has made way for the one that systemd starts next, or when that is not asked for.

    Not asked for, or not possible: nothing is done, and the SIGTERM that systemd sends next asks the keeper to unmount,
    which it refuses while files are open. A keeper that is idle unmounts now, too.
    """
    pid = os.environ.get("MAINPID", "")
    # Without it the keeper is dead, and its mount waits for the next one.
    if not pid.isdecimal() or KEEPER_MODULE not in command_of(int(pid)) or _job_of(unit) != "restart":
        return
    # A keeper that makes way without its fds in the store takes the guests' disks with it.
    if _stored_fds(unit) < len(PARTS):
        say_error(f"{unit} has no FileDescriptorStoreMax=: a mount that is in use cannot be restarted")
        return
    pidfd = os.pidfd_open(int(pid))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGUSR1)
        if not select.select([pidfd], [], [], END_LIMIT_S)[0]:
            say_error(f"the keeper, process {pid}, does not make way; the next one takes over from it")
    finally:
        os.close(pidfd)


def _job_of(unit: str) -> str:
    """`start`, `stop`, `restart`, ... : what systemd is doing with the unit; empty if that cannot be found out."""
    for line in _systemctl("list-jobs", "--no-legend", "--no-pager", "--plain").splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1] == unit:
            return fields[2]
    return ""


def _stored_fds(unit: str) -> int:
    count = _systemctl("show", "--property=NFileDescriptorStore", "--value", unit).strip()
    return int(count) if count.isdecimal() else 0


def _systemctl(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["systemctl", *arguments],  # of the PATH that systemd sets
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        say_error(f"cannot ask systemd for its jobs: {exc}")
        return ""
    return result.stdout
