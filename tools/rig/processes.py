"""Services as process groups that never outlive the process that started them, unless they were asked to."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import IO

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STOP_S = 5.0
START_S = 90.0


class RigError(Exception):
    """A service of the rig did not do what it was started for; the message names its log."""


def listening_socket(host: str, port: int = 0) -> socket.socket:
    """Return a bound, listening TCP socket; with port 0 on a port that was free."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(256)
    return sock


class Service:
    """One started service: a session of its own, its output in `<name>.out`."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log_path: str) -> None:
        self.name = name
        self.pid = process.pid
        self.log_path = log_path
        self._process = process

    @classmethod
    def start(
        cls, name: str, argv: list[str], *, env: dict[str, str], log_directory: str, pass_fds: tuple[int, ...] = ()
    ) -> "Service":
        """Start `argv` in a session of its own; returns at once."""
        log_path = os.path.join(log_directory, name + ".out")
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        return cls(name, process, log_path)

    def wait_for(self, url: str) -> None:
        """Return when `url` answers with anything but a server error; RigError after START_S or when it died."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RigError(f"{self.name} died, see {self.log_path}\n{tail(self.log_path)}")
            try:
                with urllib.request.urlopen(url, timeout=10):
                    return
            except urllib.error.HTTPError as error:
                with error:
                    if error.code < 500:
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise RigError(f"{self.name} did not answer within {START_S:.0f} s, see {self.log_path}")

    def send(self, signum: int) -> None:
        """Signal the whole process group; a group that is gone already is fine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def stop(self) -> None:
        """End the process group: SIGTERM, SIGKILL after STOP_S; returns when its leader is reaped."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self.send(signal.SIGKILL)
        self._process.wait()


def environment(venv: str, *, path: str = "", **more: str) -> dict[str, str]:
    """Return the environment of a service that runs from `venv`, with the directory `path` at the front of its PATH."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "PATH", "TMPDIR")}
    kept["PATH"] = ":".join(part for part in (path, venv + "/bin", kept.get("PATH", "")) if part)
    return {**kept, "PYTHONWARNINGS": "ignore", "PYTHONPATH": ROOT, **more}


def run(name: str, argv: list[str], *, env: dict[str, str], log_directory: str) -> None:
    """Run a one-off command to its end; RigError with the end of its output when it fails."""
    log_path = os.path.join(log_directory, name + ".out")
    log: IO[bytes]
    with open(log_path, "ab") as log:
        code = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    if code:
        raise RigError(f"{argv[0]} exited with {code}, see {log_path}\n{tail(log_path)}")


def tail(path: str, lines: int = 15) -> str:
    """Return the last lines of a text file."""
    with open(path, encoding="utf-8", errors="replace") as text:
        return "".join(text.readlines()[-lines:])
