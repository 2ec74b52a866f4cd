"""Everything a keeper waits for: fds, signals, and changes of the mount table. Standard library only."""

import os
import select
import signal
from collections.abc import Collection
from typing import NamedTuple

SIGNALS_BYTES_MAX = 64


class Woken(NamedTuple):
    """What ended a wait: readable fds, numbers of signals that came, whether mounts were added or removed."""

    ready: set[int]
    signals: bytes
    mounts_changed: bool


class Wakeups:
    """Waits for fds, the given signals and the mount table at once. One a process: it takes over the signals."""

    def __init__(self, signals: Collection[signal.Signals]) -> None:
        # A signal only wakes the loop: Python's handler in C writes its number into the pipe.
        self._signal_pipe, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup)
        for number in signals:
            signal.signal(number, lambda _number, _frame: None)
        self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)

    def wait(self, fds: list[int], limit_s: float | None) -> Woken:
        """Wait until something came; nothing did when `limit_s` seconds have passed."""
        poller = select.poll()
        for fd in (*fds, self._signal_pipe):
            poller.register(fd, select.POLLIN)
        poller.register(self._mountinfo, select.POLLPRI)
        events = {fd for fd, _ in poller.poll(None if limit_s is None else max(0.0, limit_s) * 1000)}
        return Woken(
            ready=events & set(fds),
            signals=os.read(self._signal_pipe, SIGNALS_BYTES_MAX) if self._signal_pipe in events else b"",
            mounts_changed=self._mountinfo in events,
        )
