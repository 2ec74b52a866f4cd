"""Every way in which Glance, or what stands before it, can answer wrongly ends in the right error and no wrong byte."""

import hashlib
import os
import threading

import pytest
import trio

from basefs import errors
from basefs.sources import access as access_module
from basefs.sources import bodies as bodies_module
from basefs.sources import range_answers
from basefs.sources import session as session_module
from basefs.sources.base import Digest
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from basefs.sources.session import INACTIVITY_TIMEOUT_S
from tests.contract.test_image_source import Taken
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to

DATA = os.urandom(1024 * 1024)
SIZE = len(DATA)
PIECE = 64 * 1024
OFFSET, LENGTH = 200_000, 300_000


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def access(tmp_path, front):
    access = access_to(tmp_path, front.conf_lines())
    yield access
    access.close()


@pytest.fixture
def source(access):
    return GlanceSource(access, threads_max=8)


@pytest.fixture
def image(front):
    return front.glance.add(DATA)


async def ranged(source, image) -> Taken:
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=OFFSET, length=LENGTH, piece_bytes=PIECE, deliver=taken)
    return taken


async def streamed(source, image, digest=None) -> Taken:
    taken = Taken()
    await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=digest, deliver=taken)
    return taken


async def assert_right_again(front, source, image):
    """After a fault the next request is served rightly, over whatever connections are left."""
    front.behave()
    for _ in range(2):
        assert (await ranged(source, image)).joined(OFFSET) == DATA[OFFSET : OFFSET + LENGTH]


RANGE_FAULTS = [
    (
        [answers.status(400, body=b"<h1>400</h1>not <b>supported</b>")],
        errors.RangeNotHonouredError,
        r"400 \(400 not supp",
    ),
    ([answers.status(416)], errors.RangeNotHonouredError, "416"),
    ([answers.whole_for_range()], errors.RangeNotHonouredError, "200"),
    ([answers.whole_under_206()], errors.RangeNotHonouredError, "1048576 bytes under a 206"),
    ([answers.whole_under_206(), answers.chunked()], errors.RangeNotHonouredError, "more than these"),
    ([answers.whole_under_206(), answers.unsized()], errors.RangeNotHonouredError, "more than these"),
    ([answers.too_long()], errors.RangeNotHonouredError, "300001 bytes under a 206"),
    ([answers.too_long(), answers.chunked()], errors.RangeNotHonouredError, "more than these"),
    ([answers.content_range(None)], errors.RangeNotHonouredError, "without a usable Content-Range"),
    ([answers.content_range("bytes 0-299999/1048576")], errors.RangeNotHonouredError, "bytes 0 to 299999 came"),
    ([answers.content_range("bytes 200000-499998/1048576")], errors.RangeNotHonouredError, "to 499998 came"),
    ([answers.content_range("pieces of eight")], errors.RangeNotHonouredError, "pieces of eight"),
    ([answers.content_range("bytes 200000-499999/2000000")], errors.SourceCorruptError, "2000000 bytes"),
    ([answers.too_short()], errors.SourceCorruptError, "299999 bytes"),
    ([answers.header("Content-Encoding", "gzip")], errors.SourceCorruptError, "encoded"),
    ([answers.status(204)], errors.SourceCorruptError, "no data"),
    ([answers.status(201)], errors.SourceCorruptError, "201"),
    ([answers.status(401)], errors.SourceForbiddenError, "401"),
    ([answers.status(403, body=b"has been deactivated")], errors.SourceForbiddenError, "has been deactivated"),
    ([answers.status(404)], errors.SourceUnavailableError, "something before Glance answered 404"),
    ([answers.not_found()], errors.SourceUnavailableError, "404.*but it knows the image"),
    *[
        ([answers.status(code)], errors.SourceUnavailableError, str(code))
        for code in (302, 405, 408, 409, 410, 429, 500, 502, 503, 504)
    ],
    ([answers.too_short(), answers.chunked()], errors.SourceUnavailableError, "299999 of 300000"),
    ([answers.too_short(), answers.unsized()], errors.SourceUnavailableError, "299999 of 300000"),
    ([answers.cut(0)], errors.SourceUnavailableError, "the body ended after"),
    ([answers.cut(100_000)], errors.SourceUnavailableError, "the body ended after"),
    ([answers.cut(299_999)], errors.SourceUnavailableError, "the body ended after"),
    ([answers.chunked(), answers.cut(100_000)], errors.SourceUnavailableError, "."),
    ([answers.cut_and_reset(100_000)], errors.SourceUnavailableError, "reset"),
    ([answers.reset()], errors.SourceUnavailableError, "reset"),
    ([answers.garbage()], errors.SourceUnavailableError, "."),
    ([answers.garbage(b"HTTP/1.1 206 Partial\r\nContent-Length: -5\r\n\r\n")], errors.RangeNotHonouredError, "."),
    ([answers.garbage(b"HTTP/1.1 200 OK\r\nContent-Le")], errors.RangeNotHonouredError, "200"),
    ([answers.garbage(b"HTTP/1.1 503 Never\r\n" + b"X: y\r\n" * 500 + b"\r\n")], errors.SourceUnavailableError, "."),
]


