"""docs/SEMANTICS.md, section 12: servers that hang or are replaced, and configurations that are not usable."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from basefs.cli.keeper_client import ask_keeper
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import eventually, front_mount, opened, wait_for_images
from tools.mount import BasefsMount

pytestmark = pytest.mark.mount

DATA = Random(12).randbytes(3_000_000)
OPTIONS: dict[str, object] = {"watchdog_s": 2.0, "upgrade_deadline_s": 60.0}
MAY_LOG = (
    r"server \d+ (hangs|died)",
    r"upgrade: the new server failed",
    r"the configuration is not usable",
    # A standby that is killed in the moment in which the session is handed to it.
    r"the server ended \(signal SIGKILL\) before 'prepared'; trying again",
)


@pytest.fixture(scope="module")
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        running.glance.add(DATA)
        yield running


@pytest.fixture(scope="module")
def own(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """A mount of this file's own: its servers are replaced."""
    with front_mount(front, tmp_path_factory.mktemp("own"), OPTIONS, may_log=MAY_LOG) as mounted:
        wait_for_images(mounted, 1)
        yield mounted


@pytest.fixture
def path(own: BasefsMount, front: MisbehavingFront) -> Path:
    return own.path(next(iter(front.glance.images)))


def keeper(mount: BasefsMount) -> dict:
    return ask_keeper(mount.directory / "control.sock", "status")


def wait_for_standby(mount: BasefsMount) -> dict:
    eventually(lambda: (keeper(mount)["state"], keeper(mount)["standby_state"]) == ("serving", "loaded"), 120)
    return keeper(mount)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Somebody reads all of it without the page cache, again and again; no read fails and no byte is wrong."""
    failures: list[str] = []
    stop = threading.Event()

    def read() -> None:
        try:
            with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
                while not stop.is_set():
                    for offset in range(0, 2_000_000, 1 << 19):
                        if os.pread(fd, 1 << 19, offset) != DATA[offset : offset + (1 << 19)]:
                            failures.append(f"wrong bytes at {offset}")
        except OSError as error:
            failures.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()
    assert failures == []


def test_a_hung_server(own: BasefsMount, path: Path) -> None:
    """[S1210] A server that answers nothing for `watchdog_s` is killed, and the next one answers what waited for it."""
    before = wait_for_standby(own)
    with reading(path):
        os.kill(before["server_pid"], signal.SIGSTOP)
        eventually(lambda: keeper(own)["deaths"] == before["deaths"] + 1)
        eventually(lambda: keeper(own)["state"] == "serving")
    assert keeper(own)["server_pid"] == before["standby_pid"]


def test_upgrades(own: BasefsMount, front: MisbehavingFront, path: Path) -> None:
    """[S1211] `basefs upgrade` replaces the server while files are open and read; no read fails.

    [S1212] What cannot change while it is mounted (`mountpoint`, `cache_dir`, `view`) stays, and the answer says so.
    """
    wait_for_standby(own)
    number = path.stat().st_ino
    own.configure(front.conf_lines(), OPTIONS | {"other_io_deadline_s": 14.0, "view": "stored"})
    with opened(path) as fd, reading(path):
        done = own.cli("upgrade", "-f", "json", timeout_s=120)
        assert os.fstat(fd).st_ino == number == path.stat().st_ino
    answer = json.loads(done.stdout)
    assert answer["upgraded"] is True
    assert answer["applied"] == {"other_io_deadline_s": ["15.0", "14.0"]}
    assert [text for text in answer["not_applied"] if "view" in text and "raw" in text and "stored" in text]
    assert len(answer["not_applied"]) == 1


def test_a_configuration_that_is_not_usable(own: BasefsMount, front: MisbehavingFront, path: Path) -> None:
    """[S1213] An upgrade to what cannot be started changes nothing: the old server serves on, and the error is told.

    [S1214] A configuration that became unusable keeps no mount without a server: the last one that worked goes on.
    """
    own.configure(front.conf_lines(), OPTIONS)
    own.cli("upgrade", timeout_s=120)
    before = wait_for_standby(own)
    own.configure(front.conf_lines(), OPTIONS | {"fetch_thread_max": 7})
    with reading(path):
        answer = ask_keeper(own.directory / "control.sock", "upgrade", deadline_s=120)
        assert answer["upgraded"] is False
        assert "unknown key fetch_thread_max" in answer["error"]
        assert "the old version serves on" in answer["error"]
        assert keeper(own)["server_pid"] == before["server_pid"]

        # A standby that has read the good configuration, then one that has not.
        for pids in (("standby_pid", "server_pid"), ("server_pid",)):
            status = wait_for_standby(own)
            for name in pids:
                os.kill(status[name], signal.SIGKILL)
            eventually(lambda pid=status["server_pid"]: keeper(own)["server_pid"] not in (None, pid), 60)
            eventually(lambda: keeper(own)["state"] == "serving", 60)
    assert "unknown key fetch_thread_max" in keeper(own)["config_error"]
    own.configure(front.conf_lines(), OPTIONS)
    own.cli("upgrade", timeout_s=120)
    assert keeper(own)["config_error"] == ""
