"""What a process of basefs does to itself at its start: no core files, memory that stays, last to be killed.

Standard library only. Each is logged where the system refuses it and changes nothing else.
"""

import contextlib
import ctypes
import gc
import logging
import os
import resource

log = logging.getLogger("basefs.keeper")

PR_SET_DUMPABLE = 4
MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4
OOM_NEVER = -1000
SERVER_OOM_MIN = -900
"""The server is killed before the keeper, which starts another, and after everything that is not protected."""


def forbid_core_files() -> None:
    """Passwords and tokens in memory never reach a core file, whatever kernel.core_pattern says."""
    libc = ctypes.CDLL(None, use_errno=True)
    # A pattern that is a pipe (systemd-coredump) does not heed RLIMIT_CORE; both heed this, which ends at exec.
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        log.info("core files are not forbidden: %s", os.strerror(ctypes.get_errno()))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def keep_files_private() -> None:
    """What this process and its children make is its user's alone, whatever umask they were started with.

    Files of the lower directory are not concerned: they get their mode explicitly.
    """
    os.umask(0o077)


def lock_memory() -> None:
    """No page of ours is ever waited for: not swapped out, not dropped. To be called when everything is imported."""
    gc.collect()
    gc.freeze()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc_trim(0)
    # ONFAULT: what was never touched costs nothing. Without it all of libc and libpython counts (3.4 MB more).
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        log.info("memory is not locked: %s (RLIMIT_MEMLOCK?)", os.strerror(ctypes.get_errno()))


def never_kill_me() -> int:
    """Take this process out of the kernel's choice when memory runs out; what its servers are to have."""
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        inherited = int(file.read())
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_NEVER))
    except OSError as exc:
        log.info("not protected when memory runs out: %s", exc.strerror)
    return max(inherited, SERVER_OOM_MIN)


def set_oom_score(pid: int, score: int) -> None:
    """Give a child its own place in the kernel's choice."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(score))