@pytest.mark.parametrize(("faults", "error", "text"), RANGE_FAULTS)
async def test_a_wrong_answer_to_a_range_is_the_right_error_and_no_wrong_byte(
    front, source, image, faults, error, text
):
    front.on("/file").respond(*faults)
    taken = Taken()
    with pytest.raises(error, match=text) as caught:
        await source.fetch_range(image, size=SIZE, offset=OFFSET, length=LENGTH, piece_bytes=PIECE, deliver=taken)
    assert type(caught.value) is error
    got = taken.joined(OFFSET)
    assert got == DATA[OFFSET : OFFSET + len(got)]
    assert len(got) % PIECE == 0
    assert front.count("/file") == (2 if error is errors.RangeNotHonouredError else 1)
    await assert_right_again(front, source, image)


@pytest.mark.parametrize("how", [[answers.chunked()], [answers.unsized()], [answers.slow(3_000_000)], []])
async def test_a_right_answer_in_an_odd_form_is_taken(front, source, image, how):
    if how:
        front.on("/file").respond(*how)
    assert (await ranged(source, image)).joined(OFFSET) == DATA[OFFSET : OFFSET + LENGTH]
    digest = Digest(algorithm="sha512", value=hashlib.sha512(DATA).hexdigest())
    assert (await streamed(source, image, digest)).joined(0) == DATA


async def test_a_206_of_untold_length_is_counted_before_anything_of_it_is_delivered(front, source, image):
    front.on("/file").respond(answers.whole_under_206(), answers.chunked())
    taken = Taken()
    with pytest.raises(errors.RangeNotHonouredError):
        await source.fetch_range(image, size=SIZE, offset=0, length=LENGTH, piece_bytes=PIECE, deliver=taken)
    assert taken.pieces == []


async def test_a_206_of_untold_length_is_not_kept_in_memory_without_bound(front, source, monkeypatch):
    monkeypatch.setattr(range_answers, "UNSIZED_BYTES_MAX", SIZE - 1)
    image = front.glance.add(DATA)
    front.on("/file").respond(answers.chunked())
    with pytest.raises(errors.RangeNotHonouredError, match="does not tell the length"):
        await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=Taken())


STREAM_FAULTS = [
    ([answers.status(400)], errors.SourceUnavailableError, "400"),
    ([answers.status(204)], errors.SourceCorruptError, "no data"),
    ([answers.status(403)], errors.SourceForbiddenError, "403"),
    ([answers.status(404)], errors.SourceUnavailableError, "something before Glance answered 404"),
    ([answers.not_found()], errors.SourceUnavailableError, "404.*but it knows the image"),
    ([answers.status(500)], errors.SourceUnavailableError, "500"),
    ([answers.too_short()], errors.SourceCorruptError, "1048575 bytes"),
    ([answers.too_long()], errors.SourceCorruptError, "1048577 bytes"),
    ([answers.too_long(), answers.chunked()], errors.SourceCorruptError, "more than the 1048576"),
    ([answers.too_short(), answers.chunked()], errors.SourceUnavailableError, "1048575 of 1048576"),
    ([answers.too_short(), answers.unsized()], errors.SourceUnavailableError, "1048575 of 1048576"),
    ([answers.cut(500_000)], errors.SourceUnavailableError, "the body ended after"),
    ([answers.cut_and_reset(500_000)], errors.SourceUnavailableError, "reset"),
    ([answers.reset()], errors.SourceUnavailableError, "reset"),
    ([answers.other_bytes()], errors.SourceHashError, "sha512"),
]


@pytest.mark.parametrize(("faults", "error", "text"), STREAM_FAULTS)
async def test_a_wrong_answer_to_a_plain_get_is_the_right_error(front, source, image, faults, error, text):
    front.on("/file").respond(*faults)
    digest = Digest(algorithm="sha512", value=hashlib.sha512(DATA).hexdigest())
    with pytest.raises(error, match=text) as caught:
        await streamed(source, image, digest)
    assert type(caught.value) is error
    await assert_right_again(front, source, image)


