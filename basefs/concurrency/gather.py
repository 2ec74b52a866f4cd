"""Calls side by side, with one plain error: an `ExceptionGroup` stays where its nursery is."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from basefs import errors

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], *, at_once_max: int = 32) -> list[T]:
    """What the calls give, in their order; at most `at_once_max` run at a time. One call costs no task.

    Raises what the first that failed raised; a bug (no BasefsError) goes before. The others are cancelled then.
    Cancellation: cancels all of them.
    """
    if len(calls) == 1:
        return [await calls[0]()]
    results: dict[int, T] = {}
    waiting = iter(enumerate(calls))

    async def work() -> None:
        for index, call in waiting:
            results[index] = await call()

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(min(len(calls), at_once_max)):
                nursery.start_soon(work)
    except* errors.BasefsError as group:
        error = first_error(group)
    else:
        return [results[index] for index in range(len(calls))]
    raise error


def first_error(group: BaseExceptionGroup[errors.BasefsError]) -> errors.BasefsError:
    """One of the group's errors, to be raised for all of them."""
    for error in group.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
