"""A real keeper with the stub server, on a real mount; everything is gone after the test."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from basefs import mounts
from basefs.keeper_spec import KeeperSpec, command_line

STUB = Path(__file__).with_name("stub_server.py")
DEADLINE_S = 60.0


class RunningKeeper:
    """A keeper process: what it says on stderr and on its ready pipe, and how it ends."""

    def __init__(self, spec: KeeperSpec, environment: dict[str, str] | None = None) -> None:
        self.ready_fd, theirs = os.pipe()
        spec = spec._replace(ready_fd=theirs)
        self.process = subprocess.Popen(
            command_line(spec), stderr=subprocess.PIPE, pass_fds=[theirs], env={**os.environ, **(environment or {})}
        )
        os.close(theirs)
        self.log = ""

    def answer(self) -> dict:
        """What `--background` would read."""
        data = os.read(self.ready_fd, 65536)
        return json.loads(data) if data else {}

    def wait_for_log(self, text: str) -> str:
        """Read stderr until a line has `text`; that line."""
        end = time.monotonic() + DEADLINE_S
        start = 0
        while True:
            complete = self.log[start : self.log.rfind("\n") + 1]
            for line in complete.splitlines(keepends=True):
                start += len(line)
                if text in line:
                    self.log = self.log[start:]
                    return line
            ready, _, _ = select.select([self.process.stderr], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.process.stderr.fileno(), 65536) if ready else b""
            assert data, f"no {text!r} in: {self.log}"
            self.log += data.decode()

    def wait(self) -> int:
        code = self.process.wait(timeout=DEADLINE_S)
        self.log += self.process.stderr.read().decode()
        return code

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()
        os.close(self.ready_fd)


@dataclass
class Mounting:
    """Paths of one test, and the keepers it started."""

    spec: KeeperSpec
    mode_path: Path
    keepers: list[RunningKeeper]

    @property
    def mountpoint(self) -> Path:
        return Path(self.spec.mountpoint)

    def start(self, environment: dict[str, str] | None = None, **changes: object) -> RunningKeeper:
        keeper = RunningKeeper(self.spec._replace(**changes), environment)
        self.keepers.append(keeper)
        return keeper

    def start_ready(self, environment: dict[str, str] | None = None, **changes: object) -> RunningKeeper:
        keeper = self.start(environment, **changes)
        assert keeper.answer().get("ready") is True, keeper.wait_for_log("\0")
        return keeper

    def set_mode(self, **mode: object) -> None:
        self.mode_path.write_text(json.dumps(mode))

    def server_pids(self) -> list[int]:
        """Servers that came to serve, in order."""
        return self._pids("serving")

    def started_pids(self) -> list[int]:
        """Every server that was started, standbys too."""
        return self._pids("pids")

    def _pids(self, what: str) -> list[int]:
        path = Path(f"{self.mode_path}.{what}")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def is_mounted(self) -> bool:
        return mounts.mount_at(self.mountpoint) is not None


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    mountpoint = tmp_path / "base"
    mountpoint.mkdir()
    mode_path = tmp_path / "mode"
    mode_path.write_text("{}")
    spec = KeeperSpec(
        mountpoint=str(mountpoint),
        cache_dir=str(tmp_path / "cache"),
        config_files=[str(mode_path)],
        config_dirs=[],
        server_command=[sys.executable, str(STUB)],
    )
    mounting = Mounting(spec=spec, mode_path=mode_path, keepers=[])
    try:
        yield mounting
    finally:
        while mounting.is_mounted():
            mounts.unmount(mountpoint, is_lazy=True)
        for keeper in mounting.keepers:
            keeper.clean_up()
        for pid in mounting.started_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
