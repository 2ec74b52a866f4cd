"""Workers of pyfuse3 take what is there without a pass of the loop, but not for ever, and one at a time."""

import socket

import pytest
import trio
import trio.testing

from basefs.fuse import session_waits
from basefs.fuse.session_waits import RequestLock, RequestWait, SessionTrio


async def test_what_is_there_is_taken_at_once_after_one_real_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_waits, "BURST_S", 3600.0)
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"12")
        wait = RequestWait()
        with trio.testing.assert_checkpoints():
            await wait.wait_readable(reader.fileno())
        for _ in range(2):
            with trio.testing.assert_no_checkpoints():
                await wait.wait_readable(reader.fileno())
            reader.recv(1)
        with trio.move_on_after(0.01) as scope:
            await wait.wait_readable(reader.fileno())
        assert scope.cancelled_caught, "nothing is there"
        writer.close()
        await wait.wait_readable(reader.fileno())  # an end is there to be read


async def test_others_get_their_turn_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_waits, "BURST_S", 0.0)
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"1")
        wait = RequestWait()
        for _ in range(3):
            with trio.testing.assert_checkpoints():
                await wait.wait_readable(reader.fileno())


async def test_one_worker_at_a_time_and_none_is_forgotten() -> None:
    lock, inside, done = RequestLock(), 0, 0

    async def worker(cancelled_after: int | None) -> None:
        nonlocal inside, done
        with trio.CancelScope() as scope:
            for number in range(20):
                async with lock:
                    inside += 1
                    assert inside == 1
                    if number == cancelled_after:
                        scope.cancel()
                    try:
                        await trio.lowlevel.checkpoint()
                    finally:
                        inside -= 1
                await trio.lowlevel.checkpoint()
        done += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for cancelled_after in (None, 3, None, 7, 0):
                nursery.start_soon(worker, cancelled_after)
    assert (inside, done) == (0, 5)


async def test_a_worker_that_waits_for_the_lock_may_be_cancelled() -> None:
    lock = RequestLock()

    async def worker() -> None:
        async with lock:
            raise AssertionError("it is taken")

    async with lock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    async with lock:
        pass


async def test_who_came_last_is_called_and_nobody_else_meanwhile() -> None:
    lock = RequestLock()
    order: list[int] = []

    async def worker(number: int) -> None:
        async with lock:
            order.append(number)

    async with trio.open_nursery() as nursery:
        async with lock:
            for number in range(3):
                nursery.start_soon(worker, number)
                await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):  # requests that are answered at once: no pass of the loop, so the one that was called waits
            async with lock:
                pass
        assert order == []
    assert order == [2, 1, 0]


async def test_one_that_is_called_and_comes_too_late_waits_again_and_is_not_forgotten() -> None:
    lock = RequestLock()
    done = trio.Event()

    async def worker() -> None:
        async with lock:
            done.set()

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(worker)
            await trio.testing.wait_all_tasks_blocked()
        async with lock:
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
        with trio.fail_after(10):
            await done.wait()


async def test_one_that_is_called_and_cancelled_takes_the_lock_with_it_for_nobody() -> None:
    lock = RequestLock()
    taken = 0

    async def worker(scope: trio.CancelScope) -> None:
        nonlocal taken
        with scope:
            async with lock:
                taken += 1
                await trio.lowlevel.checkpoint()

    first, second = trio.CancelScope(), trio.CancelScope()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            async with lock:
                for scope in (first, second):
                    nursery.start_soon(worker, scope)
                    await trio.testing.wait_all_tasks_blocked()
            second.cancel()  # it was called just now
    assert taken == 2


def test_all_else_is_trio_s() -> None:
    shown = SessionTrio()
    assert shown.open_nursery is trio.open_nursery
    assert shown.ClosedResourceError is trio.ClosedResourceError
    assert shown.lowlevel.current_task is trio.lowlevel.current_task
