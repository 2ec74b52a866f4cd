"""Bugs end in one place, and only there is everything caught."""

import logging
import re
from pathlib import Path

import pytest
import trio

from basefs import errors
from basefs.concurrency.guarded import guarded
from tests.conftest import ExpectedWarnings

log = logging.getLogger("basefs.test")
BASEFS = Path(__file__).parents[2] / "basefs"


def test_a_bug_is_logged_with_its_traceback_and_known_afterwards(
    expected_warnings: ExpectedWarnings, caplog: pytest.LogCaptureFixture
) -> None:
    expected_warnings("bug in the work for 7")
    with guarded(log, "bug in the work for %d", 7) as guard:
        raise KeyError("x")
    assert isinstance(guard.bug, KeyError)
    assert caplog.records[-1].exc_info is not None


def test_what_is_foreseen_passes() -> None:
    with pytest.raises(errors.CacheError), guarded(log, "bug", foreseen=(errors.BasefsError,)):
        raise errors.CacheError("full")


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with guarded(log, "bug"):
            await trio.lowlevel.checkpoint()
        raise AssertionError("it went on")
    assert scope.cancelled_caught


def test_everything_is_caught_in_the_guard_at_the_fuse_edge_and_in_helper_processes_only() -> None:
    found = {path.name for path in BASEFS.rglob("*.py") if re.search(r"except Exception\b", path.read_text())}
    assert found == {"guarded.py", "errno_edge.py", "helper.py", "served.py"}
