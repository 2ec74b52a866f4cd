"""The counts of open images, from one server to the next, also when it was killed in the middle."""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.fuse import open_table
from basefs.fuse.open_table import RESENT_WITHIN_S, OpenTable, new_table

THREAD = 77


class Server:
    """One life with the table; `answer` does what comes after an answer."""

    def __init__(self, fd: int, at_s: float = 0.0) -> None:
        self.at_s = at_s
        self._after: list[Callable[[], None]] = []
        self.table = OpenTable(fd, lambda: self.at_s, self._after.append)

    def answer(self) -> None:
        while self._after:
            self._after.pop()()

    def open(self, number: int = 1, *, is_guest: bool = False, thread_id: int = THREAD) -> bool:
        return self.table.opened(number, is_guest=is_guest, thread_id=thread_id)

    def release(self, number: int = 1, *, is_guest: bool = False) -> bool:
        return self.table.released(number, is_guest=is_guest)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = new_table()
    yield fd
    os.close(fd)


def test_the_next_server_knows_what_is_open_and_what_was_unlinked(fd: int) -> None:
    server = Server(fd)
    for number, is_guest in ((1, True), (1, True), (1, False), (2, False), (3, True)):
        server.open(number, is_guest=is_guest)
        server.answer()
    server.table.set_unlinked(2, is_unlinked=True)
    server.release(3, is_guest=True)
    server.answer()
    table = Server(fd).table
    assert table.all_handles() == {1: 3, 2: 1}
    assert (table.has(1, is_guest=True), table.has(2, is_guest=True)) == (True, False)
    assert table.unlinked() == {2}


def test_an_open_ends_being_unlinked(fd: int) -> None:
    server = Server(fd)
    server.open()
    server.table.set_unlinked(1, is_unlinked=True)
    server.open()
    assert Server(fd).table.unlinked() == set()


def test_an_open_that_was_counted_and_not_answered_is_not_counted_again(fd: int) -> None:
    server = Server(fd)
    server.open()
    server.answer()
    server.open()
    after = Server(fd)
    assert after.open() is False
    assert after.table.handles(1) == 2
    assert after.open() is True
    assert after.table.handles(1) == 3


def test_a_release_that_was_counted_and_not_answered_is_not_counted_again(fd: int) -> None:
    server = Server(fd)
    for _ in range(3):
        server.open()
    server.release()
    after = Server(fd)
    assert (after.release(), after.table.handles(1)) == (False, 2)
    assert (after.release(), after.table.handles(1)) == (True, 1)


@pytest.mark.parametrize("other", [{"thread_id": 78}, {"is_guest": True}, {"number": 2}])
def test_another_open_after_a_kill_counts(fd: int, other: dict) -> None:
    Server(fd).open()
    assert Server(fd).open(**other) is True


def test_what_comes_long_after_a_kill_is_not_sent_again(fd: int) -> None:
    Server(fd).open()
    after = Server(fd)
    after.at_s = RESENT_WITHIN_S + 1
    assert after.open() is True


def test_an_answered_open_is_not_taken_for_one_sent_again(fd: int) -> None:
    server = Server(fd)
    server.open()
    server.answer()
    assert Server(fd).open() is True


def test_there_are_never_fewer_than_no_handles(fd: int) -> None:
    server = Server(fd)
    assert server.release() is False
    assert server.table.all_handles() == {}


def test_a_handle_that_nothing_is_known_of_is_learned_when_it_is_read(fd: int) -> None:
    Server(fd).table.learned(4, is_guest=True)
    assert Server(fd).table.has(4, is_guest=True)


def test_more_images_than_slots_are_learned_later(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(fd)
    for number in range(1, open_table.SLOTS + 3):
        server.open(number)
    assert len(server.table.all_handles()) == open_table.SLOTS
    server.release(1)
    server.open(open_table.SLOTS + 1)
    assert server.table.has(open_table.SLOTS + 1, is_guest=False)


@pytest.mark.parametrize("damage", ["size", "kind"])
def test_what_is_no_table_is_refused(fd: int, damage: str) -> None:
    if damage == "size":
        os.ftruncate(fd, 4096)
    else:
        os.pwrite(fd, b"\1\2\3\4", 0)
    with pytest.raises(ValueError):
        Server(fd)


class Killed(BaseException):
    """The server was killed before its n-th store."""


class KilledWords:
    """The words of a table that takes `stores` more stores."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self._words = words
        self._left = stores

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        if not self._left:
            raise Killed
        self._left -= 1
        self._words[at] = value


@given(
    before=st.lists(st.sampled_from(["open", "release"]), max_size=6),
    last=st.sampled_from(["open", "release"]),
    stores=st.integers(0, 12),
    is_guest=st.booleans(),
)
def test_a_kill_between_any_two_stores_counts_the_request_that_is_sent_again_once(
    before: list[str], last: str, stores: int, is_guest: bool
) -> None:
    fd = new_table()
    try:
        server = Server(fd)
        count = 0
        for step in before:
            getattr(server, step)(is_guest=is_guest)
            server.answer()
            count = max(0, count + (1 if step == "open" else -1))
        table = server.table
        table._words = KilledWords(table._words, stores)  # type: ignore[assignment]
        with contextlib.suppress(Killed):
            getattr(server, last)(is_guest=is_guest)
        # Not answered: the kernel sends it again.
        after = Server(fd)
        getattr(after, last)(is_guest=is_guest)
        assert after.table.handles(1) == max(0, count + (1 if last == "open" else -1))
    finally:
        os.close(fd)


def test_the_table_is_memory_that_is_shared(fd: int) -> None:
    server = Server(fd)
    server.open(9)
    with mmap.mmap(fd, 0) as seen:
        assert (9).to_bytes(4, "little") in seen[64:]
