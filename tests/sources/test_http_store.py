"""A web server behind a location: whatever it answers, and wherever a location would lead."""

import logging
import os
import socket

import pytest

from basefs import errors
from basefs.core.addresses import AllowedHosts
from basefs.sources.http_store import HttpStore
from tests.contract.test_image_source import Taken
from tests.fakes import answers
from tests.fakes.certificate import make_certificate
from tests.fakes.front import MisbehavingFront
from tests.fakes.memory_web import MemoryWeb

DATA = os.urandom(500_000)
SIZE = len(DATA)
PIECE = 64 * 1024
IMAGE = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def web():
    return MemoryWeb()


@pytest.fixture
def front(web):
    with MisbehavingFront() as running:
        running.extra_routes["/"] = web
        yield running


def store_for(*hosts, cafile=None, insecure=False):
    return HttpStore(AllowedHosts(hosts), cafile=cafile, insecure=insecure, threads_max=4)


@pytest.fixture
async def store(front):
    made = store_for(front.url.partition("//")[2])
    yield made
    await made.close()


@pytest.fixture
def location(front, web):
    return front.url + web.put(f"/{IMAGE}", DATA)


async def read(found, offset=0, length=SIZE):
    taken = Taken()
    await found.fetch_range(offset=offset, length=length, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(offset) == DATA[offset : offset + length]


async def opened(store, location):
    return await store.open(location, image_id=IMAGE, size=SIZE)


async def test_what_is_sent_is_a_range_and_nothing_that_tells_who_asks(store, location, front, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    front.on().respond(answers.header("Set-Cookie", "a=b; Path=/"))
    await read(await opened(store, location), 100, 1000)
    for request in front.requests():
        known = {"host", "accept-encoding", "accept", "user-agent", "range", "if-match"}
        assert set(request.headers) <= known
        assert request.headers["accept-encoding"] == "identity"
    assert [one.headers["range"] for one in front.requests()] == ["bytes=0-0", "bytes=100-1099"]


async def test_a_connection_is_used_again(store, location, front):
    found = await opened(store, location)
    for offset in range(0, 100_000, 10_000):
        await read(found, offset, 10_000)
    assert front.connections == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed_nowhere(store, location, front, status):
    front.on().respond(answers.status(status, {"Location": f"{front.url}/elsewhere"}))
    with pytest.raises(errors.SourceForbiddenError, match="redirects are not followed"):
        await opened(store, location)
    assert front.count() == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answers.status(404), errors.StoreGoneError),
        (answers.status(410), errors.StoreGoneError),
        (answers.status(412), errors.StoreGoneError),
        (answers.status(401), errors.SourceForbiddenError),
        (answers.status(403), errors.SourceForbiddenError),
        (answers.status(400), errors.SourceUnavailableError),
        (answers.status(429, {"Retry-After": "7"}), errors.SourceUnavailableError),
        (answers.status(503), errors.SourceUnavailableError),
        (answers.status(416), errors.SourceCorruptError),
        (answers.whole_for_range(), errors.RangeNotHonouredError),
        (answers.whole_under_206(), errors.RangeNotHonouredError),
        (answers.content_range(None), errors.RangeNotHonouredError),
        (answers.content_range("bytes 5-6/500000"), errors.RangeNotHonouredError),
        (answers.content_range("bytes 1000-1999/500001"), errors.SourceCorruptError),
        (answers.too_short(), errors.SourceCorruptError),
        (answers.too_long(), errors.RangeNotHonouredError),
        (answers.header("Content-Encoding", "gzip"), errors.SourceCorruptError),
        (answers.header("ETag", '"other"'), errors.StoreGoneError),
        (answers.garbage(), errors.SourceUnavailableError),
        (answers.reset(), errors.SourceUnavailableError),
        (answers.cut(after=10), errors.SourceUnavailableError),
    ],
)
async def test_a_wrong_answer_is_an_error_and_delivers_nothing(store, location, front, fault, error):
    found, taken = await opened(store, location), Taken()
    front.on().respond(fault)
    with pytest.raises(error) as caught:
        await found.fetch_range(offset=1000, length=1000, piece_bytes=PIECE, deliver=taken)
    assert type(caught.value) is error
    assert taken.pieces == []
    front.behave()
    await read(found)


