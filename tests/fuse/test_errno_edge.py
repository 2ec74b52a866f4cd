"""The edge: every error has an errno, and nothing but FUSEError leaves a handler."""

import errno
import logging

import pyfuse3
import pytest
import trio

from basefs import errors
from basefs.fuse.errno_edge import ERRNO_OF, edge, errno_of
from basefs.fuse.request_stats import RequestStats
from tests.conftest import ExpectedWarnings


def _all_subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_all_subclasses(sub) for sub in cls.__subclasses__()))


def test_every_error_of_the_tree_has_an_errno() -> None:
    from_tree = {cls for cls in _all_subclasses(errors.BasefsError) if cls.__module__ == errors.__name__}
    assert set(ERRNO_OF) == from_tree


def test_no_error_is_eperm_or_eacces_which_libvirt_takes_for_fatal() -> None:
    assert not {errno.EPERM, errno.EACCES} & set(ERRNO_OF.values())


def test_an_error_of_the_lower_file_system_keeps_its_errno() -> None:
    assert errno_of(errors.LowerFileError(OSError(errno.ENOTEMPTY, "full"))) == errno.ENOTEMPTY


class _Face:
    def __init__(self) -> None:
        self.stats = RequestStats()

    @edge
    async def read(self, what: Exception | None) -> str:
        if what is not None:
            raise what
        await trio.lowlevel.checkpoint()
        return "answer"


async def test_an_answer_passes() -> None:
    assert await _Face().read(None) == "answer"


async def test_our_error_becomes_its_errno() -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await _Face().read(errors.ReadOnlyError("no"))
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("bug", [OSError(errno.ETIMEDOUT, "x"), ValueError("x"), KeyError("x"), RecursionError()])
async def test_a_bug_becomes_eio_and_a_traceback_in_the_log(
    bug: Exception, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("bug in read")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await _Face().read(bug)
    assert caught.value.errno == errno.EIO


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await _Face().read(None)
    assert scope.cancelled_caught


async def test_the_same_failure_is_logged_once_in_a_while(
    autojump_clock: trio.testing.MockClock, expected_warnings: ExpectedWarnings, caplog: pytest.LogCaptureFixture
) -> None:
    expected_warnings("answered EIO")
    caplog.set_level(logging.WARNING)
    for _ in range(50):
        with pytest.raises(pyfuse3.FUSEError):
            await _Face().read(errors.SourceUnavailableError("Glance is away"))
    assert len(caplog.records) == 1
    await trio.sleep(11)
    with pytest.raises(pyfuse3.FUSEError):
        await _Face().read(errors.SourceUnavailableError("Glance is away"))
    assert len(caplog.records) == 2
