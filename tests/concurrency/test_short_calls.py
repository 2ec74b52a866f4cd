"""Short calls in threads that stay: results, errors, order, cancellation, and their end."""

import gc
import threading

import pytest
import trio
import trio.testing

from basefs.concurrency.short_calls import ShortCalls


async def test_a_call_gives_its_result_or_its_error() -> None:
    calls = ShortCalls("short", threads_max=1)
    assert await calls.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await calls.run(divmod, 7, 0)
    assert await calls.run(threading.get_ident) != threading.get_ident()


async def test_many_at_once_get_each_their_own_and_no_more_threads_than_allowed() -> None:
    calls = ShortCalls("short", threads_max=3)
    found: dict[int, int] = {}
    names = set()

    async def caller(number: int) -> None:
        found[number] = await calls.run(pow, number, 2)
        names.add(await calls.run(threading.get_ident))

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(caller, number)
    assert found == {number: number**2 for number in range(200)}
    assert len(names) <= 3


async def test_no_call_is_forgotten_whether_a_thread_is_just_going_to_sleep_or_not() -> None:
    calls = ShortCalls("short", threads_max=2)
    found: list[int] = []

    async def caller(first: int) -> None:
        for number in range(first, first + 300):  # each ends when the other may have nothing left
            found.append(await calls.run(abs, number))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for first in (0, 300, 600):
                nursery.start_soon(caller, first)
    assert sorted(found) == list(range(900))


async def test_who_is_cancelled_waits_for_nothing_and_disturbs_nobody() -> None:
    calls = ShortCalls("short", threads_max=1)
    begun, go = threading.Event(), threading.Event()
    ran: list[str] = []

    def held() -> str:
        begun.set()
        go.wait()
        return "late"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.run, held)
        while not begun.is_set():
            await trio.lowlevel.checkpoint()
        nursery.start_soon(calls.run, ran.append, "was never begun")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    go.set()
    assert await calls.run(str, 5) == "5"
    assert ran == []


async def test_the_threads_end_with_their_object() -> None:
    calls = ShortCalls("ending", threads_max=2)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(calls.run, int)
    threads = [thread for thread in threading.enumerate() if thread.name == "ending"]
    assert threads
    del calls
    gc.collect()
    with trio.fail_after(10):
        await trio.to_thread.run_sync(lambda: [thread.join() for thread in threads])


def test_a_call_that_outlives_the_loop_is_no_error() -> None:
    calls = ShortCalls("short", threads_max=1)
    begun, go = threading.Event(), threading.Event()

    def held() -> None:
        begun.set()
        go.wait()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.run, held)
            while not begun.is_set():
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    go.set()
    assert trio.run(calls.run, str, 7) == "7"


async def test_results_that_come_together_all_arrive() -> None:
    """The loop is told once of those that came before it looked, and again of those that came after."""
    calls = ShortCalls("short", threads_max=4)
    together = threading.Barrier(4)

    def met(number: int) -> int:
        together.wait(10)
        return number

    found: list[int] = []

    async def caller(number: int) -> None:
        for turn in range(50):
            found.append(await calls.run(met, 50 * number + turn))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(caller, number)
    assert sorted(found) == list(range(200))
