"""The server's end of the keeper socket, with a keeper that is a socket."""

import json
import os
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.reader_layout import LAYOUT
from basefs.service.keeper_channel import HOLD_WAIT_S, KeeperChannel

BEGIN = {"type": "begin", "restarts": 1, "reason": "died", "last_death": "signal SIGKILL"}


class Keeper:
    """The keeper's end."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(5)
        self.channel = KeeperChannel(theirs.detach())
        self.channel.begun = BEGIN

    def say(self, message: dict, *fds: int) -> None:
        socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def hear(self) -> tuple[dict, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.socket, 65536, 8)
        return json.loads(data), list(fds)

    def close(self) -> None:
        self.socket.close()
        self.channel._socket.close()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


async def fill(keeper: Keeper) -> int:
    """Post until the socket takes nothing more; how many messages that were."""
    count = 0
    while not keeper.channel._outbox:
        keeper.channel.send({"type": "pong", "n": count})
        count += 1
    return count


async def begin(keeper: Keeper) -> bool:
    return await keeper.channel.begin(version="1", options={"view": "raw"}, not_applied=["x"])


async def test_a_loaded_server_waits_for_its_turn_and_collects_what_is_held(keeper: Keeper) -> None:
    first, second = os.memfd_create("first"), os.memfd_create("second")
    begun: list[bool] = []

    async def server() -> None:
        begun.append(await begin(keeper))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server)
        await trio.testing.wait_all_tasks_blocked()
        loaded = {
            "type": "loaded",
            "reader_layout": LAYOUT,
            "version": "1",
            "options": {"view": "raw"},
            "not_applied": ["x"],
            "config_error": "",
        }
        assert keeper.hear() == (loaded, [])
        keeper.say({"type": "held", "items": [["lower/7", "w"], ["opens", ""]]}, first, second)
        keeper.say({"type": "held", "items": [["lower/9", "r"]]}, second)
        await trio.testing.wait_all_tasks_blocked()
        assert not begun
        keeper.say(BEGIN)
    channel = keeper.channel
    assert (begun, channel.begun) == ([True], BEGIN)
    lower = channel.take("lower/")
    assert [(one.key, one.note) for one in lower] == [("lower/7", "w"), ("lower/9", "r")]
    assert [same_file(one.fd, fd) for one, fd in zip(lower, (first, second), strict=True)] == [True, True]
    assert not any(os.get_inheritable(one.fd) for one in lower)
    assert [one.key for one in channel.held] == ["opens"]
    for fd in (first, second, *(one.fd for one in (*lower, *channel.held))):
        os.close(fd)


async def test_a_standby_that_is_told_to_stop_never_begins(keeper: Keeper) -> None:
    keeper.say({"type": "stop"})
    assert await begin(keeper) is False


async def test_a_keeper_that_ends_before_it_says_begin_ends_the_standby(keeper: Keeper) -> None:
    keeper.socket.close()
    with pytest.raises(errors.MountError):
        await begin(keeper)


async def test_what_the_socket_does_not_take_is_sent_later_in_order_with_fds_of_its_own(
    keeper: Keeper, autojump_clock: trio.testing.MockClock
) -> None:
    count = await fill(keeper)
    fd = os.memfd_create("held")
    copy = os.dup(fd)
    at = trio.current_time()
    await keeper.channel.hold("lower/1", "w", fd)
    await keeper.channel.drop("lower/1")
    assert trio.current_time() - at == 2 * HOLD_WAIT_S
    os.close(fd)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.channel.deliver)
        heard = [await trio.to_thread.run_sync(keeper.hear) for _ in range(count + 2)]
        await keeper.channel.flush()
        nursery.cancel_scope.cancel()
    assert [message["n"] for message, _ in heard[:count]] == list(range(count))
    (hold, (held,)), (drop, none) = heard[count:]
    assert (hold, drop, none) == (
        {"type": "hold", "key": "lower/1", "note": "w"},
        {"type": "drop", "key": "lower/1"},
        [],
    )
    assert same_file(held, copy)
    os.close(held)
    os.close(copy)


async def test_a_ping_is_answered_by_the_loop_and_stop_ends_the_listening(keeper: Keeper) -> None:
    keeper.say({"type": "ping", "n": 5})
    keeper.say({"type": "ping", "n": 6})
    keeper.say({"type": "stop"})
    assert await keeper.channel.listen() is True
    assert [keeper.hear()[0] for _ in range(2)] == [{"type": "pong", "n": 5}, {"type": "pong", "n": 6}]


async def test_nothing_fails_when_the_keeper_is_gone(keeper: Keeper) -> None:
    await fill(keeper)
    fd = os.memfd_create("held")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.channel.deliver)
        keeper.socket.close()
        await keeper.channel.hold("lower/1", "w", fd)
        await keeper.channel.drop("lower/1")
        await keeper.channel.flush()
        assert await keeper.channel.listen() is False
        nursery.cancel_scope.cancel()
    os.close(fd)
