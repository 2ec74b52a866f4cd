import json
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from basefs.handlers.link_steps import CONNECTION_PREFIX
from basefs.keeper import VOLUMES_KEY
from basefs.keeper_held import ENTRIES_MAX, KEY_AND_NOTE_BYTES_MAX, OTHER_FDS, HeldFds, fd_limit, raise_fd_limit
from basefs.server_process import MESSAGE_BYTES_MAX


class Server:
    """Remembers the datagrams; the fds' inodes stand for the fds."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, Any], list[int]]] = []
        self.control = socket.socket()
        self.control.close()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self.sent.append((message, [os.fstat(fd).st_ino for fd in fds]))

    @property
    def items(self) -> list[Any]:
        return [item for message, _ in self.sent for item in message["items"]]


class Store:
    """Remembers what is kept, as the fd store does."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.events: list[str] = []
        self.is_full = False

    def put(self, key_and_note: bytes, fd: int) -> int | None:
        if self.is_full:
            return None
        number = len(self.events)
        self.kept[number] = key_and_note
        self.events.append(f"put {number}")
        return number

    def put_channel(self, fd: int) -> None:
        self.events.append("channel")

    def forget(self, number: int) -> None:
        del self.kept[number]
        self.events.append(f"forget {number}")


@pytest.fixture
def held() -> Iterator[HeldFds]:
    held = HeldFds(entries_max=1000)
    yield held
    held.close()


def a_file(name: str = "x") -> int:
    return os.memfd_create(name)


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_what_is_held_is_given_to_the_next_server_with_its_note(held: HeldFds) -> None:
    first, second = a_file(), a_file()
    held.take("a", {"flags": 2}, first)
    held.take("b", None, second)
    server = Server()
    held.send_to(server)
    inodes = [os.fstat(fd).st_ino for fd in (first, second)]
    assert server.sent == [({"type": "held", "items": [["a", {"flags": 2}], ["b", None]]}, inodes)]


def test_nothing_held_is_nothing_sent(held: HeldFds) -> None:
    server = Server()
    held.send_to(server)
    assert server.sent == []


def test_the_same_key_again_replaces_and_closes_the_old_fd(held: HeldFds) -> None:
    old, new = a_file(), a_file()
    held.take("a", 1, old)
    held.take("a", 2, new)
    assert not is_open(old)
    assert is_open(new)
    server = Server()
    held.send_to(server)
    assert server.items == [["a", 2]]


def test_what_is_dropped_is_closed_and_an_unknown_key_is_no_error(held: HeldFds) -> None:
    fd = a_file()
    held.take("a", None, fd)
    held.drop("a")
    held.drop("a")
    assert not is_open(fd)
    assert len(held) == 0


def test_whether_there_are_volumes_to_detach_is_told_by_the_keys(held: HeldFds) -> None:
    assert VOLUMES_KEY == CONNECTION_PREFIX
    held.take("linked/1", "", a_file())
    assert not held.has_any(VOLUMES_KEY)
    held.take(f"{CONNECTION_PREFIX}1", "", a_file())
    assert held.has_any(VOLUMES_KEY)
    held.drop(f"{CONNECTION_PREFIX}1")
    assert not held.has_any(VOLUMES_KEY)


def test_a_datagram_has_at_most_100_fds(held: HeldFds) -> None:
    for number in range(201):
        held.take(str(number), number, a_file())
    server = Server()
    held.send_to(server)
    assert [len(inodes) for _, inodes in server.sent] == [100, 100, 1]
    assert server.items == [[str(number), number] for number in range(201)]


