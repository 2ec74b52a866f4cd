"""How pyfuse3's workers wait for the next request: not at all while there is one, for a fifth of a millisecond at most.

pyfuse3 takes trio's lock and waits for the fd before every request: two passes of trio's loop with four system calls,
for a hit that takes 3 us. Mostly the next request is there already, or comes while the answer to the last goes out.
Measured with `tools/bench/minimal_fs.py`, 4 KiB O_DIRECT, on 2 busy cores, processor time a read:

    queue depth 1: 55-72 us, with this 14-33        queue depth 16: 54-91 us, with this 11-20

pyfuse3 looks `trio` up in its module whenever it needs it, so `install` puts one there that differs in what it waits
for the fd with. Should a pyfuse3 not look there any more, it waits as ever, and the bench `cached` says so.
"""

import select
import time
from functools import partial
from types import TracebackType

import pyfuse3
import trio

BURST_S = 0.0002
"""So long other tasks wait for requests that are answered at once: some 15 hits of 4 KiB, or two of 1 MiB."""


class RequestLock:
    """`trio.Lock` for the workers: one that is free is taken without a pass of the loop, and not handed over.

    So the worker that answered a request takes the next one as long as it need not wait; the others wait. One of them
    is called when the lock becomes free, the one that came last: the memory it reads requests into was used last.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: list[trio.lowlevel.Task] = []
        self._is_called = False
        """One that waited is on its way; it looks, and waits again if it finds the lock taken."""

    async def __aenter__(self) -> None:
        while self._is_taken:
            task = trio.lowlevel.current_task()
            self._waiting.append(task)
            await trio.lowlevel.wait_task_rescheduled(partial(self._leave, task))
            self._is_called = False
        self._is_taken = True

    def _leave(self, task: trio.lowlevel.Task, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._waiting.remove(task)
        return trio.lowlevel.Abort.SUCCEEDED

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._is_taken = False
        if self._waiting and not self._is_called:
            self._is_called = True
            trio.lowlevel.reschedule(self._waiting.pop())


class RequestWait:
    """`trio.lowlevel` with another `wait_readable`, for one fd."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._until = 0.0

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request, or an error to be read. Mostly no checkpoint, but one each BURST_S."""
        if fd != self._fd:
            self._poll, self._fd = select.poll(), fd
            self._poll.register(fd, select.POLLIN)
        if time.monotonic() < self._until and self._poll.poll(0):
            return
        await trio.lowlevel.wait_readable(fd)
        self._until = time.monotonic() + BURST_S

    def __getattr__(self, name: str) -> object:
        return getattr(trio.lowlevel, name)


class SessionTrio:
    """What pyfuse3 takes for `trio`."""

    Lock = RequestLock

    def __init__(self) -> None:
        self.lowlevel = RequestWait()

    def __getattr__(self, name: str) -> object:
        return getattr(trio, name)


def install() -> None:
    """Have pyfuse3 wait like this from now on; before its first `main`."""
    pyfuse3.trio = SessionTrio()  # type: ignore[attr-defined]
