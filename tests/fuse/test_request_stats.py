"""What is counted at the edge."""

import errno

import pyfuse3
import pytest
import trio
import trio.testing

from basefs import errors
from basefs.core.histogram import DURATION_BOUNDS_S, DurationHistogram
from basefs.fuse.errno_edge import edge
from basefs.fuse.request_stats import HUNG_AFTER_S, RequestStats
from tests.conftest import ExpectedWarnings


class _Face:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.stats = RequestStats(clock=lambda: self.now_s)
        self.go_on = trio.Event()

    @edge
    async def read(self, what: Exception | None = None) -> str:
        await self.go_on.wait()
        if what is not None:
            raise what
        return "answer"


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = DurationHistogram()
    for duration_s in (0.0, DURATION_BOUNDS_S[0], 0.0006, DURATION_BOUNDS_S[-1] + 1):
        histogram.add(duration_s)
    assert histogram.counts == [2, 1, *[0] * (len(DURATION_BOUNDS_S) - 2), 1]
    assert histogram.sum_s == pytest.approx(sum((DURATION_BOUNDS_S[0], 0.0006, DURATION_BOUNDS_S[-1] + 1)))


async def test_a_read_is_hung_when_it_waits_for_more_than_ten_seconds(nursery: trio.Nursery) -> None:
    face = _Face()
    nursery.start_soon(face.read)
    await trio.testing.wait_all_tasks_blocked()
    face.now_s += HUNG_AFTER_S - 1
    nursery.start_soon(face.read)
    await trio.testing.wait_all_tasks_blocked()
    assert (face.stats.under_way(), face.stats.hung_reads()) == ({"read": 2}, 0)
    face.now_s += 1.5
    assert face.stats.hung_reads() == 1
    face.go_on.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (face.stats.under_way(), face.stats.hung_reads()) == ({}, 0)
    assert sum(face.stats.durations["read"].counts) == 2


@pytest.mark.parametrize(
    ("error", "name", "bugs"),
    [
        (errors.ReadOnlyError("no"), "EROFS", 0),
        (pyfuse3.FUSEError(errno.ENOENT), "ENOENT", 0),
        (ZeroDivisionError(), "EIO", 1),
    ],
)
async def test_each_error_is_counted_by_its_errno(
    error: Exception, name: str, bugs: int, expected_warnings: ExpectedWarnings
) -> None:
    if bugs:
        expected_warnings("bug in read")
    face = _Face()
    face.go_on.set()
    with pytest.raises(pyfuse3.FUSEError):
        await face.read(error)
    assert (dict(face.stats.errors), face.stats.bugs) == ({("read", name): 1}, bugs)


async def test_a_request_that_is_withdrawn_is_under_way_no_more() -> None:
    face = _Face()
    with trio.move_on_after(0):
        await face.read()
    assert face.stats.under_way() == {}
