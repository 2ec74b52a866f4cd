"""Prometheus' own checker, unpacked by tools/setup."""

import subprocess
from pathlib import Path

PROMTOOL = Path(__file__).parents[2] / ".venvs" / "prometheus" / "usr" / "bin" / "promtool"


def promtool(*arguments: str, text: bytes = b"", cwd: Path | None = None) -> str:
    """What `promtool ARGUMENTS` says; fails the test unless it is content."""
    done = subprocess.run([PROMTOOL, *arguments], input=text, capture_output=True, check=False, cwd=cwd)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said
