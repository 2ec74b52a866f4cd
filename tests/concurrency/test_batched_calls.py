"""Calls that share trips to a thread: each has its own result, none is lost, none is made for who has left."""

import threading

import pytest
import trio

from basefs.concurrency.batched_calls import BatchedCalls


async def test_each_call_gets_its_own_result_or_error():
    calls, results = BatchedCalls("test", trips_max=2), {}

    def make(number):
        if number % 3 == 0:
            raise ValueError(number)
        return number * 2

    async def call(number):
        try:
            results[number] = await calls.run(make, number)
        except ValueError as exc:
            results[number] = exc.args[0]

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(call, number)
    assert results == {number: number if number % 3 == 0 else number * 2 for number in range(50)}


async def test_what_comes_during_a_trip_makes_the_next_one_together():
    calls, go, threads = BatchedCalls("test", trips_max=1), threading.Event(), []

    def first():
        go.wait()

    def note():
        threads.append(threading.get_ident())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.run, first)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(calls.run, note)
        await trio.testing.wait_all_tasks_blocked()
        assert calls._threads.busy == 1
        go.set()
    assert len(threads) == 5
    assert len(set(threads)) == 1


async def test_who_was_woken_together_makes_one_trip():
    calls, threads = BatchedCalls("test", trips_max=2), []
    go = trio.Event()

    async def call():
        await go.wait()
        await calls.run(lambda: threads.append(threading.get_ident()))

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        trips = []
        made = calls._threads.run
        calls._threads.run = lambda fn, batch: trips.append(len(batch)) or made(fn, batch)
        go.set()
    assert len(threads) == 16
    # Two took a place each; the one that goes first takes along all who wait.
    assert sorted(trips) == [1, 15]


async def test_a_caller_that_leaves_before_its_trip_is_not_called_and_the_others_are():
    calls, go, made = BatchedCalls("test", trips_max=1), threading.Event(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.run, go.wait)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(calls.run, made.append, "left")
                nursery.start_soon(calls.run, made.append, "stayed")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        go.set()
    assert made == ["stayed"]
    assert await calls.run(lambda: "goes on") == "goes on"


async def test_who_is_to_make_the_next_trip_and_is_cancelled_hands_it_on():
    calls, go, made = BatchedCalls("test", trips_max=1), threading.Event(), []
    scope = trio.CancelScope()

    async def leave_when_chosen():
        with scope:
            await calls.run(made.append, "chosen")

    async def first():
        await calls.run(go.wait)
        scope.cancel()  # in the step in which the next one was chosen

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(leave_when_chosen)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(calls.run, made.append, "after it")
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert "after it" in made
    assert calls._trips == 0


async def test_a_call_under_way_is_waited_for_when_its_caller_is_cancelled():
    calls, go, made = BatchedCalls("test", trips_max=1), threading.Event(), []

    def slow():
        go.wait()
        made.append("made")

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.run, slow)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            go.set()
    assert made == ["made"]


@pytest.mark.parametrize("trips_max", [1, 3])
async def test_it_is_at_rest_after_many_calls_and_cancellations(trips_max):
    calls, made = BatchedCalls("test", trips_max=trips_max), []

    async def call(number):
        with trio.move_on_after(number % 7 / 10_000):
            await calls.run(made.append, number)

    async with trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(call, number)
    assert len(made) == len(set(made))
    assert (calls._trips, len(calls._waiting)) == (0, 0)
