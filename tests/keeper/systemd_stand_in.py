"""systemd's side of one unit: the notification socket, the fd store, restart and stop, as systemd 252 does them.

What it does was seen on a real systemd 252 (docs/DESIGN.md, section 1). Only what a keeper meets is here.
"""

import array
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

UNIT = "basefs.service"
LIMIT_S = 60.0
FDS_HIGH = 300
"""Fds are handed over from numbers above this, so that no target number is taken."""
EXEC = """
import os, sys
for number, fd in enumerate(map(int, filter(None, sys.argv[1].split(",")))):
    os.dup2(fd, 3 + number)
    os.close(fd)
if "LISTEN_FDS" in os.environ:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
SYSTEMCTL = """#!/bin/sh
case "$*" in
list-jobs*) cat {directory}/job ;;
show*) cat {directory}/stored ;;
esac
"""


class SystemdStandIn:
    """One unit with FileDescriptorStoreMax=, NotifyAccess=main and Restart=on-failure; the tests decide when."""

    def __init__(self, directory: Path, command: Sequence[str], *, store_max: int = 4096) -> None:
        directory.mkdir()
        self.messages: list[str] = []
        self.stored: list[tuple[str, int]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = directory / "log"
        self._directory = directory
        self._command = list(command)
        self._store_max = store_max
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(directory / "notify"))
        self._end, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        (directory / "systemctl").write_text(SYSTEMCTL.format(directory=directory))
        (directory / "systemctl").chmod(0o755)
        self._set_job("")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    # --- jobs

    def start(self, extra: Sequence[tuple[str, int]] = ()) -> None:
        """Start the main process with what is stored (and `extra`), in the opposite order; wait for READY=1."""
        with self._changed:
            passed = [*reversed(self.stored), *extra]
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, FDS_HIGH) for _, fd in passed]
            names = {"LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": ":".join(name for name, _ in passed)}
            with open(self.log_path, "ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", EXEC, ",".join(map(str, high)), *self._command],
                    env={**self._environment(), **(names if passed else {})},
                    stderr=log,
                    pass_fds=high,
                )
            seen = len(self.messages)
            for fd in high:
                os.close(fd)
        self.wait_for(lambda: any("READY=1" in message for message in self.messages[seen:]))

    def restart(self) -> None:
        """`systemctl restart`: ExecStop= and SIGTERM, then the next main process, whether the last one ended or not."""
        assert self.process is not None
        self._set_job("restart")
        self.run_exec_stop()
        self._terminate(limit_s=LIMIT_S)
        self.start()
        self._set_job("")

    def stop(self, *, limit_s: float = LIMIT_S) -> bool:
        """`systemctl stop`; whether the main process ended. The store is given up either way."""
        self._set_job("stop")
        self.run_exec_stop()
        has_ended = self._terminate(limit_s=limit_s)
        self._set_job("")
        self.release()
        return has_ended

    def run_exec_stop(self) -> str:
        """`basefs unmount --for-systemd`, configured by nothing but its environment."""
        assert self.process is not None
        with self._changed:
            (self._directory / "stored").write_text(f"{len(self.stored)}\n")
        main_pid = {} if self.process.poll() is not None else {"MAINPID": str(self.process.pid)}
        code = f"from basefs.cli.systemd_stop import make_way_for_restart; make_way_for_restart({UNIT!r})"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**self._environment(), **main_pid},
            stderr=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
        return result.stderr

    def kill(self, *others: int) -> None:
        """kill -9 of the main process and of others at once; they have ended when it returns."""
        pidfds = [os.pidfd_open(pid) for pid in (self.pid, *others)]
        try:
            for pidfd in pidfds:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], LIMIT_S)[0]
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
        assert self.process is not None
        self.process.wait()

    def wait(self) -> int:
        """What the main process ended with."""
        assert self.process is not None
        return self.process.wait(timeout=LIMIT_S)

    def release(self) -> None:
        """The unit is inactive or failed: what is stored is closed."""
        with self._changed:
            for _, fd in self.stored:
                os.close(fd)
            self.stored.clear()

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.write(self._wake, b"x")
        self._thread.join()
        self.release()
        self._socket.close()
        os.close(self._end)
        os.close(self._wake)

    # --- what it heard

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LIMIT_S), (self.messages, self.log)

    def names(self) -> list[str]:
        with self._changed:
            return sorted(name for name, _ in self.stored)

    def _listen(self) -> None:
        while self._end not in select.select([self._socket, self._end], [], [])[0]:
            data, ancillary, _, _ = self._socket.recvmsg(65536, 8192)
            fds = array.array("i")
            sender = 0
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    (sender, _, _) = struct.unpack("iii", content)
            with self._changed:
                if self.process is not None and sender == self.process.pid:
                    self._hear(data.decode(), list(fds))
                else:
                    _close(fds)
                self._changed.notify_all()

    def _hear(self, message: str, fds: list[int]) -> None:
        self.messages.append(message)
        fields = dict(line.split("=", 1) for line in message.splitlines())
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            assert fields.get("FDPOLL") == "0", "polled, systemd wakes up at each request"
            for fd in fds:
                if len(self.stored) < self._store_max:
                    self.stored.append((name, fd))
                else:
                    os.close(fd)
            return
        _close(fds)
        if fields.get("FDSTOREREMOVE") == "1":
            _close([fd for stored, fd in self.stored if stored == name])
            self.stored = [(stored, fd) for stored, fd in self.stored if stored != name]

    def _terminate(self, *, limit_s: float) -> bool:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=limit_s)
        return self.process.returncode is not None

    def _environment(self) -> dict[str, str]:
        path = f"{self._directory}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "NOTIFY_SOCKET": str(self._directory / "notify")}

    def _set_job(self, kind: str) -> None:
        (self._directory / "job").write_text(f"17 {UNIT} {kind} running\n" if kind else "")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