async def test_a_hash_of_an_algorithm_nobody_knows_is_not_checked(source, image):
    digest = Digest(algorithm="rot13", value="00")
    assert (await streamed(source, image, digest)).joined(0) == DATA


@pytest.mark.parametrize(
    ("header", "expected"),
    [("7", 7.0), ("0", 0.0), ("99999999", 3600.0), ("9" * 400, 3600.0), ("soon", None), (None, None), ("-4", 0.0)],
)
@pytest.mark.parametrize("code", [429, 503])
async def test_retry_after_is_handed_on_within_bounds(front, source, image, code, header, expected):
    front.on("/file").respond(answers.status(code, {} if header is None else {"Retry-After": header}))
    with pytest.raises(errors.SourceUnavailableError) as caught:
        await ranged(source, image)
    assert caught.value.retry_after_s == expected


async def test_retry_after_may_be_a_date(front, source, image):
    for text, low, high in [("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0), ("Fri, 31 Dec 2100 23:59:59 GMT", 3600, 3600)]:
        front.behave()
        front.on("/file").respond(answers.status(503, {"Retry-After": text}))
        with pytest.raises(errors.SourceUnavailableError) as caught:
            await ranged(source, image)
        assert low <= caught.value.retry_after_s <= high


# --- probe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([answers.status(400, body=b"Getting images randomly from this store is not supported.")], 2),
        ([answers.status(416)], 2),
        ([answers.whole_for_range()], 1),
        ([answers.whole_for_range(), answers.chunked()], 1),
        ([answers.whole_under_206()], 2),
        ([answers.content_range("bytes 1-65536/1048576")], 2),
        ([answers.too_long(), answers.chunked()], 2),
    ],
)
async def test_a_store_without_ranges_is_probed_by_the_start_of_a_plain_get(front, source, image, faults, requests):
    front.on("/file", ranged=True).respond(*faults)
    probe = await source.probe(image, size=SIZE, header_bytes=65536)
    assert (probe.kind, probe.header) == ("streamed", DATA[:65536])
    assert image in probe.reason
    # The one odd range more is the confirmation.
    assert (source.requests, front.count("/file")) == (requests + 1, requests + 1)


async def test_the_reason_of_a_streamed_image_is_glances_own(front, source, image):
    front.on("/file", ranged=True).respond(answers.status(400, body=b"<p>Getting images randomly is not supported"))
    probe = await source.probe(image, size=SIZE, header_bytes=65536)
    assert probe.reason.endswith("Glance answered 400 (Getting images randomly is not supported)")


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ([answers.status(503)], errors.SourceUnavailableError),
        ([answers.status(403)], errors.SourceForbiddenError),
        ([answers.status(404)], errors.SourceUnavailableError),
        ([answers.status(204)], errors.SourceCorruptError),
        ([answers.whole_for_range(), answers.too_long()], errors.SourceCorruptError),
        ([answers.cut(1000)], errors.SourceUnavailableError),
        ([answers.content_range("bytes 0-65535/77777")], errors.SourceCorruptError),
    ],
)
async def test_a_probe_that_fails_says_nothing_of_ranges(front, source, image, faults, error):
    front.on("/file").respond(*faults)
    with pytest.raises(error) as caught:
        await source.probe(image, size=SIZE, header_bytes=65536)
    assert type(caught.value) is error


async def test_an_image_smaller_in_the_store_than_in_its_metadata_is_corrupt(source, image):
    with pytest.raises(errors.SourceCorruptError, match="1048576 bytes, the image's metadata say 1048577"):
        await source.probe(image, size=SIZE + 1, header_bytes=65536)


# --- connections ----------------------------------------------------------------------------------------


async def test_a_glance_that_hangs_is_given_up_after_the_inactivity_timeout(front, source, image, monkeypatch):
    monkeypatch.setattr(session_module, "INACTIVITY_TIMEOUT_S", 0.3)
    front.on("/file").respond(answers.hang(threading.Event()))
    with pytest.raises(errors.SourceUnavailableError, match="timed out"):
        await ranged(source, image)
    front.behave()
    front.on("/file").respond(answers.slow(1000))
    with trio.fail_after(30):
        # Slow is not silent: 300,000 bytes would take five minutes, and nobody gives up meanwhile.
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + 1.0
            await source.fetch_range(image, size=SIZE, offset=0, length=LENGTH, piece_bytes=500, deliver=Taken())
    assert scope.cancelled_caught


