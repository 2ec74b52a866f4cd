"""What the kernel is told of this process. Standard library only, as little of it as can be."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_keeper(keeper_pid: int) -> bool:
    """Until `outlive_keeper`: a server that has no session is of no use without its keeper, and holds its lock.

    False when the keeper, whose child we are, is dead already: the kernel tells only of deaths that come.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    return os.getppid() == keeper_pid


def outlive_keeper() -> None:
    """From now on the session is ours, whatever becomes of the keeper."""
    _libc.prctl(_PR_SET_PDEATHSIG, 0)
