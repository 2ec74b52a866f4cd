"""The long forms of tests: the same test functions, told by their environment how many seconds to go on."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from basefs.keeper_setup import lock_holder
from tools.mount import ROOT, basefs_mounts
from tools.soak.context import Soak

GRACE_S = 240.0
"""Beyond its seconds: the example under way, and making a failing one small."""
LONG_VARIABLE = "BASEFS_LONG_S"
POWER_CUTS_A_SECOND = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LongForm:
    """A command that takes about as many seconds as `argv` is called with; `share` of the time is its."""

    name: str
    share: float
    argv: Callable[[int, str], list[str]]
    """Called with the seconds and a directory."""


def _pytest(test: str) -> Callable[[int, str], list[str]]:
    """The same test for longer: it looks at LONG_VARIABLE."""

    def argv(seconds: int, directory: str) -> list[str]:
        options = ["-o", f"timeout={seconds + GRACE_S}", "-o", "faulthandler_timeout=0", f"--basetemp={directory}/pt"]
        return ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, test]

    return argv


def _power_cuts(seconds: int, _directory: str) -> list[str]:
    return [
        "-m",
        "tests.faultfs.power_cut",
        "--samples",
        str(seconds * POWER_CUTS_A_SECOND),
        "--seed",
        str(os.getpid()),
    ]


LONG_FORMS = (
    LongForm(name="state machine", share=0.5, argv=_pytest("tests/model/test_faults_model.py")),
    LongForm(name="power cuts", share=0.2, argv=_power_cuts),
    LongForm(name="fuzzing", share=0.25, argv=lambda seconds, _: ["-m", "tools.fuzz", "all", f"{seconds / 60:.2f}"]),
)


def run_long_forms(soak: Soak, limit_s: float) -> None:
    """Run them one after the other, `limit_s` seconds or a little more in all, and report each."""
    for form in LONG_FORMS:
        seconds = round(form.share * limit_s)
        begun = time.monotonic()
        # Short, and not in our own directory: a socket's path has 107 bytes at most.
        with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
            argv = [sys.executable, *form.argv(seconds, directory)]
            environment = {**os.environ, LONG_VARIABLE: str(seconds)}
            done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            left = _take_away(directory)
        output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        error = f"exit code {done.returncode}, mounts left {left}:\n{output}" if done.returncode or left else ""
        soak.no_errors(f"failures of the {form.name} in {time.monotonic() - begun:.0f} s", error)


def _take_away(directory: str) -> list[str]:
    """Unmount what a form that crashed has left mounted there, and end its processes; the mount points."""
    left = [path for path in basefs_mounts() if path.startswith(directory)]
    for path in left:
        holder = lock_holder(Path(path).parent.parent / "cache") or {}
        subprocess.run(["umount", "-l", path], check=False)
        for pid in (holder.get("keeper_pid"), holder.get("server_pid")):
            if isinstance(pid, int):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return left
