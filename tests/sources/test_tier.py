"""Whatever a cache tier does, the bytes come, in the same call, and Glance is not blamed for it."""

import os
import threading

import pytest
import trio

from basefs import errors
from basefs.cli.check_tier import check_tier
from basefs.config.checks import cache_endpoint_problem
from basefs.sources import tier_http
from basefs.sources.access import open_glance
from basefs.sources.tier import REST_CAP_S
from tests.contract.test_image_source import PIECE, Taken
from tests.fakes import answers
from tests.fakes.certificate import make_certificate
from tests.fakes.front import MisbehavingFront
from tests.sources.access import conf_of, over_tier

DATA = os.urandom(1024 * 1024)
SIZE = len(DATA)
OFFSET, LENGTH = 200_000, 300_000


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def tier(front):
    with MisbehavingFront(upstream=front.url) as running:
        yield running


@pytest.fixture
def access_and_source(tmp_path, front, tier, nursery):
    source, access = over_tier(tmp_path, front, tier, nursery)
    yield access, source
    source.tier.close()
    access.close()


@pytest.fixture
def source(access_and_source):
    return access_and_source[1]


@pytest.fixture
def image(front):
    return front.glance.add(DATA)


async def ranged(source, image, offset=OFFSET, length=LENGTH) -> Taken:
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=offset, length=length, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(offset) == DATA[offset : offset + length]
    return taken


FAULTS = [
    [answers.status(502)],
    [answers.status(401)],
    [answers.status(403)],
    [answers.status(404)],
    [answers.status(416)],
    [answers.status(302, {"Location": "http://127.0.0.1:1/"})],
    [answers.whole_for_range()],
    [answers.whole_under_206()],
    [answers.too_short()],
    [answers.too_long()],
    [answers.content_range(f"bytes 0-{LENGTH - 1}/{SIZE}")],
    [answers.content_range(f"bytes {OFFSET}-{OFFSET + LENGTH - 1}/{SIZE + 1}")],
    [answers.content_range(None)],
    [answers.chunked()],
    [answers.unsized()],
    [answers.header("Content-Encoding", "gzip")],
    [answers.reset()],
    [answers.garbage()],
    [answers.cut(after=0)],
    [answers.cut(after=100_000)],
    [answers.cut_and_reset(after=250_000)],
]


@pytest.mark.parametrize("faults", FAULTS)
async def test_what_the_tier_does_not_give_comes_from_glance_in_the_same_call(
    faults, front, tier, access_and_source, image
):
    access, source = access_and_source
    tier.on("/file").respond(*faults)
    await ranged(source, image)
    assert (source.failovers, source.is_used) == (1, False)
    assert access.endpoints.is_closed("glance")
    asked = tier.count("/file")
    await ranged(source, image)  # the tier is left alone
    assert tier.count("/file") == asked


async def test_what_the_tier_has_delivered_is_not_asked_again(front, tier, source, image):
    tier.on("/file").respond(answers.cut(after=PIECE + 1))
    await ranged(source, image)
    assert front.requests("/file")[-1].range == (OFFSET + PIECE, OFFSET + LENGTH - 1)


async def test_a_tier_that_is_not_there_costs_one_try(tmp_path, front, nursery, image):
    with MisbehavingFront() as gone:
        pass
    source, access = over_tier(tmp_path, front, gone, nursery)
    await ranged(source, image)
    await ranged(source, image)
    assert (source.tier.requests, source.failovers) == (1, 1)
    access.close()


async def test_a_tier_that_hangs_is_given_up(front, tier, source, image, monkeypatch):
    monkeypatch.setattr(tier_http, "SILENCE_S", 0.2)
    release = threading.Event()
    tier.on("/file").respond(answers.hang(release))
    await ranged(source, image)
    release.set()
    assert not source.is_used


async def test_a_tier_that_is_back_is_used_again_after_a_trial(
    front, tier, source, image, monkeypatch, expected_warnings
):
    expected_warnings(r"the cache tier http://\S+ is not used: .*it answered 503\. Glance is asked instead")
    now = 1000.0
    monkeypatch.setattr(trio, "current_time", lambda: now)
    assert reported(source, tier) == ("unused", None)
    tier.on("/file").respond(answers.status(503))
    await ranged(source, image)
    state, error = reported(source, tier)
    assert (state, "it answered 503" in error) == ("resting", True)
    for _ in range(2):  # trials that fail; readers get their bytes from Glance beside them
        now += 2 * REST_CAP_S
        failures = source._rest.failures
        await ranged(source, image)
        await until(lambda failures=failures: source._rest.failures > failures)
        assert not source.is_used
    tier.behave()
    now += 2 * REST_CAP_S
    await ranged(source, image)
    await until(lambda: source.is_used)
    assert reported(source, tier) == ("answers", None)
    asked, failovers = tier.count("/file"), source.failovers
    await ranged(source, image)
    assert (tier.count("/file"), source.failovers) == (asked + 1, failovers)
    assert tier.requests("/file")[-1].range == (OFFSET, OFFSET + LENGTH - 1)


def reported(source, tier):
    """State and error in `basefs status`."""
    told = source.report()
    assert (told["source"], told["endpoint"]) == ("cache tier", tier.url.removeprefix("http://"))
    return told["state"], told["error"]


