"""Takes requests from a /dev/fuse that reader processes share, in place of pyfuse3's loop.

pyfuse3 waits until there is a request and then reads it, blocking: with readers on the same connection it may be gone
by then, and the server would stand still until the next one. So here nothing but a non-blocking read decides.

While readers are there the server looks only every STEP_BACK_S, for what a reader that hangs left: the kernel wakes
everybody who waits, and a server that was woken for each hit of a reader would take half of its processor time.
"""

import errno
import mmap
import os
import time
from collections.abc import Callable

import trio

from basefs.core.fuse_wire import READ_IN, Opcode, Request, request_of
from basefs.fuse import forwarded
from basefs.fuse.operations import Operations
from basefs.fuse.session_waits import BURST_S
from basefs.reader_layout import SLOT_BYTES

STEP_BACK_S = 0.05
_GONE = (errno.ENODEV, errno.ECONNABORTED)
_PASSING = (errno.EINTR, errno.ENOENT)


class RequestLoop:
    """Of one server. `room` bounds what is worked on at a time; `is_alone` says whether no reader takes requests."""

    def __init__(self, operations: Operations, fd: int, room: trio.Semaphore, is_alone: Callable[[], bool]) -> None:
        self._operations = operations
        self._fd = fd
        self._room = room
        self._is_alone = is_alone
        self._buffer = memoryview(mmap.mmap(-1, SLOT_BYTES))

    async def run(self) -> None:
        """Returns when the session is over. Cancellation: what is not answered then waits for the next server."""
        async with trio.open_nursery() as nursery:
            while True:
                if self._is_alone():
                    await trio.lowlevel.wait_readable(self._fd)
                else:
                    await trio.sleep(STEP_BACK_S)
                until = time.monotonic() + BURST_S
                while time.monotonic() < until:
                    try:
                        length = os.readv(self._fd, [self._buffer])
                    except BlockingIOError:
                        break
                    except OSError as exc:
                        if exc.errno in _GONE:
                            return
                        if exc.errno not in _PASSING:
                            raise
                        continue
                    request = request_of(memoryview(bytes(self._buffer[:length])))
                    if not self._hit(request):
                        await self._room.acquire()
                        nursery.start_soon(self._answer, request)

    def _hit(self, request: Request) -> bool:
        """Answer a read at once, if that can be done."""
        if request.opcode != Opcode.READ:
            return False
        handle, offset, size, *_ = READ_IN.unpack_from(request.body)
        data = self._operations.hit(handle, offset, size)
        if data is None:
            return False
        reply(self._fd, forwarded.read_reply(request, data))
        return True

    async def _answer(self, request: Request) -> None:
        try:
            # Nothing may be awaited between the last step of an answer and the reply (fuse/open_table.py).
            reply(self._fd, await forwarded.answer(self._operations, request))
        finally:
            self._room.release()


def reply(fd: int, pieces: list[forwarded.Body]) -> None:
    """Give the kernel a reply; a request that was withdrawn needs none."""
    if pieces:
        try:
            os.writev(fd, pieces)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, *_GONE):
                raise
