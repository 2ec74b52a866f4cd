"""Tokens are renewed before they expire and once on a 401; what is wrong with auth is said, but never the secret."""

import logging

import pytest
import trio

from basefs import errors
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from tests.contract.test_image_source import DATA, PIECE, SIZE, Taken
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.fakes.keystone import FakeKeystone
from tests.sources.access import access_to
from tools.secrets_used import FAKE_TOKEN_PREFIX, SECRET


@pytest.fixture
def front():
    with MisbehavingFront() as running:
        yield running


@pytest.fixture
def keystone(front):
    return FakeKeystone(front)


async def read(source, image, offset=0) -> bytes:
    taken = Taken()
    await source.fetch_range(image, size=SIZE, offset=offset, length=PIECE, piece_bytes=PIECE, deliver=taken)
    return taken.joined(offset)


async def test_one_token_serves_all_requests_while_it_is_good(front, keystone, tmp_path):
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    for n in range(5):
        assert await read(source, image, n) == DATA[n : n + PIECE]
    await GlanceMetadata(access).show_image(image)
    assert keystone.issued == [f"{FAKE_TOKEN_PREFIX}1"]
    access.close()


async def test_a_token_is_renewed_before_it_expires(front, keystone, tmp_path):
    keystone.life_s = 25  # keystoneauth renews 30 s ahead: every request finds the token about to expire
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    for _ in range(3):
        await read(source, image)
    assert len(keystone.issued) >= 3
    sent = [request.headers["x-auth-token"] for request in front.requests("/file")]
    assert len(sent) == len(set(sent)) == 3
    access.close()


async def test_a_401_gets_one_new_token_and_one_more_try(front, keystone, tmp_path):
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    await read(source, image)
    keystone.revoke()
    assert await read(source, image) == DATA[:PIECE]
    assert keystone.issued == [f"{FAKE_TOKEN_PREFIX}{n}" for n in (1, 2)]
    assert front.count("/file") == 3
    keystone.revoke()
    assert (await GlanceMetadata(access).show_image(image))["id"] == image
    assert len(keystone.issued) == 3
    access.close()


@pytest.mark.parametrize("is_keystone_away", [False, True])
async def test_an_answer_of_401_does_not_keep_its_connection(front, keystone, tmp_path, is_keystone_away):
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    await read(source, image)
    keystone.revoke()
    if is_keystone_away:
        front.on("/identity").respond(answers.reset())
        with pytest.raises(errors.SourceUnavailableError) as caught:
            await read(source, image)
        assert caught.value.may_be_away
    else:
        await read(source, image)
    access.close()
    with trio.fail_after(60):
        while front.open_connections:  # noqa: ASYNC110  the front's threads set no trio event
            await trio.sleep(0.01)


async def test_a_401_to_a_fresh_token_is_forbidden_and_not_asked_again(front, keystone, tmp_path):
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    front.on("/v2/images").respond(answers.status(401))
    with pytest.raises(errors.SourceForbiddenError, match="401"):
        await read(source, image)
    assert front.count("/file") == 2
    assert access.contact.reachable is True
    with pytest.raises(errors.SourceForbiddenError, match="401"):
        await GlanceMetadata(access).list_images()
    access.close()


