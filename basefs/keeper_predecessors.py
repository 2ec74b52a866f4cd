"""Ends what an earlier keeper left running on our cache directory, so that its session can go on. Stdlib only.

Nothing is signalled but a process that says by its command line what it is and has the lock of this very cache
directory open. The pidfd is opened before that is checked, so a pid that is given to somebody else does no harm.
"""

import logging
import os
import select
import signal
import time
from typing import NamedTuple

from basefs import processes
from basefs.errors import MountError
from basefs.keeper_setup import LOCK_NAME

log = logging.getLogger("basefs.keeper")

GRACE_S = 3.0
"""What a server has to write its state down. Reads wait meanwhile."""
KILLED_S = 10.0
"""What a killed one may take: a cache disk may hold it up."""


class _Predecessor(NamedTuple):
    pid: int
    pidfd: int
    is_keeper: bool


def end_predecessors(lock_fd: int) -> None:
    """Returns when no other keeper or server has the file of our lock open.

    Raises:
        MountError: One does not end, although it was killed.
    """
    # The keeper first: it would start another server.
    for is_keeper in (True, False):
        found = [each for each in _predecessors(lock_fd) if each.is_keeper is is_keeper]
        try:
            _end(found)
        finally:
            for each in found:
                os.close(each.pidfd)


def _end(found: list[_Predecessor]) -> None:
    for each in found:
        log.info("asking process %d of an earlier keeper to end", each.pid)
        _signal(each, signal.SIGUSR1 if each.is_keeper else signal.SIGTERM)
    left = _wait(found, GRACE_S)
    for each in left:
        log.warning("process %d of an earlier keeper does not end; killing it", each.pid)
        _signal(each, signal.SIGKILL)
    left = _wait(left, KILLED_S)
    if left:
        raise MountError(f"process {left[0].pid} of an earlier keeper cannot be killed")


def _predecessors(lock_fd: int) -> list[_Predecessor]:
    """Keepers and servers that have the lock open; the pidfds are the caller's."""
    lock = os.fstat(lock_fd)
    found = []
    for pid in processes.all_pids():
        if pid == os.getpid():
            continue
        arguments = processes.json_argument(pid)
        if arguments is None or not {"lock_fd", "ready_fd", "reader"} & arguments.keys():
            continue
        if arguments.get("keeper_pid") == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        if processes.json_argument(pid) == arguments and _has_open(pid, lock):
            found.append(_Predecessor(pid, pidfd, is_keeper="ready_fd" in arguments))
        else:
            os.close(pidfd)
    return found


def _has_open(pid: int, file: os.stat_result) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    return any(_is_same(f"/proc/{pid}/fd/{fd}", file) for fd in fds)


def _is_same(path: str, file: os.stat_result) -> bool:
    # Where the link leads is looked at first: a stat of a file on a mount that hangs would hang us.
    if os.path.basename(processes.readlink(path)) != LOCK_NAME:
        return False
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino)


def _signal(each: _Predecessor, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(each.pidfd, number)
    except ProcessLookupError:
        return


def _wait(found: list[_Predecessor], limit_s: float) -> list[_Predecessor]:
    """Those that have not ended after the limit."""
    end = time.monotonic() + limit_s
    left = list(found)
    while left and (rest_s := end - time.monotonic()) > 0:
        ended = set(select.select([each.pidfd for each in left], [], [], rest_s)[0])
        left = [each for each in left if each.pidfd not in ended]
    return left
