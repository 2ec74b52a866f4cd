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


def test_all_else_is_trio_s() -> None:
    shown = SessionTrio()
    assert shown.open_nursery is trio.open_nursery
    assert shown.ClosedResourceError is trio.ClosedResourceError
    assert shown.lowlevel.current_task is trio.lowlevel.current_task
