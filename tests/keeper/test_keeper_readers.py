"""The keeper's readers, real processes, on a kernel and with a server that are the test's."""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from basefs import keeper_readers
from basefs.keeper_reader_process import Place, taken_slots
from basefs.keeper_readers import QUICK_DEATHS_MAX, Readers
from basefs.reader_layout import LAYOUT, SLOTS_BYTES
from tests.conftest import ExpectedWarnings
from tests.keeper.test_reader import lookup_of

PATIENCE_S = 30.0
WATCHDOG_S = 60.0
READER_DIED = r"reader 0 died \(signal SIGTERM\)"


class Session:
    """A kernel that can resend, and whose connection cannot be cloned."""

    can_resend = True

    def __init__(self) -> None:
        self.fd, self._other = os.pipe2(os.O_NONBLOCK)
        self.resent = 0

    def check(self) -> None:
        """It goes on."""

    def resend(self) -> None:
        self.resent += 1

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._other)


class Server:
    """What of a server its readers are told to, and by."""

    def __init__(self, layout: int = LAYOUT) -> None:
        self.loaded = {"reader_layout": layout}
        self.readers: list[int] = []

    def send(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        self.readers.append(message["number"])


class World:
    """One place, on whose clone requests come from `kernel`, and the readers of a keeper over it."""

    def __init__(self) -> None:
        self.session = Session()
        self.kernel, clone = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        clone.setblocking(False)
        slots_fd = os.memfd_create("slots")
        os.ftruncate(slots_fd, SLOTS_BYTES)
        self.place = Place(clone.detach(), slots_fd)
        self.readers = self.made({0: self.place})

    def made(self, places: dict[int, Place], *, keeps: bool = True) -> Readers:
        session: Any = self.session
        return Readers(session, places, lock_fd=self.session.fd, oom_score=0, keep=lambda _number, _place: keeps)

    def want(self, count: int) -> None:
        self.readers.serves(count, watchdog_s=WATCHDOG_S, now_s=time.monotonic())

    def run_until(self, is_so: Callable[[], object]) -> None:
        """As the keeper's loop does, until it is so."""
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end
            ready, _, _ = select.select(self.readers.fds(), [], [], 0.01)
            self.readers.handle(set(ready))
            self.readers.on_time(time.monotonic())

    def pid(self) -> int:
        """That of the reader, once it takes requests."""
        self.run_until(lambda: self.readers.status()["readers"])
        (pid,) = self.readers.status()["reader_pids"]
        return int(pid)

    def has_taken(self) -> bool:
        return bool(taken_slots(self.place))

    def close(self) -> None:
        self.readers.end()
        self.kernel.close()
        self.session.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_a_server_gets_the_readers_that_are_there_and_those_that_come(world: World) -> None:
    server: Any = Server()
    assert world.readers.are_known_to(server)
    world.readers.connect(server)
    assert server.readers == []
    world.want(1)
    world.pid()
    assert server.readers == [0]
    following: Any = Server()
    world.readers.cut()
    world.readers.connect(following)
    assert (server.readers, following.readers) == ([0], [0])


def test_a_server_that_does_not_know_them_has_their_slots_resent_to_it(world: World) -> None:
    other: Any = Server(LAYOUT + 1)
    assert not world.readers.are_known_to(other)
    world.want(1)
    pidfd = os.pidfd_open(world.pid())
    world.kernel.send(lookup_of(2))
    world.run_until(world.has_taken)
    world.readers.give_up()
    assert select.select([pidfd], [], [], 0)[0], "nobody takes what is resent now"
    os.close(pidfd)
    assert not world.has_taken()
    assert os.get_blocking(world.session.fd)
    status = world.readers.status()
    assert status["reader_pids"] == []
    assert "another layout" in status["readers_reason"]
    world.want(1)
    world.pid()


def test_a_reader_of_another_layout_gets_no_place_and_no_successor(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_readers, "LAYOUT", LAYOUT + 1)
    world.want(1)
    world.run_until(lambda: world.readers.status()["reader_pids"])
    world.run_until(lambda: not world.readers.status()["reader_pids"])
    status = world.readers.status()
    assert (status["readers_wanted"], status["reader_deaths"]) == (0, 0)
    assert "another layout" in status["readers_reason"]
    assert world.readers.due_s() is None


def test_requests_that_end_every_reader_are_handed_back(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings(READER_DIED)
    expected_warnings("the requests that reader 0 had taken are handed out again")
    world.want(1)
    world.kernel.send(lookup_of(2))
    for number in range(QUICK_DEATHS_MAX):
        pid = world.pid()
        world.run_until(world.has_taken)
        assert world.session.resent == 0, f"{number} deaths say nothing yet"
        os.kill(pid, signal.SIGTERM)
        world.run_until(lambda number=number: world.readers.status()["reader_deaths"] == number + 1)
    assert world.session.resent == 1
    assert not world.has_taken()
    world.pid()


def test_what_one_too_many_had_taken_is_handed_back(world: World, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings("the requests that reader 0 had taken are handed out again")
    world.want(1)
    pid = world.pid()
    world.kernel.send(lookup_of(2))
    world.run_until(world.has_taken)
    world.want(0)
    os.kill(pid, signal.SIGKILL)  # It would wait for a server.
    world.run_until(lambda: not world.readers.status()["reader_pids"])
    assert world.session.resent == 1
    assert not world.has_taken()
    assert world.readers.due_s() is None


@pytest.mark.parametrize(
    ("can_resend", "why"), [(False, "this kernel cannot resend requests"), (True, "no clone of /dev/fuse")]
)
def test_where_the_kernel_cannot_there_are_none_and_the_reason_is_told(
    world: World, can_resend: bool, why: str
) -> None:
    world.session.can_resend = can_resend
    readers = world.made({})
    readers.serves(2, watchdog_s=WATCHDOG_S, now_s=time.monotonic())
    assert len(readers) == 0
    assert why in readers.status()["readers_reason"]
