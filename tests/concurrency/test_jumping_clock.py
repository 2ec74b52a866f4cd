"""The clock of the tests: a limit passes at once when nothing can come any more, and never before."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from basefs.concurrency.short_calls import ShortCalls
from basefs.concurrency.threads import BlockingCalls


def compute() -> str:
    """Work that holds the interpreter's lock again and again, much longer than the clock waits for."""
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    return "computed"


def read_slowly() -> str:
    """A read that waits for another process, as for a Glance that is slow."""
    with subprocess.Popen(["sh", "-c", "sleep 0.3; echo read"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return os.read(process.stdout.fileno(), 100).decode().strip()


async def test_what_hangs_in_a_gate_is_jumped_over(clock: trio.testing.MockClock) -> None:
    gate = threading.Event()
    with pytest.raises(trio.TooSlowError):
        await BlockingCalls("test", threads_max=1).run_within(3600, gate.wait)
    assert trio.current_time() == 3600
    gate.set()


@pytest.mark.parametrize("work", [compute, read_slowly])
async def test_a_thread_that_works_is_waited_for(clock: trio.testing.MockClock, work) -> None:
    with trio.fail_after(0.001):
        assert (await BlockingCalls("test", threads_max=1).run(work)).endswith(("computed", "read"))
        assert await ShortCalls("test", threads_max=1).run(compute) == "computed"


async def test_a_thread_that_waits_for_the_loop_is_not_at_work(clock: trio.testing.MockClock) -> None:
    with trio.fail_after(100):
        await trio.to_thread.run_sync(trio.from_thread.run, trio.sleep, 99)
    assert trio.current_time() == 99


@pytest.fixture
def no_processor_is_free() -> Iterator[None]:
    burners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for burner in burners:
        burner.kill()
        burner.wait()


async def test_a_thread_that_was_let_out_of_its_gate_is_waited_for(
    clock: trio.testing.MockClock, no_processor_is_free: None
) -> None:
    for _ in range(20):
        gate, calls = threading.Event(), BlockingCalls("test", threads_max=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.run, gate.wait)
            await trio.sleep(1)
            with trio.fail_after(0.001):
                gate.set()
                await calls.take_all_turns()
