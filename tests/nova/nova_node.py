"""The test's side of `nova_driver.py`: a nova-compute as a process, asked by method calls."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
VENVS = os.path.join(os.path.dirname(os.path.dirname(HERE)), ".venvs")
ANSWER_DEADLINE_S = 120.0


class NovaError(Exception):
    """What nova raised; `kind` is its exception's class name."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["traceback"])
        self.kind: str = answer["error"]
        self.glance_requests: list[str] = answer["glance_requests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command did: nova_driver.py says what each field is."""

    result: Any
    log: list[dict[str, str]]
    commands: list[str]
    glance_requests: list[str]
    opens: list[list[str]]
    seconds: float

    def messages(self, *levels: str) -> list[str]:
        """Nova's log messages of these levels."""
        return [record["message"] for record in self.log if record["level"] in levels]

    @property
    def complaints(self) -> list[str]:
        """Everything nova logged at WARNING or above."""
        return self.messages("WARNING", "ERROR", "CRITICAL")

    @property
    def downloads(self) -> list[str]:
        """The requests for an image's bytes that nova made."""
        return [request for request in self.glance_requests if request.split("?")[0].endswith("/file")]

    def ran(self, *words: str) -> bool:
        """Whether nova ran a command with all these words in it."""
        return any(all(word in command for word in words) for command in self.commands)

    def opened(self, suffix: str) -> bool:
        """Whether nova's own process opened, renamed or removed a file of this name's end."""
        return any(path.endswith(suffix) for _event, path in self.opens)


class NovaNode:
    """A running driver. Its commands are methods: ``node.boot(uuid=…, image_id=…)``."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._unread = b""

    def __getattr__(self, command: str) -> Any:
        if command.startswith("_"):
            raise AttributeError(command)
        return lambda **arguments: self.run(command, **arguments)

    def run(self, command: str, **arguments: Any) -> Answer:
        """Run a command; NovaError if nova raised, TimeoutError if nova hangs (the node is dead then)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self.read_answer()

    def read_answer(self) -> Answer:
        """Wait for the next answer."""
        answer = json.loads(self._read_line())
        if not answer.pop("ok"):
            raise NovaError(answer)
        return Answer(**({"seconds": 0.0} | answer))

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_DEADLINE_S)
            if not ready:
                self._process.kill()
                raise TimeoutError(f"nova did not answer within {ANSWER_DEADLINE_S:.0f} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise EOFError("the nova driver ended; its standard error says why")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line


@contextlib.contextmanager
def nova_node(venv: str, user: str | None) -> Iterator[NovaNode]:
    """Start nova from `.venvs/<venv>` as `user` (None: as we are); it ends with the context."""
    python = os.path.join(VENVS, venv, "bin", "python")
    if not os.path.exists(python):
        raise FileNotFoundError(f"{python} is missing: run `make setup`")
    argv = [python, os.path.join(HERE, "nova_driver.py"), *(["--user", user] if user else [])]
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "PATH", "TMPDIR")}
    environment = {**kept, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.__stderr__, env=environment, cwd="/"
    ) as process:
        try:
            node = NovaNode(process)
            node.read_answer()
            yield node
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(ANSWER_DEADLINE_S / 8)
            except subprocess.TimeoutExpired:
                process.kill()
