"""Where Glance says that it keeps an image."""

import json

import pytest

from basefs import errors
from basefs.sources.locations import GlanceLocations
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to

VOLUME = "cinder://fast/6d54cb90-a5d1-40d8-9cb2-c6adf43a02af"
SECRET = "https://user:Zq7secret@store/image"
ID = {"X-Openstack-Request-Id": "req-0"}


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def locations(tmp_path, front):
    access = access_to(tmp_path, front.conf_lines())
    yield GlanceLocations(access)
    access.close()


def says(body: object) -> answers.Fault:
    return answers.status(200, {"Content-Type": "application/json", **ID}, json.dumps(body).encode())


async def test_the_api_for_services_is_asked_first(front, locations):
    image = front.glance.add(b"bytes")
    front.on("/locations").respond(says([{"url": "file:///x", "metadata": {}}, {"url": VOLUME}])).instead()
    assert await locations.locations(image) == ("file:///x", VOLUME)
    assert front.count(f"/v2/images/{image}") == 1


@pytest.mark.parametrize("status", [400, 403, 404, 405])
async def test_who_may_not_ask_it_looks_into_the_image(front, locations, status):
    image = front.glance.add(b"bytes")
    front.on("/locations").respond(answers.status(status, ID)).instead()
    for record, expected in (
        ({"locations": [{"url": VOLUME}], "direct_url": "file:///x"}, (VOLUME,)),
        ({"direct_url": VOLUME}, (VOLUME,)),
        ({"locations": []}, ()),
        ({}, ()),
        ({"locations": "x", "direct_url": 7}, ()),
    ):
        rule = front.on(f"/v2/images/{image}", "GET").after(0).respond(says(record)).instead()
        assert await locations.locations(image) == expected
        rule.times = 0


async def test_an_image_that_is_gone_and_a_glance_that_is_away_are_told_apart(front, locations):
    with pytest.raises(errors.ImageNotFoundError):
        await locations.locations("00000000-0000-4000-8000-000000000000")
    front.on().respond(answers.status(503))
    with pytest.raises(errors.SourceUnavailableError):
        await locations.locations("00000000-0000-4000-8000-000000000000")


@pytest.mark.parametrize("body", [b"[", b'"x"', b"\xff", b"[" * 100_000])
async def test_an_answer_that_is_none_of_glance_is_unavailable_and_shows_nothing(front, locations, body):
    image = front.glance.add(b"bytes")
    front.on("/locations").respond(answers.status(404, ID)).instead()
    front.on(f"/v2/images/{image}").respond(answers.status(200, ID, body)).instead()
    with pytest.raises(errors.SourceUnavailableError, match="not one of Glance"):
        await locations.locations(image)


async def test_a_password_in_a_location_is_not_logged(front, locations, caplog):
    caplog.set_level("DEBUG")
    image = front.glance.add(b"bytes")
    front.on("/locations").respond(says([{"url": SECRET}])).instead()
    assert await locations.locations(image) == (SECRET,)
    assert "Zq7secret" not in caplog.text
