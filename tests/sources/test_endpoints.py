"""Outages of Glance and Keystone: when they begin, what goes on meanwhile, and that they end at once."""

import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from keystoneauth1.identity.base import BaseIdentityPlugin

from basefs import errors
from basefs.concurrency.exchange import EndpointName
from basefs.core.breaker import PROBE_CAP_S
from basefs.sources import access as access_module
from basefs.sources import session as session_module
from basefs.sources import tokens as tokens_module
from basefs.sources.access import PROBED_IMAGE, GlanceAccess
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from tests.conftest import ExpectedWarnings
from tests.contract.test_image_source import DATA, PIECE, SIZE, Taken
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.keystone import FakeKeystone
from tests.sources.access import access_to

LIMIT_S = 60.0
"""Of a loaded machine; nothing here depends on it."""
PROBES: dict[EndpointName, tuple[str, str]] = {"glance": (PROBED_IMAGE, "GET"), "keystone": ("/auth/tokens", "POST")}


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
async def watched(tmp_path: Path, front: MisbehavingFront) -> AsyncIterator[GlanceAccess]:
    access = access_to(tmp_path, front.conf_lines())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.endpoints.watch)
        yield access
        nursery.cancel_scope.cancel()
    access.close()


async def read(access: GlanceAccess, image: str) -> bytes:
    taken = Taken()
    source = GlanceSource(access, threads_max=8)
    await source.fetch_range(image, size=SIZE, offset=0, length=PIECE, piece_bytes=PIECE, deliver=taken)
    return taken.joined(0)


async def outage_is(access: GlanceAccess, *, on: bool) -> None:
    """Return once it is so."""
    with trio.fail_after(LIMIT_S):
        while access.endpoints.outage.is_on != on:
            await access.endpoints.outage.next_change(math.inf)


async def ends_with_the_next_probe(
    front: MisbehavingFront, access: GlanceAccess, name: EndpointName = "glance"
) -> None:
    """Heal the front. The first probe that it answers ends the outage, and is due within the longest pause."""
    path, method = PROBES[name]
    front.behave()
    probes = front.count(path, method)
    assert access.endpoints[name].breaker.probe_at <= trio.current_time() + PROBE_CAP_S
    await outage_is(access, on=False)
    # None, if that was under way which came after the healing and before the count.
    assert front.count(path, method) <= probes + 1


@pytest.mark.parametrize("how", [answers.reset(), answers.status(503), answers.status(500), answers.garbage()])
async def test_an_outage_is_found_out_told_once_and_over_at_once(
    front, watched, expected_warnings: ExpectedWarnings, caplog: pytest.LogCaptureFixture, how
) -> None:
    caplog.set_level(logging.INFO, logger="basefs")
    image = front.glance.add(DATA)
    front.on().respond(how)
    with pytest.raises(errors.SourceUnavailableError):
        await read(watched, image)
    expected_warnings("Glance is away")
    await outage_is(watched, on=True)
    assert watched.endpoints.report()["glance"]["state"] == "away"
    asked = front.count("/file")
    for _ in range(50):
        with pytest.raises(errors.SourceUnavailableError, match="Glance is away") as caught:
            await read(watched, image)
        assert caught.value.is_outage
    assert front.count("/file") == asked, "no ordinary request goes out"
    await ends_with_the_next_probe(front, watched)
    assert await read(watched, image) == DATA[:PIECE]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert watched.endpoints.report()["glance"]["state"] == "answers"


async def test_an_image_that_its_store_does_not_deliver_is_no_outage(front, watched) -> None:
    broken, good = front.glance.add(DATA), front.glance.add(DATA)
    front.on(f"/{broken}/file").respond(answers.status(503))
    for _ in range(20):
        with pytest.raises(errors.SourceUnavailableError):
            await read(watched, broken)
        assert await read(watched, good) == DATA[:PIECE]
    assert not watched.endpoints.outage.is_on


@pytest.mark.parametrize("code", [400, 403, 404, 409, 429])
async def test_an_answer_of_any_kind_is_no_outage(front, watched, code: int) -> None:
    image = front.glance.add(DATA)
    front.on("/file").respond(answers.status(code))
    for _ in range(3):
        with pytest.raises(errors.SourceError):
            await read(watched, image)
    assert watched.endpoints.report()["glance"] == {"state": "answers", "since": None, "error": None}


async def test_a_glance_that_hangs_is_found_out_and_frees_its_threads(
    front, watched, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing else ends a request that hangs, so it is the silence that was noticed, and the outage that freed them.
    monkeypatch.setattr(access_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(access_module, "ANSWER_LIMIT_S", math.inf)
    monkeypatch.setattr(session_module, "INACTIVITY_TIMEOUT_S", 1e6)
    expected_warnings("Glance is away: no answer to a probe")
    image, release = front.glance.add(DATA), threading.Event()
    front.on().respond(answers.hang(release))

    async def reader() -> None:
        with pytest.raises(errors.SourceUnavailableError):
            await read(watched, image)

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as readers:
            for _ in range(8):
                readers.start_soon(reader)
    assert watched.endpoints.outage.is_on
    release.set()
    await ends_with_the_next_probe(front, watched)
    assert await read(watched, image) == DATA[:PIECE]


# --- Keystone ------------------------------------------------------------------------------------------


async def test_bytes_go_on_without_keystone_while_the_token_is_good_and_stop_when_it_ends(
    front, tmp_path: Path, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    keystone, aged_s = FakeKeystone(front, life_s=3600.0), 0.0
    monkeypatch.setattr(tokens_module, "monotonic", lambda: time.monotonic() + aged_s)
    image = front.glance.add(DATA)
    access = access_to(tmp_path, keystone.conf_lines())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.endpoints.watch)
        assert await read(access, image) == DATA[:PIECE]
        expected_warnings("Keystone is away")
        front.on("/identity").respond(answers.reset())
        aged_s = 3600.0 - BaseIdentityPlugin.MIN_TOKEN_LIFE_SECONDS / 2  # to be renewed, and good still
        with pytest.raises(errors.SourceUnavailableError):  # the one that finds it out
            await read(access, image)
        with trio.fail_after(LIMIT_S):
            while access.endpoints.report()["keystone"]["state"] != "away":
                await access.endpoints["keystone"].changed.wait()
        assert await read(access, image) == DATA[:PIECE]
        assert not access.endpoints.outage.is_on
        keystone.revoke()
        with pytest.raises(errors.SourceUnavailableError):
            await read(access, image)
        with pytest.raises(errors.SourceUnavailableError, match="Keystone is away") as caught:
            await GlanceMetadata(access).show_image(image)
        assert caught.value.is_outage
        await ends_with_the_next_probe(front, access, "keystone")
        assert await read(access, image) == DATA[:PIECE]
        nursery.cancel_scope.cancel()
    access.close()
