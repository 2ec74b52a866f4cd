"""Which question for the snapshot a read counts by: the library's callbacks are called by hand here."""

import errno
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from basefs import errors
from basefs.sources.ceph_cluster import CephCalls, ConnectionLostError
from basefs.sources.rbd_reads import SnapshotReads
from basefs.sources.rbd_snapshot import Snapshot
from tests.fakes.memory_ceph import Error, MemoryCeph


@dataclass
class Library:
    """Image and pool: what is begun waits in `reads` and `questions` for its end. `raises`: what aio_execute raises."""

    reads: list[Any] = field(default_factory=list)
    questions: list[Any] = field(default_factory=list)
    raises: Exception | None = None

    def aio_read(self, offset: int, length: int, done: Any) -> None:
        self.reads.append((length, done))

    def aio_execute(self, name: str, cls: str, method: str, data: bytes, length: int, done: Any) -> None:
        if self.raises:
            raise self.raises
        self.questions.append(done)

    def end_read(self, number: int = 0, code: int | None = None, data: bytes | None = None) -> None:
        length, done = self.reads.pop(number)
        done(SimpleNamespace(get_return_value=lambda: length if code is None else code), data or b"x" * length)

    def answer(self, code: int = 0) -> None:
        self.questions.pop(0)(SimpleNamespace(get_return_value=lambda: code), b"snap")


@pytest.fixture
def library():
    return Library()


def reads_of(library):
    snapshot = Snapshot(
        image=library, pool=library, size=100, header="rbd_header.x", snapshot_id=4, part_bytes=10, objects=None
    )
    return SnapshotReads(CephCalls(MemoryCeph().library), snapshot)


@pytest.fixture
async def reads(library):
    return reads_of(library)


async def is_done(read):
    await trio.testing.wait_all_tasks_blocked()
    return read.done.is_set()


async def test_a_read_counts_when_the_header_was_asked_after_its_end(library, reads):
    read = reads.begin("it", 0, 5)
    assert library.questions == []
    library.end_read()
    assert not await is_done(read)
    library.answer()
    assert await read.wait("it") == b"xxxxx"
    assert (read.is_right, library.questions) == (True, [])


async def test_who_waits_for_the_headers_word_shares_one_that_began_after_all_of_them(library, reads):
    begun = [reads.begin("it", 0, 5) for _ in range(4)]
    for _ in begun:
        library.end_read()
    assert len(library.questions) == 1
    library.answer()
    assert [await is_done(read) for read in begun] == [True, False, False, False]
    assert len(library.questions) == 1, "one for the other three"
    library.answer()
    assert [await is_done(read) for read in begun] == [True] * 4
    assert library.questions == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (-errno.ENOENT, errors.StoreGoneError),
        (-errno.ESHUTDOWN, ConnectionLostError),
        (-errno.ETIMEDOUT, errors.SourceUnavailableError),
        (-errno.EPERM, errors.SourceForbiddenError),
    ],
)
async def test_what_the_header_does_not_confirm_is_the_error_of_its_answer(library, reads, code, error):
    read, later = reads.begin("it", 0, 5), reads.begin("it", 5, 5)
    library.end_read()
    library.end_read()
    library.answer(code)
    library.answer()
    with pytest.raises(error, match="its snapshot"):
        await read.wait("it")
    assert not read.is_right
    assert await later.wait("it") == b"xxxxx"


@pytest.mark.parametrize(
    ("raised", "error"),
    [(Error("closed", errno.EIO), errors.SourceUnavailableError), (ValueError("a bug"), ValueError)],
)
async def test_a_question_that_cannot_be_begun_fails_its_reads_and_the_next_one_is_asked(library, reads, raised, error):
    library.raises = raised
    read, later = reads.begin("it", 0, 5), reads.begin("it", 5, 5)
    library.end_read()
    with pytest.raises(error):
        await read.wait("it")
    assert not read.is_right
    library.raises = None
    library.end_read()
    library.answer()
    assert await later.wait("it") == b"xxxxx"


async def test_a_read_that_failed_or_is_short_is_not_asked_for(library, reads):
    failed, short = reads.begin("it", 0, 5), reads.begin("it", 5, 5)
    library.end_read(code=-errno.ENOENT)
    library.end_read(data=b"xxxx")
    with pytest.raises(errors.StoreGoneError):
        await failed.wait("it")
    with pytest.raises(errors.SourceCorruptError, match="4 bytes instead of 5"):
        await short.wait("it")
    assert library.questions == []


async def test_after_the_end_nothing_is_asked(library, reads):
    reads.begin("it", 0, 5)
    reads.begin("it", 5, 5)
    reads.begin("it", 5, 5)
    library.end_read()
    library.end_read()
    reads.close()
    library.answer()
    library.end_read()
    assert library.questions == []


@given(st.lists(st.sampled_from(["begin", "end", "answer"]), max_size=40))
def test_no_read_counts_by_a_question_that_began_before_its_end(steps):
    trio.run(_counts_rightly, steps)


async def _counts_rightly(steps):
    library, begun, ended_at, asked_at = Library(), [], {}, []
    reads = reads_of(library)
    under_way, confirmed_until = [], -1
    for now, step in enumerate(steps):
        if step == "begin":
            begun.append(reads.begin("it", 0, 5))
            under_way.append(begun[-1])
        elif step == "end" and library.reads:
            ended_at[under_way.pop(0)] = now
            library.end_read()
        elif step == "answer" and library.questions:
            confirmed_until = asked_at.pop(0)
            library.answer()
        asked_at += [now] * (len(library.questions) - len(asked_at))
        await trio.testing.wait_all_tasks_blocked()
        for read in begun:
            assert read.done.is_set() == (ended_at.get(read, now + 1) <= confirmed_until)
    assert bool(library.questions) == any(not read.done.is_set() for read in ended_at)