async def test_a_wrong_password_is_forbidden_and_stays_secret(front, keystone, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    access = access_to(tmp_path, keystone.conf_lines(password="hush-hush"))
    for call in (access.identity, GlanceMetadata(access).list_images):
        with pytest.raises(errors.SourceForbiddenError, match="requires authentication") as caught:
            await call()
        assert "hush" not in str(caught.value)
    assert "hush" not in caplog.text
    access.close()


async def test_tokens_and_passwords_are_in_no_log(front, keystone, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    access = access_to(tmp_path, keystone.conf_lines())
    source, image = GlanceSource(access, threads_max=4), front.glance.add(DATA)
    await access.identity()
    await read(source, image)
    await GlanceMetadata(access).list_images()
    assert keystone.issued
    assert not SECRET.search(caplog.text.encode())
    access.close()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"region_name": "Elsewhere"}, errors.SourceUnavailableError, "no fitting image endpoint"),
        ({"service_type": "compute"}, errors.SourceUnavailableError, "no fitting image endpoint"),
        ({"valid_interfaces": "admin"}, errors.SourceUnavailableError, "no fitting image endpoint"),
        ({"auth_url": "http://127.0.0.1:1/v3"}, errors.SourceUnavailableError, "refused"),
    ],
)
async def test_what_cannot_be_found_is_unavailable(front, keystone, tmp_path, changes, error, text):
    access = access_to(tmp_path, keystone.conf_lines(**changes))
    with pytest.raises(error, match=text):
        await GlanceMetadata(access).list_images()
    with pytest.raises(error, match=text):
        await read(GlanceSource(access, threads_max=1), "image")
    with pytest.raises(error, match=text):
        await access.identity()
    assert access.contact.reachable is False
    access.close()


@pytest.mark.parametrize("code", [400, 404, 429, 500, 503])
async def test_a_keystone_in_trouble_never_makes_an_image_absent(front, keystone, tmp_path, code):
    access = access_to(tmp_path, keystone.conf_lines())
    front.on("/identity").respond(answers.status(code))
    for call in (GlanceMetadata(access).show_image, lambda image: read(GlanceSource(access, threads_max=1), image)):
        with pytest.raises(errors.SourceUnavailableError):
            await call("image")
    access.close()


async def test_who_we_are_is_told(front, keystone, tmp_path):
    access = access_to(tmp_path, keystone.conf_lines())
    who = await access.identity()
    assert (who.user_id, who.user_name, who.project_id, who.project_name) == ("u-1", "basefs", "p-1", "service")
    assert who.roles == ("reader", "service")
    assert (who.endpoint, who.auth_type) == (front.url, "password")
    assert access.contact.reachable is None
    access.close()


@pytest.mark.parametrize(
    "lines",
    [
        "auth_type = none\nendpoint_override = {url}\n",
        "auth_type = none\nendpoint_override = {url}/v2/\n",
        "auth_type = none\nendpoint = {url}\n",
        "auth_type = admin_token\nendpoint = {url}\ntoken = good\n",
        "auth_type = admin_token\nendpoint_override = {url}/v2\ntoken = good\n",
    ],
)
async def test_plugins_without_a_keystone_need_an_endpoint_only(front, tmp_path, lines):
    if "token" in lines:
        front.tokens = {"good"}
    access = access_to(tmp_path, "[glance]\n" + lines.format(url=front.url))
    image = front.glance.add(DATA)
    assert await read(GlanceSource(access, threads_max=1), image) == DATA[:PIECE]
    assert [found["id"] for found in await GlanceMetadata(access).list_images()] == [image]
    who = await access.identity()
    assert (who.endpoint, who.user_id) == (front.url, None)
    access.close()


@pytest.mark.keystone
@pytest.mark.glance
@pytest.mark.parametrize("auth", ["password", "v3applicationcredential"])
async def test_a_real_keystone_renews_a_token_of_seconds(keystone_rig, tmp_path, auth):
    """Tokens live 34 s and are renewed 30 s ahead: reads over 9 s need three, and none fails."""
    lines = keystone_rig.conf_lines()
    if auth == "v3applicationcredential":
        key, secret = keystone_rig.application_credential()
        lines = (
            f"[glance]\nauth_type = v3applicationcredential\nauth_url = {keystone_rig.keystone_url}\n"
            f"application_credential_id = {key}\napplication_credential_secret = {secret}\nregion_name = RegionOne\n"
        )
    access = access_to(tmp_path, lines)
    source, image = GlanceSource(access, threads_max=2), keystone_rig.upload(DATA, f"renewed-{auth}")
    tokens = set()
    with trio.fail_after(60):
        while len(tokens) < 3:
            assert await read(source, image) == DATA[:PIECE]
            tokens.add(access.session.get_token())
            await trio.sleep(0.5)  # real tokens age in real time
    who = await access.identity()
    assert who.user_name == "basefs"
    assert who.roles
    access.close()
