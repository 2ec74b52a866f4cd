import functools
import json
import socket
import stat
import threading
from urllib.parse import quote

import pytest
import trio
import trio.testing

from basefs import errors
from basefs.control import server
from basefs.control.client import ControlClient
from basefs.control.listener import ControlListener
from basefs.control.server import serve_control, status_of
from tests.control.fake_view import SIZE, FakeView


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "control.sock"


@pytest.fixture
async def view(path, nursery):
    view = FakeView()
    await nursery.start(serve_control, view, ControlListener(path))
    return view


async def call(path, method, *args, **keywords):
    """One command of a client, in a thread, as another process would do it."""

    return await trio.to_thread.run_sync(functools.partial(getattr(ControlClient(path), method), *args, **keywords))


async def test_status_and_images_come_as_the_view_tells_them(view, path):
    assert await call(path, "status") == view.status()
    assert await call(path, "images") == view.images()
    assert await call(path, "image", "one") == view.image("one")


async def test_commands_about_images_wait_until_a_new_node_knows_some(view, path, monkeypatch):
    known = trio.Event()
    monkeypatch.setattr(view, "wait_known", known.wait)
    answers = []

    async def ask() -> None:
        answers.append(await call(path, "image", "one"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        assert await call(path, "status") == view.status(), "which does not wait"
        assert answers == []
        known.set()
    assert answers == [view.image("one")]


async def test_a_name_with_a_slash_is_a_name(view, path):
    assert (await call(path, "image", "a/b"))["id"] == "a/b"
    assert await call(path, "evict", "a/b") == {"evicted_bytes": 4096}


@pytest.mark.parametrize("ref", ["one", "a/b"])
async def test_the_map_of_an_image_comes_in_the_cells_that_were_asked_for(view, path, ref):
    got = await call(path, "image_map", ref, cells_max=700)
    assert got == await view.image_map(ref, cells_max=700)


async def test_the_progress_of_a_drain_comes_to_its_end(view, path):
    steps = await trio.to_thread.run_sync(lambda: list(ControlClient(path).drain()))
    assert steps[-1] == {"state": "ended"}


@pytest.mark.parametrize("cells_max", [0, -1, 16385, 10**30, "", "1_0", "x", "\u0661"])
async def test_a_map_of_no_cells_or_of_too_many_is_refused(view, path, cells_max):
    with pytest.raises(errors.ControlError, match="is no number from 1 to 16384"):
        await call(path, "image_map", "one", cells_max=quote(str(cells_max)))


@pytest.mark.parametrize(
    ("method", "ref", "text"),
    [
        ("image", "none", "no image 'none'"),
        ("image", "twice", "twice fits 1 and 2"),
        ("evict", "open", "image open is open"),
        ("start_warm", "none", "no image 'none'"),
    ],
)
async def test_an_error_of_the_service_reaches_the_command_in_its_words(view, path, method, ref, text):
    with pytest.raises(errors.ControlError, match=text):
        await call(path, method, ref)


async def test_an_argument_that_is_no_text_is_no_image(view, path):
    with pytest.raises(errors.ControlError, match="no image"):
        await call(path, "image", b"\xff.img".decode(errors="surrogateescape"))
    with pytest.raises(errors.ControlError, match="no image"):
        await call(path, "image_map", "\udcff", cells_max=8)


async def test_traces_come_and_go(view, path):
    assert await call(path, "traces") == await view.traces()
    told = await call(path, "trace", "one")
    assert told == await view.trace("one")
    data = json.dumps(told["trace"]).encode()
    assert (await call(path, "put_trace", "one", data))["ranges"] == 2
    assert view.imported == [("one", data)]


@pytest.mark.parametrize(
    ("ref", "data", "text"),
    [
        ("one", b"{", "not a boot trace of image one: byte 1: not JSON"),
        ("none", b"{}", "no image 'none'"),
        ("one", b" " * 70_000, r"longer than a boot trace may be \(65536 bytes\)"),
        ("one", b" " * 3_000_000, r"longer than a boot trace may be|ended the connection"),
    ],
)
async def test_what_is_no_trace_is_refused_in_one_sentence(view, path, ref, data, text):
    with pytest.raises(errors.ControlError, match=text):
        await call(path, "put_trace", ref, data)
    assert view.imported == []


async def test_a_trace_that_does_not_come_is_given_up(view, path, monkeypatch):
    monkeypatch.setattr(server, "BODY_DEADLINE_S", 0.1)
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(b"PUT /v1/traces/one HTTP/1.1\r\nhost: b\r\ncontent-length: 1000\r\n\r\n{")
        with trio.fail_after(10):
            assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 400")


async def test_the_boot_of_an_image_is_warmed_to_its_end(view, path):
    async def states(ref):
        return await trio.to_thread.run_sync(lambda: [step["state"] for step in ControlClient(path).warm_boot(ref)])

    assert await states("one") == ["warming", "complete"]
    with pytest.raises(errors.ControlError, match="no boot trace"):
        await states("a/b")


async def test_a_bug_in_the_service_is_a_500_and_the_server_lives_on(view, path, expected_warnings):
    expected_warnings("basefs.control.http")
    with pytest.raises(errors.ControlError, match="HTTP 500"):
        await call(path, "evict", "bug")
    assert await call(path, "status") == view.status()


def test_the_status_says_which_kind_of_error_it_was():
    assert status_of(errors.ImageNotFoundError("")) == 404
    assert status_of(errors.AmbiguousImageError("")) == 409
    assert status_of(errors.ImageBusyError("")) == 409
    assert status_of(errors.BadTraceError("")) == 400
    assert status_of(errors.SourceForbiddenError("")) == 503
    assert status_of(errors.CacheError("")) == 500


async def test_no_wait_hands_the_warming_over(view, path):
    assert (await call(path, "start_warm", "one"))["cached_bytes"] == 500
    assert view.kept == ["one"]
    assert view.holds == 0


async def test_wait_streams_the_progress_to_its_end(view, path):
    for step in (200, 700, SIZE):
        view.steps_send.send_nowait(step)
    progress = await trio.to_thread.run_sync(_warm_all, path, "one")
    assert [(item["cached_bytes"], item["state"]) for item in progress] == [
        (0, "warming"),
        (200, "warming"),
        (700, "warming"),
        (SIZE, "complete"),
    ]
    assert view.holds == 0


def _warm_all(path, ref):
    return list(ControlClient(path).warm(ref))


async def test_progress_is_told_while_the_warming_goes_on(view, path):
    def first_of_warm():
        progress = ControlClient(path).warm("one")
        first = next(progress)
        trio.from_thread.run_sync(view.steps_send.send_nowait, SIZE)
        return [first, *progress]

    items = await trio.to_thread.run_sync(first_of_warm)
    assert [item["cached_bytes"] for item in items] == [0, SIZE]


async def test_a_client_that_goes_away_ends_its_wish(view, path):
    def leave():
        progress = ControlClient(path).warm("one")
        assert next(progress)["state"] == "warming"
        progress.close()

    await trio.to_thread.run_sync(leave)
    with trio.fail_after(10):
        await view.released.wait()
    assert view.holds == 0


async def test_an_error_before_the_first_progress_is_the_answer(view, path):
    with pytest.raises(errors.ControlError, match="Glance is away"):
        await trio.to_thread.run_sync(_warm_all, path, "away")


async def test_an_error_later_is_a_last_line(view, path):
    view.steps_send.send_nowait(300)
    view.steps_send.send_nowait(errors.SourceCorruptError("the image hashes wrongly"))
    last = (await trio.to_thread.run_sync(_warm_all, path, "one"))[-1]
    assert (last["state"], last["error"], last["cached_bytes"]) == ("failed", "the image hashes wrongly", 300)


async def test_too_many_commands_are_told_to_come_back(autojump_clock):
    limited = server._Bounded(_never, requests_max=1)
    sent = []

    async def send(message):
        sent.append(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(limited, {"type": "http"}, None, send)
        await trio.testing.wait_all_tasks_blocked()
        await limited({"type": "http"}, None, send)
        nursery.cancel_scope.cancel()
    assert sent[0]["status"] == 503
    assert limited._requests == 0


async def _never(scope, receive, send):
    await trio.sleep_forever()


async def test_a_request_s_body_is_not_waited_for(view, path):
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(b"POST /v1/images/one/evict HTTP/1.1\r\nhost: b\r\ncontent-length: 1000000000000\r\n\r\n")
        with trio.fail_after(10):
            assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200")


async def test_only_the_owner_may_use_the_socket(view, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


async def test_the_socket_is_gone_after_the_service(path):
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, FakeView(), ControlListener(path))
        assert path.is_socket()
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_warming_under_way_does_not_hold_up_the_end(path):
    view = FakeView()
    with trio.fail_after(10):
        async with trio.open_nursery() as client_nursery, trio.open_nursery() as nursery:
            await nursery.start(serve_control, view, ControlListener(path))
            started = trio.Event()
            client_nursery.start_soon(functools.partial(_watch, path, started))
            await started.wait()
            nursery.cancel_scope.cancel()
    assert view.holds == 0


async def _watch(path, started):
    def watch():
        for _ in ControlClient(path).warm("one"):
            trio.from_thread.run_sync(started.set)

    await trio.to_thread.run_sync(watch)  # the stream ends without a last word: `image warm` calls that a failure


async def test_a_dead_server_s_socket_file_is_replaced(path, nursery):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    await nursery.start(serve_control, FakeView(), ControlListener(path))
    assert (await call(path, "status"))["state"] == "serving"


async def test_a_live_server_s_socket_is_left_alone(view, path):
    with pytest.raises(errors.ControlError, match="another basefs answers"):
        await serve_control(FakeView(), ControlListener(path))
    assert (await call(path, "status"))["state"] == "serving"


async def test_a_file_that_is_no_socket_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(errors.ControlError, match="no socket"):
        await serve_control(FakeView(), ControlListener(path))
    assert path.read_text() == "precious"


async def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ControlError, match="cannot make the control socket"):
        await serve_control(FakeView(), ControlListener(tmp_path / "file" / "control.sock"))


def test_without_a_socket_the_client_says_how_to_start(path):
    with pytest.raises(errors.ControlError, match=r"not running.*basefs mount"):
        ControlClient(path).status()


def test_a_dead_server_is_told_from_one_that_never_was(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(errors.ControlError, match="nobody answers"):
        ControlClient(path).status()


def test_a_server_that_hangs_is_given_up(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(errors.ControlError, match=r"does not answer.*within 0.2 s"):
            ControlClient(path, answer_deadline_s=0.2).status()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", b"hello\r\n\r\n", b""])
def test_a_stranger_s_answer_is_an_error(path, answer):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        stranger = threading.Thread(target=serve)
        stranger.start()
        try:
            with pytest.raises(errors.ControlError):
                ControlClient(path).status()
        finally:
            stranger.join()


def test_the_view_of_the_service_has_every_method():
    from basefs.control.api import ServiceView
    from basefs.service.view import View

    methods = [name for name in vars(ServiceView) if not name.startswith("_")]
    assert methods
    assert [name for name in methods if not callable(getattr(View, name, None))] == []