async def test_the_operators_timeout_wins(front, tmp_path, image):
    access = access_to(tmp_path, front.conf_lines() + "timeout = 1\n")
    assert access.session.timeout == 1.0
    front.on("/file").respond(answers.hang(threading.Event()))
    began = trio.current_time()
    with pytest.raises(errors.SourceUnavailableError, match="timed out"):
        await ranged(GlanceSource(access, threads_max=2), image)
    assert 0.9 < trio.current_time() - began < INACTIVITY_TIMEOUT_S
    access.close()


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        ("http://127.0.0.1:1", "refused"),  # tcpmux, which nobody runs
        ("http://glance.invalid:9292", "gaierror|resol"),
        ("https://127.0.0.1:{port}", "SSL"),
        ("ftp://127.0.0.1", "InvalidSchema"),
        ("nonsense", "nvalid"),
        ("http://[::bad", "."),
        ("http://user:hush@127.0.0.1:1", "refused"),
    ],
)
async def test_an_endpoint_that_is_none_is_unavailable_and_no_secret_is_told(tmp_path, front, endpoint, text):
    endpoint = endpoint.replace("{port}", front.url.rsplit(":", 1)[1])
    access = access_to(tmp_path, f"[glance]\nauth_type = none\nendpoint_override = {endpoint}\n")
    with pytest.raises(errors.SourceUnavailableError, match=text) as caught:
        await ranged(GlanceSource(access, threads_max=2), "some-image")
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert access.contact.reachable is False
    assert access.contact.error == str(caught.value)


async def test_the_connections_are_kept_and_enough_for_all_threads(front, source, image, caplog):
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ranged, source, image)
    assert front.connections <= 8
    assert "pool is full" not in caplog.text


async def test_contact_says_whether_glance_answers(front, access, source, image):
    assert access.contact.reachable is None
    await ranged(source, image)
    assert (access.contact.reachable, access.contact.error) == (True, None)
    front.on("/v2/images").respond(answers.not_found())
    with pytest.raises(errors.ImageNotFoundError):
        await ranged(source, image)
    assert (access.contact.reachable, access.contact.error) == (True, None)
    front.behave()
    front.on("/file").respond(answers.status(500))
    with pytest.raises(errors.SourceUnavailableError):
        await ranged(source, image)
    assert access.contact.reachable is True
    assert "500" in access.contact.error
    front.behave()
    front.on("/file").respond(answers.status(503))
    with pytest.raises(errors.SourceUnavailableError):
        await ranged(source, image)
    assert access.contact.reachable is False
    assert "503" in access.contact.error
    front.behave()
    await ranged(source, image)
    assert access.contact.reachable is True
    assert "503" in access.contact.error
    assert access.contact.error_at is not None


async def test_one_odd_answer_makes_no_image_a_streamed_one(front, source, image):
    for faults in ([answers.whole_for_range()], [answers.status(400)], [answers.content_range(None)]):
        front.on("/file").respond(*faults, times=1)
        assert (await source.probe(image, size=SIZE, header_bytes=65536)).kind == "ranged"
        front.on("/file").respond(*faults, times=1)
        assert (await ranged(source, image)).joined(OFFSET) == DATA[OFFSET : OFFSET + LENGTH]


async def test_only_glances_own_404_to_the_metadata_makes_an_image_absent(front, access, source, image):
    front.on("/v2/images").respond(answers.status(404))
    for call in (ranged(source, image), GlanceMetadata(access).show_image(image)):
        with pytest.raises(errors.SourceUnavailableError, match="something before Glance"):
            await call
    front.behave()
    front.on("/file").respond(answers.not_found())
    with pytest.raises(errors.SourceUnavailableError, match="knows the image"):
        await ranged(source, image)
    front.behave()
    front.glance.delete(image)
    for call in (ranged(source, image), streamed(source, image), GlanceMetadata(access).show_image(image)):
        with pytest.raises(errors.ImageNotFoundError):
            await call


async def test_a_body_that_drips_is_given_up(front, source, image, monkeypatch):
    monkeypatch.setattr(bodies_module, "PACE_S", 0.5)
    front.on("/file").respond(answers.slow(1000), times=1)
    with trio.fail_after(60), pytest.raises(errors.SourceUnavailableError, match="bytes in"):
        await ranged(source, image)
    assert (await ranged(source, image)).joined(OFFSET) == DATA[OFFSET : OFFSET + LENGTH]


async def test_silence_inside_a_body_is_cut_short(front, source, image, monkeypatch):
    monkeypatch.setattr(access_module, "BODY_SILENCE_S", 0.5)
    front.on("/file").respond(answers.slow(1), times=1)  # the first byte, then a second of nothing
    with trio.fail_after(60), pytest.raises(errors.SourceUnavailableError):
        await source.fetch_range(image, size=SIZE, offset=0, length=LENGTH, piece_bytes=1, deliver=Taken())
