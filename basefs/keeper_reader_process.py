"""One reader as its keeper sees it: the process, its clone of /dev/fuse, its slots. Standard library only."""

import fcntl
import importlib.machinery
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import NamedTuple

from basefs.reader_layout import PAGE, SLOT_BYTES, SLOTS, SLOTS_BYTES
from basefs.server_process import exit_code_of, spawn

FUSE_DEV_IOC_CLONE = 0x8004E500
"""_IOR(229, 0, u32): a further fd on the same connection; a request is answered on the one that gave it out."""
MESSAGE_BYTES_MAX = 4096
COMMAND = (sys.executable, "-S", "-P", "-m", "basefs.reader")
PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Place(NamedTuple):
    """What a reader's successor goes on with: the clone, open as long as the session, and the slots."""

    clone_fd: int
    slots_fd: int


def new_place(fuse_fd: int) -> Place:
    """A clone of the connection behind `fuse_fd`, and empty slots.

    Raises:
        OSError: This kernel gives none.
    """
    # Non-blocking: a reader looks for requests, and waits for them beside other things.
    clone_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(clone_fd, FUSE_DEV_IOC_CLONE, struct.pack("I", fuse_fd))
        slots_fd = os.memfd_create("basefs-slots", os.MFD_CLOEXEC)
    except OSError:
        os.close(clone_fd)
        raise
    os.ftruncate(slots_fd, SLOTS_BYTES)
    return Place(clone_fd, slots_fd)


def taken_slots(place: Place) -> list[int]:
    """The slots that a reader that ended has left taken."""
    return [at for at in range(SLOTS) if any(os.pread(place.slots_fd, 8, PAGE + at * SLOT_BYTES + 8))]


def clear_slots(place: Place) -> None:
    """Forget what the slots hold: the kernel has it again."""
    for at in taken_slots(place):
        os.pwrite(place.slots_fd, bytes(8), PAGE + at * SLOT_BYTES + 8)


def zlib_ng_directory() -> str:
    """Where zlib_ng is installed, for a reader, which looks for no packages; empty if it is nowhere."""
    found = importlib.machinery.PathFinder.find_spec("zlib_ng")
    return "" if found is None or found.origin is None else os.path.dirname(os.path.dirname(found.origin))


class ReaderProcess:
    """A started reader. The owner calls `close` when the process has ended; the place stays the owner's."""

    def __init__(self, number: int, place: Place, lock_fd: int) -> None:
        """Raises OSError when it cannot be started."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._fds = [*place, lock_fd]
        arguments = json.dumps(
            {
                "reader": number,
                "keeper_pid": os.getpid(),
                "keeper_fd": theirs.fileno(),
                "libraries": zlib_ng_directory(),
            }
        )
        with theirs:
            try:
                # -S: the site module costs half of the start. It needs the standard library, and this package.
                self.pid = spawn([*COMMAND, arguments], [theirs.fileno()], {"PYTHONPATH": PACKAGE_PARENT})
            except OSError:
                self.control.close()
                raise
        self.pidfd = os.pidfd_open(self.pid)
        self.control.setblocking(False)
        self.number = number
        self.is_ready = False
        self.is_silent = False
        self.failure = ""

    def give_place(self) -> None:
        """It has started, and takes requests from here on.

        Not before: one that still starts when we are killed must keep neither the mount nor the lock alive.
        """
        self.is_ready = True
        with suppress(OSError):  # It is gone, which its pidfd tells.
            socket.send_fds(self.control, [b'{"type": "place"}'], self._fds)

    def send(self, message: dict[str, object], fd: int | None = None) -> bool:
        """Hand over one datagram. A reader that takes none hangs, which the pings tell."""
        try:
            socket.send_fds(self.control, [json.dumps(message).encode()], [] if fd is None else [fd])
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, object] | None:
        """The next datagram without waiting; None when there is none (any more)."""
        try:
            data = self.control.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.is_silent = True
            return None
        message: dict[str, object] = json.loads(data)
        return message

    def kill(self, why: str) -> None:
        """SIGKILL; `pidfd` tells the end."""
        self.failure = self.failure or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, limit_s: float) -> None:
        """Wait for the end, at most so long: one that hangs in a disk is left behind."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        poller.poll(limit_s * 1000)

    def close(self) -> int | None:
        """Give back our ends; the exit code of the process, which has ended, as `exit_code_of` has it."""
        exit_code = exit_code_of(self.pid)
        self.control.close()
        os.close(self.pidfd)
        return exit_code
