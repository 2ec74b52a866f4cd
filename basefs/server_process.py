"""One server as its keeper sees it: the process, the two sockets, the datagrams. Standard library only."""

import array
import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, Literal

MESSAGE_BYTES_MAX = 64 * 1024
FDS_MAX = 4
"""Most fds that a server sends with one datagram; the contract says one."""
SEND_LIMIT_S = 2.0
"""A server that reads nothing must not hold up its keeper: its socket takes about a thousand datagrams before."""
END_LIMIT_S = 5.0
"""What a server has to end by itself, and a killed one at all. One that hangs in a disk even then is left behind: it
reads no request any more."""

Stage = Literal["loading", "loaded", "preparing", "answering", "switching", "ready", "stopping", "ending"]


class ServerProcess:
    """A started server. The owner calls `close` when the process has ended.

    `control` and `session` are our ends of the keeper socket and of the session socket (docs/DESIGN.md, section 1);
    `pidfd` becomes readable when the process ends. `stage` says what is waited for, `deadline_s` until when
    (time.monotonic(), None: for ever). `loaded` is what the server said of itself: version, options, not_applied.
    """

    def __init__(self, command: Sequence[str], arguments: dict[str, Any], *, fds: dict[str, int], nice: int) -> None:
        """`fds` are numbers of ours that the server finds under the same numbers; `nice` is added to our own.

        Raises:
            OSError: The program cannot be started.
        """
        self.control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session, their_session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs = {"session_fd": their_session.fileno(), "keeper_fd": their_control.fileno(), **fds}
        with their_control, their_session:
            try:
                self.pid = spawn([*command, json.dumps({**arguments, **theirs})], list(theirs.values()))
            except OSError:
                self.control.close()
                self.session.close()
                raise
        self.pidfd = os.pidfd_open(self.pid)
        self.control.setblocking(False)
        self.session.setblocking(False)
        self.started_at_s = time.monotonic()
        self.stage: Stage = "loading"
        self.waits_for = "loaded"
        self.deadline_s: float | None = None
        self.limit_s: float | None = None
        self.is_killed = False
        self.is_silent = False
        """It closed its end of the keeper socket."""
        self.is_hung = False
        self.has_served = False
        self.failure = ""
        self.exit_code: int | None = None
        self.loaded: dict[str, Any] = {}
        if nice:
            self.set_nice(nice)

    @property
    def version(self) -> str:
        """The version that the server said it is; empty before."""
        return str(self.loaded.get("version", ""))

    def set_nice(self, nice: int) -> None:
        """Change the priority to `nice` above our own; no thread was started before `begin`."""
        try:
            os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        except OSError:
            return

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Hand over one datagram. A server that is gone is noticed by `pidfd`, a deaf one by its deadline."""
        data = [json.dumps(message).encode()]
        try:
            socket.send_fds(self.control, data, list(fds))
        except BlockingIOError:
            poller = select.poll()
            poller.register(self.control, select.POLLOUT)
            poller.poll(SEND_LIMIT_S * 1000)
            with contextlib.suppress(OSError):
                socket.send_fds(self.control, data, list(fds))
        except OSError:
            return

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next datagram and the fds that came with it, without waiting; None when there is none (any more).

        What is no message has no type.
        """
        try:
            try:
                data, fds = _receive(self.control)
            except ConnectionResetError:
                # Told once, before what a dead server had sent: it had not read something of ours.
                data, fds = _receive(self.control)
        except OSError:
            return None
        if not data and not fds:
            self.is_silent = True
            return None
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):  # the latter: a thousand brackets, which must not end the keeper
            return {}, fds
        return (message if isinstance(message, dict) else {}), fds

    def expect(self, stage: Stage, waits_for: str) -> None:
        """From now on the server is in `stage` and owes us `waits_for`, within the limit that runs."""
        self.stage, self.waits_for = stage, waits_for

    def set_limit(self, limit_s: float | None) -> None:
        """What the server owes must come within that many seconds from now; None: whenever it likes."""
        self.limit_s = limit_s
        self.deadline_s = None if limit_s is None else time.monotonic() + limit_s

    def is_overdue(self) -> bool:
        """Whether the limit has passed."""
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s

    def fail(self, why: str) -> None:
        """The server is of no use: it is to end by itself. What was said first of why stays."""
        self.failure = self.failure or why
        self.expect("ending", "its end")
        self.set_limit(END_LIMIT_S)

    def kill(self, why: str) -> None:
        """SIGKILL; `pidfd` tells the end."""
        self.fail(why)
        self.is_killed = True
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, limit_s: float) -> None:
        """Wait for the end; kill the server after `limit_s` seconds, and wait again for as long at most."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(limit_s * 1000):
            self.kill("it did not end by itself")
            poller.poll(END_LIMIT_S * 1000)

    def close(self) -> None:
        """Give back our ends of everything; `exit_code` (negative: a signal) is known then, if `exit_code_of` tells."""
        self.exit_code = exit_code_of(self.pid)
        self.control.close()
        self.session.close()
        os.close(self.pidfd)


def may_raise_priority() -> bool:
    """Whether a child that was started at a low priority can be given ours again: root may, unless it is confined."""
    try:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, own + 1)
        os.setpriority(os.PRIO_PROCESS, 0, own)
    except OSError:
        return False
    return True


def spawn(argv: list[str], inherited: list[int], variables: dict[str, str] | None = None) -> int:
    """Start a program with these fds of ours under their own numbers, and these variables beside ours; its pid.

    Raises:
        OSError: It cannot be started.
    """
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"} | (variables or {})
    # posix_spawn shares our memory until exec, so nothing is copied; we have one thread, so nobody else can
    # inherit what is inheritable for a moment.
    for fd in inherited:
        os.set_inheritable(fd, True)
    try:
        # A session of its own, so that Ctrl-C at a foreground mount reaches the keeper only.
        return os.posix_spawnp(
            argv[0],
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
        )
    finally:
        for fd in inherited:
            os.set_inheritable(fd, False)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One datagram and its fds, which no server inherits: `socket.recv_fds` of Python 3.11 drops the flag for that."""
    fds = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        MESSAGE_BYTES_MAX, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def exit_code_of(pid: int) -> int | None:
    """How a child that has ended did so (negative: by a signal), and it is reaped.

    None: it has not ended, or a tracer (strace, gdb) has not taken note of its end yet, before which the kernel tells
    its parent only that it ended.
    """
    with contextlib.suppress(ChildProcessError):
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            return os.waitstatus_to_exitcode(status)
    return None


def describe_exit(exit_code: int | None) -> str:
    """`exit code 1`, `signal SIGKILL`, or that a tracer hides it."""
    if exit_code is None:
        return "it is traced"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
