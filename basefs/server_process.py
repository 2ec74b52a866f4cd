"""One server as its keeper sees it: the process, the two sockets, the datagrams. Standard library only."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

MESSAGE_BYTES_MAX = 64 * 1024


class ServerProcess:
    """A started server. The owner calls `close` when the process has ended.

    `control` and `session` are our ends of the keeper socket and of the session socket (docs/DESIGN.md,
    section 1); `pidfd` becomes readable when the process ends.
    """

    def __init__(self, command: Sequence[str], arguments: dict[str, Any], *, lower_fd: int, lock_fd: int) -> None:
        self.control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session, their_session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = {
            "session_fd": their_session.fileno(),
            "keeper_fd": their_control.fileno(),
            "lower_fd": lower_fd,
            "lock_fd": lock_fd,
        }
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        with their_control, their_session:
            try:
                # A session of its own, so that Ctrl-C at a foreground mount reaches the keeper only.
                self._process = subprocess.Popen(
                    [*command, json.dumps({**arguments, **fds})],
                    stdin=subprocess.DEVNULL,
                    pass_fds=list(fds.values()),
                    start_new_session=True,
                    env=environment,
                )
            except OSError:
                self.control.close()
                self.session.close()
                raise
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.started_at_s = time.monotonic()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Hand over one datagram. A server that is gone is noticed by `pidfd`, not here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    def receive(self) -> dict[str, Any] | None:
        """The next datagram, waiting for it; None when the server closed its end. What is no message has no type."""
        try:
            data = self.control.recv(MESSAGE_BYTES_MAX)
        except ConnectionResetError:
            return None
        if not data:
            return None
        try:
            message = json.loads(data)
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def end(self, *, grace_s: float) -> int:
        """Ask the server to end, kill it after `grace_s` seconds; what it ended with (negative: a signal)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        return self.wait(limit_s=grace_s)

    def wait(self, *, limit_s: float) -> int:
        """Wait for the end, kill the server after `limit_s` seconds; what it ended with."""
        try:
            return self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """Give back our ends of everything; the process must have ended."""
        self.control.close()
        self.session.close()
        os.close(self.pidfd)


def describe_exit(exit_code: int) -> str:
    """`exit code 1` or `signal SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