async def test_a_server_that_answers_no_ranges_or_tells_no_size_is_not_opened(store, location, front):
    front.on().respond(answers.whole_for_range(), times=1)
    with pytest.raises(errors.RangeNotHonouredError):
        await opened(store, location)
    front.on().respond(answers.content_range("bytes 0-0/*"), times=1)
    with pytest.raises(errors.RangeNotHonouredError, match="does not tell the size"):
        await opened(store, location)
    await opened(store, location)


@pytest.mark.parametrize(("etag", "weak", "date"), [(True, False, True), (True, True, False), (False, False, True)])
async def test_an_object_that_was_replaced_is_noticed_by_whatever_the_server_tells(
    store, location, front, web, etag, weak, date
):
    web.gives_etag, web.is_weak, web.gives_date = etag, weak, date
    found = await opened(store, location)
    await read(found)
    web.put(f"/{IMAGE}", os.urandom(SIZE))
    if not etag:
        front.on().respond(answers.header("Last-Modified", "Sat, 28 Nov 2026 08:00:00 GMT"))
    with pytest.raises(errors.StoreGoneError):
        await read(found)


async def test_a_name_that_leads_to_an_address_nobody_allowed_is_not_asked(front, web):
    port = front.url.rpartition(":")[2]
    web.put(f"/{IMAGE}", DATA)
    for host in ("localhost", "2130706433", "0x7f000001", "127.1"):
        store = store_for(f"{host}:{port}")
        location = f"http://{host}:{port}/{IMAGE}"
        assert store.refusal(IMAGE, location) is None
        with pytest.raises(errors.SourceForbiddenError, match="is a loopback address"):
            await opened(store, location)
        await store.close()
    assert (front.count(), front.connections) == (0, 0)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("169.254.169.254", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("169.254.7.7", "link-local"),
        ("::1", "loopback"),
        ("0.0.0.0", "unspecified"),
    ],
)
async def test_what_a_name_resolves_to_is_looked_at_when_a_connection_is_made(
    store, location, front, monkeypatch, address, why
):
    """Also when it resolved to a good address before: rebinding. One bad address among good ones is one too many."""
    port = int(front.url.rpartition(":")[2])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (one, port)) for one in ("127.0.0.1", address)]
    )
    with pytest.raises(errors.SourceForbiddenError, match=why):
        await opened(store, location)
    assert front.connections == 0


async def test_an_allowed_name_leads_to_an_allowed_address(front, web):
    port = front.url.rpartition(":")[2]
    store = store_for(f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}")
    await read(await opened(store, f"http://localhost:{port}{web.put(f'/{IMAGE}', DATA)}"))
    await store.close()


async def test_a_name_that_does_not_resolve_is_away(caplog):
    store = store_for("no-such-host.invalid")
    with pytest.raises(errors.SourceUnavailableError) as caught:
        await opened(store, "http://no-such-host.invalid/x?key=SECRET")
    assert caught.value.may_be_away
    assert "SECRET" not in str(caught.value) + caplog.text
    await store.close()


async def test_no_part_of_a_location_that_may_be_a_key_is_told(store, front, web, caplog):
    caplog.set_level(logging.DEBUG)
    web.put("/SECRETPATH", DATA)
    for fault in (
        answers.status(404),
        answers.status(302, {"Location": "/SECRET"}),
        answers.status(503),
        answers.reset(),
    ):
        front.behave()
        front.on().respond(fault)
        with pytest.raises(errors.SourceError) as caught:
            await opened(store, f"{front.url}/SECRETPATH?signature=SECRETKEY")
        assert "SECRET" not in str(caught.value)
    assert "SECRETKEY" not in caplog.text


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
async def test_tls_is_checked_with_the_operators_authority(web, tmp_path):
    certfile = make_certificate(tmp_path / "server.pem")
    with MisbehavingFront(certfile=certfile) as front:
        front.extra_routes["/"] = web
        host, location = front.url.partition("//")[2], front.url + web.put(f"/{IMAGE}", DATA)
        for options, is_good in (({}, False), ({"cafile": str(certfile)}, True), ({"insecure": True}, True)):
            store = store_for(host, **options)
            if is_good:
                await read(await opened(store, location))
            else:
                with pytest.raises(errors.SourceUnavailableError):
                    await opened(store, location)
            await store.close()
