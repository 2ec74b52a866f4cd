"""A cancelled call that changes something elsewhere has a little time to answer."""

import pytest
import trio
import trio.testing

from basefs.concurrency.grace import with_grace


async def answer_after(seconds: float) -> str:
    await trio.sleep(seconds)
    return "done"


async def test_without_cancellation_it_is_the_call(autojump_clock):
    assert await with_grace(lambda: answer_after(100), 1) == "done"


async def test_an_error_of_the_call_is_raised(autojump_clock):
    async def fail() -> None:
        raise OSError("told to")

    with pytest.raises(OSError, match="told to"):
        await with_grace(fail, 1)


async def test_an_answer_within_the_grace_is_given_and_the_next_checkpoint_is_cancelled(autojump_clock):
    got = []
    with trio.move_on_after(1) as limit:
        got.append(await with_grace(lambda: answer_after(5), 10))
        got.append("not cancelled")
        await trio.lowlevel.checkpoint()
        got.append("not cancelled at all")
    assert limit.cancelled_caught
    assert got == ["done", "not cancelled"]
    assert trio.current_time() == pytest.approx(5, abs=0.1)


async def test_after_the_grace_the_call_is_cancelled(autojump_clock):
    with trio.move_on_after(1) as limit:
        await with_grace(lambda: answer_after(100), 10)
    assert limit.cancelled_caught
    assert trio.current_time() == pytest.approx(11, abs=0.1)