async def until(condition):
    with trio.fail_after(20):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_an_image_that_glance_refuses_too_says_nothing_about_the_tier(front, tier, source, image):
    with pytest.raises(errors.ImageNotFoundError):
        await ranged(source, "00000000-0000-4000-8000-000000000000")
    front.on("/file").respond(answers.status(403))
    with pytest.raises(errors.SourceForbiddenError):
        await ranged(source, image)
    assert source.is_used
    front.behave()
    await ranged(source, image)
    assert source.failovers == 0


async def test_in_an_outage_the_tier_is_not_asked(front, tier, access_and_source, image):
    access, source = access_and_source
    access.endpoints.outage.begin(errors.SourceUnavailableError("away", may_be_away=True, is_outage=True))
    access.endpoints["glance"].breaker.state = "open"
    with pytest.raises(errors.SourceUnavailableError):
        await ranged(source, image)
    assert tier.count() == 0


async def test_a_reader_that_has_enough_is_no_failure(tier, source, image):
    taken = Taken(pieces_max=1)
    await source.fetch_range(image, size=SIZE, offset=0, length=SIZE, piece_bytes=PIECE, deliver=taken)
    assert taken.joined(0) == DATA[:PIECE]
    assert source.failovers == 0


async def test_a_tier_with_other_bytes_than_glance_is_never_asked_again(front, tier, source, image, expected_warnings):
    expected_warnings(f"gave other bytes of image {image} than Glance")
    tier.on("/file").respond(answers.other_bytes())
    probe = await source.probe(image, size=SIZE, header_bytes=256 * 1024)
    assert probe.header == DATA[: 256 * 1024]
    assert not source.is_used
    assert reported(source, tier) == ("distrusted", "it gave other bytes than Glance; see the log")
    tier.behave()
    asked = tier.count()
    await ranged(source, image)
    assert (await source.probe(image, size=SIZE, header_bytes=256 * 1024)).header == DATA[: 256 * 1024]
    assert tier.count() == asked


async def test_ranges_that_glance_does_not_honour_are_not_believed_of_the_tier(front, tier, source, image):
    front.on("/file", ranged=True).respond(answers.whole_under_206())
    probe = await source.probe(image, size=SIZE, header_bytes=256 * 1024)
    assert (probe.kind, probe.header) == ("streamed", DATA[: 256 * 1024])
    assert tier.count() == 0


async def test_a_header_that_the_tier_does_not_give_comes_from_glance(front, tier, source, image):
    tier.on("/file").respond(answers.status(500))
    probe = await source.probe(image, size=SIZE, header_bytes=256 * 1024)
    assert (probe.kind, probe.header) == ("ranged", DATA[: 256 * 1024])
    assert source.failovers == 1


async def test_the_tier_is_asked_for_bytes_only_in_one_spelling(front, tier, source, image):
    await source.probe(image, size=SIZE, header_bytes=256 * 1024)
    await ranged(source, image)
    taken = Taken()
    await source.fetch_stream(image, size=SIZE, piece_bytes=PIECE, digest=None, deliver=taken)
    assert [(one.method, one.path, one.query, one.headers["range"]) for one in tier.requests()] == [
        ("GET", f"/v2/images/{image}/file", "", "bytes=0-262143"),
        ("GET", f"/v2/images/{image}/file", "", f"bytes={OFFSET}-{OFFSET + LENGTH - 1}"),
    ]


async def test_an_image_whose_bytes_were_wrong_is_read_from_glance_itself(tier, source, image):
    source.pass_by(image)
    await ranged(source, image)
    assert tier.count() == 0
    assert source.is_used


async def test_a_tier_behind_tls_is_trusted_by_the_cafile_of_glance(tmp_path, front, nursery, image):
    certfile = make_certificate(tmp_path / "server.pem")
    with MisbehavingFront(upstream=front.url, certfile=certfile) as tier:
        for lines, failovers in ((f"cafile = {certfile}\n", 0), ("", 1)):
            source, access = over_tier(tmp_path, front, tier, nursery, lines=lines)
            await ranged(source, image)
            assert source.failovers == failovers
            source.tier.close()
            access.close()


@pytest.mark.parametrize(
    ("fault", "level", "words"),
    [
        (None, "ok", "the same bytes"),
        (answers.other_bytes(), "error", "other bytes"),
        (answers.status(502), "warning", "it answered 502; images are read from Glance itself"),
    ],
)
async def test_doctor_compares_the_tier_with_glance(tmp_path, front, tier, image, fault, level, words):
    if fault:
        tier.on("/file").respond(fault)
    conf = conf_of(tmp_path, f"{front.conf_lines()}cache_endpoint = {tier.url}\n")
    access = open_glance(conf, threads_max=1)
    (finding,) = await check_tier(conf, access, image, SIZE, DATA[:4096])
    assert (finding.status, words in finding.detail) == (level, True), finding
    access.close()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (None, None),
        ("", None),
        ("http://tier:9292", None),
        ("https://tier.example.org/glance/", None),
        ("tier:9292", "must be http"),
        ("ftp://tier", "must be http"),
        ("http://", "must be http"),
        ("http://user:secret@tier", "no user"),
        ("http://tier/?x=secret", "no user"),
        ("http://tier:secret", "no URL"),
        ("http://[secret", "no URL"),
    ],
)
def test_the_endpoint_is_an_url_without_a_secret(url, problem):
    said = cache_endpoint_problem(url)
    assert said is None if problem is None else problem in said
    assert "secret" not in (said or "")
