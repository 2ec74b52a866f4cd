"""A real keeper with stub servers: the standby, the watchdog, upgrades, the request socket."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from basefs import mounts, processes
from basefs.cli.keeper_client import ask_keeper
from basefs.errors import ControlError
from basefs.keeper_requests import CLIENTS_MAX
from basefs.keeper_restarts import DEATHS_WITH_RESEND_MAX
from tests.faults.readers import eventually

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 4096
RSS_KIB_MAX = 15 * 1024
TRACER = """
import ctypes, sys
PTRACE_SEIZE = 0x4206
print(ctypes.CDLL(None).ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def control_socket(mounting, tmp_path) -> Path:
    """The keeper's socket is beside it."""
    path = tmp_path / "control.sock"
    mounting.spec = mounting.spec._replace(control_socket=str(path))
    return path


def wait_for_standby(control_socket: Path) -> dict:
    """What the keeper says once a server serves and another one waits in its place."""
    found: dict = {}

    def is_there() -> bool:
        found.update(ask_keeper(control_socket, "status"))
        return found["state"] == "serving" and found["standby_state"] == "loaded"

    eventually(is_there)
    return found


def with_command(mounting, version: str) -> None:
    """From the next start on the stub says it is this version: its program reads it from a file."""
    (mounting.mode_path.parent / "version").write_text(version)


@pytest.fixture
def versioned(mounting, tmp_path):
    """The server's program, whose version is what the file `version` says when it starts."""
    program = tmp_path / "server"
    python, stub = mounting.spec.server_command
    program.write_text(f'#!/bin/sh\nexec {python} {stub} "$(cat {tmp_path}/version)" "$@"\n')
    program.chmod(0o755)
    with_command(mounting, "1")
    mounting.spec = mounting.spec._replace(server_command=[str(program)])


class Reader:
    """Reads on until the block ends; what fails is told then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._failures: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._path.read_bytes() != CONTENT:
                    self._failures.append("wrong bytes")
            except OSError as exc:
                self._failures.append(repr(exc))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._failures == []


def test_the_standby_takes_over_when_the_server_is_killed(mounting, control_socket):
    keeper = mounting.start_ready()
    before = wait_for_standby(control_socket)
    with Reader(mounting.mountpoint / "img"):
        os.kill(before["server_pid"], signal.SIGKILL)
        keeper.wait_for_log("again")
    after = wait_for_standby(control_socket)
    assert after["server_pid"] == before["standby_pid"]
    assert (after["deaths"], after["last_death"]) == (1, "signal SIGKILL")


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """The process is traced, and how it ends is for the tracer to hear first, which does not listen."""
    argv = [sys.executable, "-c", TRACER, str(pid)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"0\n"
        yield
        assert tracer.stdin is not None
        tracer.stdin.close()


def test_of_a_server_that_dies_while_it_is_traced_nothing_is_suspected(mounting, control_socket):
    keeper = mounting.start_ready()
    for _ in range(DEATHS_WITH_RESEND_MAX):
        before = wait_for_standby(control_socket)
        with traced(before["server_pid"]):
            os.kill(before["server_pid"], signal.SIGKILL)
            keeper.wait_for_log("died (it is traced")
            after = wait_for_standby(control_socket)
    assert after["server_pid"] == before["standby_pid"]
    assert after["resend"] is True


def test_a_standby_that_dies_is_no_event_and_is_replaced(mounting, control_socket):
    mounting.start_ready()
    before = wait_for_standby(control_socket)
    os.kill(before["standby_pid"], signal.SIGKILL)
    eventually(lambda: ask_keeper(control_socket, "status")["standby_pid"] not in (None, before["standby_pid"]))
    after = ask_keeper(control_socket, "status")
    assert (after["state"], after["server_pid"], after["deaths"]) == ("serving", before["server_pid"], 0)


def test_a_server_that_hangs_is_replaced(mounting, control_socket):
    keeper = mounting.start_ready(watchdog_s=2.0)
    before = wait_for_standby(control_socket)
    os.kill(before["server_pid"], signal.SIGSTOP)
    with Reader(mounting.mountpoint / "img"):
        keeper.wait_for_log("hangs: it answers nothing for 2 s")
        keeper.wait_for_log("again")
    assert ask_keeper(control_socket, "status")["last_death"] == "hung for 2 s"
    assert not processes.is_running(before["server_pid"])


def test_a_keeper_that_was_stopped_itself_kills_nobody(mounting, control_socket):
    keeper = mounting.start_ready(watchdog_s=2.0)
    before = wait_for_standby(control_socket)
    keeper.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(3.0)  # longer than watchdog_s; a stopped process has no event
    keeper.process.send_signal(signal.SIGCONT)
    threading.Event().wait(1.5)
    assert wait_for_standby(control_socket)["server_pid"] == before["server_pid"]


def test_the_keeper_stays_small(mounting, control_socket):
    keeper = mounting.start_ready()
    for _ in range(2):
        os.kill(wait_for_standby(control_socket)["server_pid"], signal.SIGKILL)
        keeper.wait_for_log("again")
    status = Path(f"/proc/{keeper.process.pid}/status").read_text()
    rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert rss_kib <= RSS_KIB_MAX


def test_an_upgrade_replaces_server_and_standby_and_fails_no_read(mounting, control_socket, versioned):
    mounting.set_mode(options={"fetch_threads_max": "8", "view": "raw"})
    mounting.start_ready()
    before = wait_for_standby(control_socket)
    with_command(mounting, "2")
    mounting.set_mode(options={"fetch_threads_max": "4", "view": "raw"})
    with Reader(mounting.mountpoint / "img"):
        answer = ask_keeper(control_socket, "upgrade", deadline_s=60)
    assert answer["upgraded"] is True
    assert (answer["old_version"], answer["new_version"]) == ("1", "2")
    assert (answer["old_pid"], answer["serving_pid"]) == (before["server_pid"], answer["new_pid"])
    assert answer["applied"] == {"fetch_threads_max": ["8", "4"]}
    assert 0 < answer["seconds_without_server"] < 10
    assert not processes.is_running(before["server_pid"])
    eventually(lambda: ask_keeper(control_socket, "status")["standby_version"] == "2")


def test_a_new_version_that_dies_soon_is_followed_by_the_old_one(mounting, control_socket, versioned):
    keeper = mounting.start_ready()
    wait_for_standby(control_socket)
    with_command(mounting, "2")
    answer = ask_keeper(control_socket, "upgrade", deadline_s=60)
    os.kill(answer["new_pid"], signal.SIGABRT)
    keeper.wait_for_log("the old version takes over")
    keeper.wait_for_log("again")
    assert ask_keeper(control_socket, "status")["server_version"] == "1"
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("step", "what", "why"),
    [
        ("start", "exit", "exit code 3"),
        ("start", "hang", "no loaded within 3 s"),
        ("begin", "exit", "exit code 3"),
        ("switch", "fail", "stub failed as told"),
    ],
)
def test_a_new_version_that_fails_leaves_the_old_one_serving(mounting, control_socket, versioned, step, what, why):
    mounting.start_ready(upgrade_deadline_s=3.0 if what == "hang" else 60.0)
    wait_for_standby(control_socket)
    with_command(mounting, "2")
    mounting.set_mode(at=step, do=what, by="2")
    with Reader(mounting.mountpoint / "img"):
        answer = ask_keeper(control_socket, "upgrade", deadline_s=60)
    assert answer["upgraded"] is False
    assert why in answer["error"]
    assert "the old version serves on" in answer["error"]
    status = ask_keeper(control_socket, "status")
    assert (status["server_version"], status["server_pid"]) == ("1", answer["serving_pid"])
    assert (mounting.mountpoint / "img").read_bytes() == CONTENT


def test_a_second_upgrade_meanwhile_is_refused(mounting, control_socket, versioned):
    mounting.start_ready(upgrade_deadline_s=3.0)
    wait_for_standby(control_socket)
    with_command(mounting, "2")
    mounting.set_mode(at="start", do="hang", by="2")
    answers: list[dict] = []
    first = threading.Thread(target=lambda: answers.append(ask_keeper(control_socket, "upgrade", deadline_s=60)))
    first.start()
    eventually(lambda: ask_keeper(control_socket, "status")["state"] == "upgrading")
    assert "not now" in ask_keeper(control_socket, "upgrade")["error"]
    first.join()
    assert "the old version serves on" in answers[0]["error"]


def test_status_is_told_while_no_server_can_be_started(mounting, control_socket):
    keeper = mounting.start_ready()
    before = wait_for_standby(control_socket)
    mounting.set_mode(at="begin", do="fail")
    os.kill(before["server_pid"], signal.SIGKILL)
    keeper.wait_for_log("stub failed as told; trying again")
    eventually(lambda: ask_keeper(control_socket, "status")["deaths"] >= 3)
    status = ask_keeper(control_socket, "status")
    assert status["state"] == "restarting"
    assert status["last_death"] == "stub failed as told"
    assert mounting.is_mounted()
    mounting.set_mode()
    keeper.wait_for_log("again")
    assert ask_keeper(control_socket, "status")["state"] == "serving"


def test_a_request_that_kills_every_server_keeps_nobody_else_waiting(mounting, control_socket):
    keeper = mounting.start_ready()
    reader = subprocess.Popen(["cat", str(mounting.mountpoint / "poison")], stdout=subprocess.DEVNULL)
    try:
        keeper.wait_for_log("servers died soon")
        keeper.wait_for_log("again")
        assert (mounting.mountpoint / "img").read_bytes() == CONTENT
        assert ask_keeper(control_socket, "status")["resend"] is False
    finally:
        reader.kill()
        reader.wait()


def test_clients_that_say_nothing_or_nonsense_hold_up_nothing(mounting, control_socket):
    mounting.start_ready()
    path = f"{control_socket}.keeper"
    assert os.stat(path).st_mode & 0o777 == 0o600
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(CLIENTS_MAX - 1)]
    try:
        for client in silent:
            client.connect(path)
        for nonsense in (b"\xff", b"[]", b"{}", b'{"request": 7}', b"x" * 5000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(path)
                client.sendall(nonsense)
                client.settimeout(30)
                answer = b""
                with contextlib.suppress(ConnectionResetError):
                    answer = client.recv(4096)
                assert not answer or "knows no request" in json.loads(answer)["error"]
        assert ask_keeper(control_socket, "status")["state"] == "serving"
        assert (mounting.mountpoint / "img").read_bytes() == CONTENT
    finally:
        for client in silent:
            client.close()


def test_the_request_socket_goes_with_the_mount(mounting, control_socket):
    keeper = mounting.start_ready()
    assert ask_keeper(control_socket, "status")["mountpoint"] == str(mounting.mountpoint)
    mounts.unmount(mounting.mountpoint)
    assert keeper.wait() == 0
    with pytest.raises(ControlError, match="no keeper answers"):
        ask_keeper(control_socket, "status")
    assert [pid for pid in mounting.started_pids() if processes.is_running(pid)] == []
