"""The long forms of tests: the same test functions, told by their environment to go on for longer."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from tools.mount import ROOT
from tools.soak.context import Soak

GRACE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LongForm:
    """One test, and the variable that makes it long; `full` is its value in a full run."""

    name: str
    test: str
    variable: str
    full: int


LONG_FORMS = (
    LongForm(
        name="state machine",
        test="tests/model/test_faults_model.py",
        variable="BASEFS_MODEL_EXAMPLES",
        full=20,
    ),
)


def run_long_forms(soak: Soak, limit_s: float) -> None:
    """Run them one after the other, and report each; what would begin after `limit_s` seconds is reported as missed."""
    begun = time.monotonic()
    for form in LONG_FORMS:
        count = max(1, round(form.full * soak.scale))
        if time.monotonic() - begun > limit_s:
            soak.no_errors(f"long form: {form.name}", "no time was left")
            continue
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            f"timeout={GRACE_S + limit_s:g}",
        ]
        argv += ["-o", "faulthandler_timeout=0", f"--basetemp={soak.scratch / form.variable}", form.test]
        environment = {**os.environ, form.variable: str(count)}
        form_begun = time.monotonic()
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        error = "" if done.returncode == 0 else f"pytest exited with {done.returncode}:\n{done.stdout[-3000:]}"
        soak.no_errors(f"long form: {form.name}, {count} examples", error)
        soak.report.note(f"{form.name}: {time.monotonic() - form_begun:.0f} s")
