"""The long forms of tests: the same test functions, told by their environment how many seconds to go on."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from tools.mount import ROOT
from tools.soak.context import Soak

GRACE_S = 240.0
"""Beyond its seconds: the example under way, and making a failing one small."""
LONG_VARIABLE = "BASEFS_LONG_S"


@dataclass(frozen=True, slots=True, kw_only=True)
class LongForm:
    """One test, and which part of the time is its."""

    name: str
    test: str
    share: float
    variable: str = LONG_VARIABLE


LONG_FORMS = (LongForm(name="state machine", test="tests/model/test_faults_model.py", share=0.5),)


def run_long_forms(soak: Soak, limit_s: float) -> None:
    """Run them one after the other, `limit_s` seconds or a little more in all, and report each."""
    for form in LONG_FORMS:
        seconds = round(form.share * limit_s)
        begun = time.monotonic()
        # Short, and not in our own directory: a socket's path has 107 bytes at most.
        with tempfile.TemporaryDirectory(prefix="soak-") as directory:
            argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={directory}/pt"]
            argv += ["-o", f"timeout={seconds + GRACE_S}", "-o", "faulthandler_timeout=0", form.test]
            environment = {**os.environ, form.variable: str(seconds)}
            done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        error = "" if done.returncode == 0 else f"pytest exited with {done.returncode}:\n{done.stdout[-3000:]}"
        soak.no_errors(f"failures of the {form.name}, {time.monotonic() - begun:.0f} s", error)
