"""nova's own code as a process, by the driver that the tests use too."""

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any, Self

from tools.mount import ROOT


class Nova:
    """tests/nova/nova_driver.py as a process of this user, with `environment` besides what it inherits."""

    def __init__(self, venv: str, environment: Mapping[str, str] | None = None) -> None:
        argv = [str(ROOT / ".venvs" / venv / "bin/python"), str(ROOT / "tests/nova/nova_driver.py")]
        self._process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def kill(self) -> None:
        """End it at once; whoever waits for its answer gets EOFError."""
        self._process.kill()

    def run(self, command: str, **arguments: Any) -> Any:
        """Return a command's result; RuntimeError with nova's traceback if nova raised, EOFError if it ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("nova ended")
        answer = json.loads(line)
        if not answer["ok"]:
            raise RuntimeError(answer["traceback"])
        return answer
