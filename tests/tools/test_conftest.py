"""The checks that run around every test do fail the tests that they are there to fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.mount import ROOT

TESTS = """
import logging, pytest

log = logging.getLogger("basefs.somewhere")

def test_warns_unexpectedly():
    log.warning("nobody said that this would come")

def test_warns_as_declared(expected_warnings):
    expected_warnings("would come$")
    log.warning("this would come")

def test_declares_what_does_not_come(expected_warnings):
    expected_warnings("never")

def test_does_not_warn_as_the_machine_is_fast_enough(expected_warnings):
    expected_warnings.may_come("never")

def test_warns_of_nothing():
    log.info("all is well")
"""


def run_pytest(tests: str, directory: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    (directory / "test_sample.py").write_text(tests, encoding="utf-8")
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-v"]
    return subprocess.run(
        [*argv, "-p", "no:cacheprovider", f"--rootdir={directory}", str(directory / "test_sample.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_warning_is_declared_or_fails_its_test_and_a_declared_one_must_come(tmp_path: Path) -> None:
    out = run_pytest(TESTS, tmp_path).stdout
    assert "5 passed, 2 errors" in out, out
    assert "ERROR test_sample.py::test_warns_unexpectedly" in out
    assert "ERROR test_sample.py::test_declares_what_does_not_come" in out


@pytest.mark.parametrize(("ci", "exit_code"), [("true", 1), ("", 0)])
def test_a_skipped_test_fails_the_run_in_ci_only(tmp_path: Path, ci: str, exit_code: int) -> None:
    tests = "import pytest\ndef test_one(): pass\n@pytest.mark.skip(reason='no')\ndef test_two(): pass\n"
    done = run_pytest(tests, tmp_path, CI=ci)
    assert done.returncode == exit_code, done.stdout


def test_what_mounts_is_marked_so_whoever_forgot_it(tmp_path: Path) -> None:
    tests = "def test_one(basefs_mount): pass\ndef test_two(): pass\n"
    out = run_pytest(tests, tmp_path, PYTEST_ADDOPTS="-m 'not mount'").stdout
    assert "1 passed, 1 deselected" in out, out