def test_long_notes_make_no_datagram_that_a_server_cannot_read(held: HeldFds) -> None:
    note = "\u20ac" * (KEY_AND_NOTE_BYTES_MAX // 6 - 10)
    for number in range(150):
        held.take(str(number), note, a_file())
    server = Server()
    held.send_to(server)
    assert len(server.items) == 150
    assert all(len(json.dumps(message)) <= MESSAGE_BYTES_MAX for message, _ in server.sent)


def test_they_come_through_a_real_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    class Real:
        control = ours

        def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
            socket.send_fds(ours, [json.dumps(message).encode()], list(fds))

    held = HeldFds(entries_max=200)
    with ours, theirs:
        for number in range(100):
            held.take(str(number), None, a_file())
        held.send_to(Real())
        data, fds, _, _ = socket.recv_fds(theirs, MESSAGE_BYTES_MAX, 253)
        assert len(json.loads(data)["items"]) == len(fds) == 100
        for fd in fds:
            os.close(fd)
    held.close()


def test_the_one_too_many_is_refused_closed_and_logged_once(
    held: HeldFds, expected_warnings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expected_warnings("not held for the next server: more than 2 fds")
    held = HeldFds(entries_max=2)
    kept = [a_file(), a_file()]
    for number, fd in enumerate(kept):
        held.take(str(number), None, fd)
    refused = [a_file(), a_file()]
    for fd in refused:
        held.take("new", None, fd)
    assert [is_open(fd) for fd in (*kept, *refused)] == [True, True, False, False]
    assert len([record for record in caplog.records if "not held" in record.message]) == 1
    held.take("1", "again", a_file())
    assert len(held) == 2, "to replace one is always possible"
    held.close()


def test_a_note_that_is_too_long_and_a_key_that_is_no_text_are_refused(held: HeldFds, expected_warnings: Any) -> None:
    expected_warnings("a note of more than")
    expected_warnings("a key that is no text")
    held.take("a", "x" * 2000, a_file())
    held.take([7], None, a_file())  # type: ignore[arg-type]  # what a broken server may send
    assert len(held) == 0


def test_what_is_kept_is_replaced_only_after_its_successor_is_kept() -> None:
    store = Store()
    held = HeldFds(keep=store, entries_max=10)
    held.take("a", 1, a_file())
    held.take("a", 2, a_file())
    assert store.events == ["put 0", "put 1", "forget 0"]
    assert store.kept == {1: b'["a",2]'}
    held.close()
    assert store.kept == {}


def test_a_full_store_does_not_keep_from_holding() -> None:
    store = Store()
    store.is_full = True
    held = HeldFds(keep=store, entries_max=10)
    held.take("a", 1, a_file())
    assert len(held) == 1
    held.close()


def test_a_keeper_that_makes_way_leaves_what_is_kept() -> None:
    store = Store()
    held = HeldFds(keep=store, entries_max=10)
    fd = a_file()
    held.take("a", 1, fd)
    held.close_copies()
    assert not is_open(fd)
    assert store.kept == {0: b'["a",1]'}


def test_what_was_kept_is_restored_and_can_be_dropped() -> None:
    store = Store()
    store.kept[5] = b'["a",1]'
    held = HeldFds(keep=store, entries_max=10)
    held.restore(b'["a",1]', a_file(), 5)
    server = Server()
    held.send_to(server)
    assert server.items == [["a", 1]]
    held.drop("a")
    assert store.kept == {}


@pytest.mark.parametrize("text", [b"", b"{}", b"[1,2]", b'["a"]', b'["a",1]'])
def test_what_cannot_have_been_held_is_not_restored(text: bytes) -> None:
    held = HeldFds(entries_max=10)
    held.restore(b'["a",1]', a_file(), 1)
    fd = a_file()
    with pytest.raises(ValueError):
        held.restore(text, fd, 2)
    os.close(fd)
    held.close()


def test_a_login_s_fd_limit_is_raised_to_what_may_be_held() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, limits[1]))
        raise_fd_limit()
        assert fd_limit() == min(ENTRIES_MAX + OTHER_FDS, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_bound_is_the_fd_limit_less_some() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        assert fd_limit() == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert fd_limit() <= ENTRIES_MAX + OTHER_FDS
