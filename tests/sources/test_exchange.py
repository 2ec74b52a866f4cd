"""Cancelling a task ends its request to Glance at once, and leaves the other requests and the pool alone."""

import threading

import pytest
import requests
import trio
import trio.testing

from basefs import errors
from basefs.concurrency.exchange import InterruptibleAdapter, run_interruptibly
from basefs.concurrency.threads import BlockingCalls
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from tests.contract.test_image_source import DATA, PIECE, SIZE, Taken
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def access(tmp_path, front):
    access = access_to(tmp_path, front.conf_lines())
    yield access
    access.close()


async def read(source, image) -> bytes:
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=taken)
    return taken.joined(0)


async def taken_by(front, requests: int) -> None:
    """Wait until the server has so many requests."""
    while front.count("/v2/images") < requests:  # noqa: ASYNC110  threads set no trio event
        await trio.sleep(0.01)


async def test_a_request_that_hangs_ends_with_its_task(front, access):
    source, image = GlanceSource(access, threads_max=2), front.glance.add(DATA)
    front.on("/file").respond(answers.hang(threading.Event()))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, source, image)
            await taken_by(front, 1)
            nursery.cancel_scope.cancel()
    front.behave()
    assert await read(source, image) == DATA


async def test_a_body_that_stops_coming_ends_with_its_task(front, access):
    source, image = GlanceSource(access, threads_max=2), front.glance.add(DATA)
    front.on("/file").respond(answers.slow(10.0))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, source, image)
            await taken_by(front, 1)
            await trio.sleep(0.2)  # into the body; before it the test above
            nursery.cancel_scope.cancel()


async def test_a_list_that_hangs_ends_with_its_task(front, access):
    front.on("/v2/images").respond(answers.hang(threading.Event()))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(GlanceMetadata(access).list_images)
            await taken_by(front, 1)
            nursery.cancel_scope.cancel()


async def test_the_cancelled_are_told_so_by_a_plain_cancelled(front, access):
    source, image = GlanceSource(access, threads_max=1), front.glance.add(DATA)
    front.on("/file").respond(answers.hang(threading.Event()))
    seen = []

    async def told() -> None:
        try:
            await read(source, image)
        except BaseException as exc:
            seen.append(type(exc))
            raise

    async with trio.open_nursery() as nursery:
        for _ in range(3):  # one in the thread, two waiting for it
            nursery.start_soon(told)
        await taken_by(front, 1)
        nursery.cancel_scope.cancel()
    assert seen == [trio.Cancelled] * 3


async def test_errors_and_bugs_come_out_as_they_are(front, access):
    source = GlanceSource(access, threads_max=2)
    with pytest.raises(errors.ImageNotFoundError):
        await read(source, "nobody")
    image = front.glance.add(DATA)

    def buggy(offset: int, piece: memoryview) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=buggy)


async def test_a_connection_that_was_given_back_is_its_next_users_alone(front):
    """A call goes on when its last request was answered: its cancellation then must not meet who has the connection."""
    session, threads = requests.Session(), BlockingCalls("test", threads_max=2)
    session.mount("http://", InterruptibleAdapter(pool_maxsize=1))
    url, answered, go_on, release = f"{front.url}/v2/images", threading.Event(), threading.Event(), threading.Event()

    def ask_and_work_on() -> None:
        assert session.get(url).ok
        answered.set()
        go_on.wait(60)

    got, cancelled = [], trio.CancelScope()

    async def work() -> None:
        with cancelled:
            await run_interruptibly(threads, ask_and_work_on)

    async def neighbour() -> None:
        got.append((await run_interruptibly(threads, session.get, url)).ok)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.to_thread.run_sync(answered.wait)
        front.on("/v2/images").respond(answers.hang(release))
        nursery.start_soon(neighbour)
        await taken_by(front, 2)
        cancelled.cancel()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        release.set()
    assert got == [True]
    assert front.connections == 1
    session.close()


async def test_a_neighbours_request_is_not_disturbed(front, access):
    source, image = GlanceSource(access, threads_max=8), front.glance.add(DATA)
    for _ in range(10):
        got = []

        async def keep(into=got) -> None:
            into.append(await read(source, image))

        async with trio.open_nursery() as stays, trio.open_nursery() as goes:
            for _ in range(3):
                stays.start_soon(keep)
                goes.start_soon(read, source, image)
            await trio.sleep(0.002)
            goes.cancel_scope.cancel()
        assert got == [DATA] * 3
