"""The short form of `make fuzz`: seeds and some seconds for each thing that basefs reads."""

import subprocess

import pytest

from tools.fuzz.__main__ import run_apart
from tools.fuzz.targets import TARGETS

SECONDS = 3


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_basefs_reads_makes_a_wrong_byte_or_an_error_that_is_not_ours(name: str) -> None:
    try:
        said = run_apart(name, SECONDS)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error.stderr[-6000:]}")
    assert "number_of_executed_units" in said
