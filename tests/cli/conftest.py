"""The command line as an operator runs it, and a control server with a fake service behind it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from basefs.control.listener import ControlListener
from basefs.control.server import serve_control
from tests.control.fake_view import FakeView

BASEFS = Path(sys.executable).with_name("basefs")


class Cli:
    """`basefs` with a configuration of its own in `directory`; nothing is mounted there yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mountpoint = directory / "base"
        self.mountpoint.mkdir()
        self.cache_dir = directory / "cache"
        self.socket_path = directory / "control.sock"
        self.log_path = directory / "basefs.log"
        self.conf_path = directory / "basefs.conf"
        self.conf_path.write_text(
            f"[DEFAULT]\nlog_file = {self.log_path}\n"
            f"[basefs]\nmountpoint = {self.mountpoint}\ncache_dir = {self.cache_dir}\n"
            f"control_socket = {self.socket_path}\nnova_user = nobody\n"
            "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
        )

    def argv(self, *arguments: str) -> list[str]:
        return [str(BASEFS), "--config-file", str(self.conf_path), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
        )

    def json(self, *arguments: str) -> object:
        done = self.run(*arguments, "-f", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def error(self, *arguments: str, code: int = 1) -> str:
        """The one line on stderr of a command that fails."""
        done = self.run(*arguments)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert done.stderr.startswith("basefs: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


class ServedView(FakeView):
    """A FakeView in a trio thread of its own; `is_warming` is set while somebody waits for a warming."""

    def __init__(self) -> None:
        super().__init__()
        self.is_warming = threading.Event()
        self.has_ended = threading.Event()

    async def warm(self, ref):
        try:
            async with aclosing(super().warm(ref)) as progress:
                async for item in progress:
                    self.is_warming.set()
                    yield item
        finally:
            self.has_ended.set()


@pytest.fixture
def view(cli: Cli) -> Iterator[ServedView]:
    view = ServedView()
    started = threading.Event()
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, view, ControlListener(cli.socket_path))
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(30)
    try:
        yield view
    finally:
        token, scope = stop[0]
        token.run_sync_soon(scope.cancel)
        thread.join(30)
    assert not os.path.exists(cli.socket_path)
