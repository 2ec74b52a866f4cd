"""Calls that may hang are left behind in their threads, and counted."""

import threading

import pytest
import trio

from basefs.concurrency.threads import BlockingCalls


async def test_a_call_that_hangs_is_left_behind_and_keeps_its_turn() -> None:
    calls, gate = BlockingCalls("test", threads_max=2), threading.Event()
    for _ in range(2):
        with pytest.raises(trio.TooSlowError):
            await calls.run_within(0.01, gate.wait)
    assert calls.busy == 2
    with pytest.raises(trio.TooSlowError):
        await calls.run_within(0.01, lambda: None)
    with trio.move_on_after(0.01) as scope:
        await calls.take_all_turns()
    assert scope.cancelled_caught, "threads are inside"
    gate.set()


async def test_all_turns_are_had_once_the_threads_have_ended() -> None:
    calls, gate = BlockingCalls("test", threads_max=2), threading.Event()
    with pytest.raises(trio.TooSlowError):
        await calls.run_within(0.01, gate.wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.take_all_turns)
        gate.set()
    assert await BlockingCalls("other", threads_max=1).run_within(5, lambda: 7) == 7
