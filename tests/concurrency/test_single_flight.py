"""One flight a key, whoever leaves; an error for each, remembered for none."""

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.concurrency.single_flight import SingleFlight
from tests.conftest import ExpectedWarnings


async def test_callers_of_one_key_share_one_call() -> None:
    calls, answers = [], []
    go = trio.Event()

    async def call() -> int:
        calls.append(1)
        await go.wait()
        return 42

    async with trio.open_nursery() as nursery:
        flights: SingleFlight[str, int] = SingleFlight(nursery)

        async def caller() -> None:
            answers.append(await flights.run("key", call))

        for _ in range(20):
            nursery.start_soon(caller)
        await trio.testing.wait_all_tasks_blocked()
        assert len(flights) == 1
        go.set()
    assert (len(calls), answers, len(flights)) == (1, [42] * 20, 0)


async def test_other_keys_are_other_flights() -> None:
    async with trio.open_nursery() as nursery:
        flights: SingleFlight[int, int] = SingleFlight(nursery)

        async def call_of(n: int) -> int:
            return n

        assert [await flights.run(n, lambda n=n: call_of(n)) for n in range(3)] == [0, 1, 2]  # type: ignore[misc]


async def test_a_caller_that_leaves_does_not_end_the_flight() -> None:
    go, done = trio.Event(), []

    async def call() -> None:
        await go.wait()
        done.append(1)

    async with trio.open_nursery() as nursery:
        flights: SingleFlight[str, None] = SingleFlight(nursery)
        with trio.move_on_after(0):
            await flights.run("key", call)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert done == [1]


async def test_each_waiter_gets_an_error_of_its_own_and_the_next_call_begins_anew() -> None:
    caught: list[errors.SourceUnavailableError] = []
    calls = []

    async def call() -> None:
        calls.append(1)
        await trio.lowlevel.checkpoint()
        raise errors.SourceUnavailableError("away", retry_after_s=3.0)

    async with trio.open_nursery() as nursery:
        flights: SingleFlight[str, None] = SingleFlight(nursery)

        async def caller() -> None:
            with pytest.raises(errors.SourceUnavailableError) as info:
                await flights.run("key", call)
            caught.append(info.value)

        async with trio.open_nursery() as callers:
            for _ in range(3):
                callers.start_soon(caller)
        assert len({id(error) for error in caught}) == 3
        assert {error.retry_after_s for error in caught} == {3.0}
        await caller()
    assert len(calls) == 2


async def test_a_bug_reaches_the_waiters_as_an_error(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings("bug in the work")

    async def call() -> None:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        flights: SingleFlight[str, None] = SingleFlight(nursery)
        with pytest.raises(errors.InternalError):
            await flights.run("key", call)


async def test_the_end_of_the_service_frees_the_waiters() -> None:
    freed = []
    async with trio.open_nursery() as waiters:
        async with trio.open_nursery() as service:
            flights: SingleFlight[str, None] = SingleFlight(service)

            async def caller() -> None:
                with pytest.raises(errors.SourceUnavailableError):
                    await flights.run("key", trio.sleep_forever)
                freed.append(1)

            waiters.start_soon(caller)
            await trio.testing.wait_all_tasks_blocked()
            service.cancel_scope.cancel()
    assert freed == [1]
