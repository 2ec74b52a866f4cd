"""A clock that jumps over waits, but never past a thread that is at work, however slow the machine is.

Trio's own jumps when the loop had nothing to do for so long. On a loaded machine that is also so while a thread waits
for a processor or a disk, and then a limit of seconds passes within milliseconds: the cause of tests that failed once.
"""

import os
import sys
import threading
from types import FrameType

from trio.testing import MockClock

QUIET_S = 0.003
"""Two looks, so far apart at least, have to find the same before it jumps."""

_GATES = ("threading", "queue")
"""Modules whose waits only the loop, a test or another thread ends."""


def jumping_clock() -> MockClock:
    """A clock for one run. What hangs in a thread must hang in an `Event`, a lock or a queue: it is jumped over."""
    clock = MockClock(autojump_threshold=QUIET_S)
    jump, looks = clock._autojump, _Looks()

    def jump_if_quiet() -> None:
        if looks.are_threads_quiet():
            jump()

    clock._autojump = jump_if_quiet  # type: ignore[method-assign]  # the class is final
    return clock


class _Looks:
    """What was seen of the process's threads when the loop was last idle."""

    def __init__(self) -> None:
        self._before: dict[int, str] | None = None

    def are_threads_quiet(self) -> bool:
        """Whether no thread has, or may yet have, anything to do.

        A thread that was woken is runnable, or has run in between: its count of switches says so, also when it had
        but the time to find the interpreter's lock taken. Hence two looks, with an idle wait of the loop between them.
        """
        before, self._before = self._before, _waiting_threads()
        return self._before is not None and self._before == before


def _waiting_threads() -> dict[int, str] | None:
    """Each worker -> its switches so far; None if a thread is at work."""
    frames, seen = sys._current_frames(), {}
    known = {thread.native_id: frames.get(thread.ident or 0) for thread in threading.enumerate()}
    own = threading.get_native_id()
    for tid in map(int, os.listdir("/proc/self/task")):
        if tid == own:
            continue
        try:
            with open(f"/proc/self/task/{tid}/status") as file:
                status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if status["State"][0] not in "SZX":  # runnable, or in the disk
            return None
        frame = known.get(tid)
        if frame is None or not (stack := _worker_stack(frame)):
            continue
        if not _is_waiting(stack):
            return None
        seen[tid] = f"{status['voluntary_ctxt_switches']} {status['nonvoluntary_ctxt_switches']}"
    return seen


def _worker_stack(frame: FrameType) -> list[FrameType]:
    """The innermost frame first; empty if it is no thread of trio's or of ShortCalls: a fake server's answers those."""
    stack = [frame]
    while stack[-1].f_back is not None:
        stack.append(stack[-1].f_back)
    modules = {one.f_globals.get("__name__") for one in stack}
    return stack if modules & {"trio._core._thread_cache", "basefs.concurrency.short_calls"} else []


def _is_waiting(stack: list[FrameType]) -> bool:
    """For a call, for the loop, or in a gate."""
    name, function = stack[0].f_globals.get("__name__"), stack[0].f_code.co_name
    return name in _GATES or function in ("_work", "_send_message_to_trio")
