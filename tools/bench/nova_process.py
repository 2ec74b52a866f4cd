"""nova's own code as a process, by the driver that the tests use too."""

import json
import os
import subprocess
from typing import Any, Self

from tools.mount import ROOT


class Nova:
    """tests/nova/nova_driver.py as a process of this user."""

    def __init__(self, venv: str) -> None:
        argv = [str(ROOT / ".venvs" / venv / "bin/python"), str(ROOT / "tests/nova/nova_driver.py")]
        self._process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
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

    def run(self, command: str, **arguments: Any) -> Any:
        """Return a command's result; RuntimeError with nova's traceback if nova raised."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        if not answer["ok"]:
            raise RuntimeError(answer["traceback"])
        return answer
