"""S3 and Swift on web servers of objects: whatever they answer, only bytes of the object that was opened are taken."""

import uuid

import pytest

from basefs import errors
from basefs.sources import s3_store
from tests.contract.object_store_worlds import ServerS3World, ServerSwiftWorld
from tests.contract.test_image_source import Taken
from tools.secrets_used import FAKE_PASSWORD

IMAGE = str(uuid.uuid4())
DATA = bytes(range(256)) * 512


@pytest.fixture(params=[ServerS3World, ServerSwiftWorld])
async def world(request):
    made = request.param()
    yield made
    made.heal()
    await made.close()


@pytest.fixture
async def s3():
    made = ServerS3World()
    yield made
    await made.close()


async def opened(world):
    return await world.store.open(world.put(IMAGE, DATA), image_id=IMAGE, size=len(DATA))


async def read(found, offset=0, length=1000):
    taken = Taken()
    await found.fetch_range(offset=offset, length=length, piece_bytes=400, deliver=taken)
    return taken.joined(offset)


async def test_each_request_carries_the_tag_of_what_was_opened_and_no_key(world):
    assert await read(await opened(world)) == DATA[:1000]
    (head, _, _), (get, _, headers) = world.server.requests[-2:]
    assert (head, get) == ("HEAD", "GET")
    assert headers["If-Match"].startswith('"')
    assert headers["Range"] == "bytes=0-999"
    assert all(FAKE_PASSWORD not in value for _, _, sent in world.server.requests[-2:] for value in sent.values())


@pytest.mark.parametrize("header", ["X-Object-Manifest", "X-Static-Large-Object"])
async def test_a_large_object_is_known_by_the_tag_of_each_answer(header):
    world = ServerSwiftWorld()
    # radosgw tells a tag made of the segments' and compares If-Match with another.
    world.server.extra_headers = {header: "True", "ETag": '"of the segments"'}
    found = await opened(world)
    assert await read(found) == DATA[:1000]
    assert "If-Match" not in world.server.requests[-1][2]
    world.server.extra_headers["ETag"] = '"of other segments"'
    with pytest.raises(errors.StoreGoneError, match="replaced"):
        await read(found)
    await world.close()


async def test_a_server_that_does_not_heed_the_condition_gives_no_other_byte(world):
    world.server.without_tag = True
    world.server.extra_headers = {"ETag": 'W/"1"'}
    found = await opened(world)
    assert await read(found) == DATA[:1000]
    world.server.extra_headers = {"ETag": 'W/"2"'}
    with pytest.raises(errors.StoreGoneError, match="replaced"):
        await read(found)


async def test_without_tags_the_date_tells_one_object_from_another(world):
    world.server.without_tag = True
    world.server.extra_headers = {"Last-Modified": "Fri, 27 Nov 2026 20:00:00 GMT"}
    found = await opened(world)
    assert await read(found) == DATA[:1000]
    world.server.extra_headers = {"Last-Modified": "Fri, 27 Nov 2026 20:00:01 GMT"}
    with pytest.raises(errors.StoreGoneError, match="replaced"):
        await read(found)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, errors.RangeNotHonouredError),
        (301, errors.SourceUnavailableError),
        (400, errors.SourceForbiddenError),
        (403, errors.SourceForbiddenError),
        (404, errors.StoreGoneError),
        (416, errors.StoreGoneError),
        (429, errors.SourceUnavailableError),
        (503, errors.SourceUnavailableError),
    ],
)
async def test_other_answers_mean_what_they_say(world, status, error):
    found = await opened(world)
    special = world.server.special
    world.server.special = lambda path, headers: (
        special(path, headers)
        or ((status, {"Location": "http://169.254.169.254/", "Retry-After": "7"}) if "Range" in headers else None)
    )
    count = len(world.server.requests)
    with pytest.raises(error) as caught:
        await read(found)
    assert len(world.server.requests) == count + 1, "no redirect is followed"
    if status in (429, 503):
        assert caught.value.retry_after_s == 7
        assert caught.value.may_be_away is (status == 503)


async def test_an_error_page_of_s3_is_told_by_code_and_message_only(s3):
    found = await opened(s3)
    page = (
        b"<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><AWSAccessKeyId>READER</AWSAccessKeyId></Error>"
    )
    s3.server.refusal = (403, page)
    s3.forbid()
    with pytest.raises(errors.SourceForbiddenError, match=r"403 \(SignatureDoesNotMatch: no\)") as caught:
        await read(found)
    assert "READER" not in str(caught.value)
    s3.heal()


async def test_the_bucket_may_stand_in_the_host_name():
    world = ServerS3World(is_virtual=True)
    assert world.store._url("images", IMAGE) == f"http://images.{world.server.host}/{IMAGE}"
    await world.close()


async def test_other_spellings_of_the_service_are_taken_if_they_are_listed():
    world = ServerS3World(location_hosts=("s3.internal:7480",))
    assert world.store.refusal(IMAGE, f"s3+https://S3.internal:7480/site-1/{IMAGE}") is None
    assert world.store.refusal(IMAGE, f"s3://s3.internal/site-1/{IMAGE}") is not None
    await world.close()


async def test_a_token_that_ended_is_replaced_once():
    world = ServerSwiftWorld()
    found = await opened(world)
    world.token = "revoked meanwhile"
    assert await read(found) == DATA[:1000]
    assert world.tokens == 2
    await world.close()


async def test_an_account_that_is_not_ours_is_not_read():
    world = ServerSwiftWorld()
    world.put(IMAGE, DATA)
    ours = f"swift+http://{world.server.host}/v1/AUTH_account/images/{IMAGE}"
    found = await world.store.open(ours, image_id=IMAGE, size=len(DATA))
    assert await read(found) == DATA[:1000]
    with pytest.raises(errors.SourceForbiddenError, match="another account"):
        await world.store.open(ours.replace("account", "other"), image_id=IMAGE, size=len(DATA))
    await world.close()


async def test_without_botocore_every_location_is_refused(monkeypatch, s3):
    monkeypatch.setattr(s3_store, "_signer", lambda _settings: None)
    store = s3_store.S3Store(s3.settings, threads_max=1)
    assert store.missing == store.refusal(IMAGE, s3.put(IMAGE, DATA)) == s3_store.MISSING_LIBRARY
    await store.close()
