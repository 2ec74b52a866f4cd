"""Lists and single images through python-glanceclient: all of them, and no error but ours."""

import pytest

from basefs import errors
from basefs.sources.metadata import GlanceMetadata
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.sources.access import access_to

LISTS = "/v2/images"


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
def metadata(access):
    return GlanceMetadata(access)


async def test_all_pages_of_hidden_and_other_images_are_read(front, metadata, monkeypatch):
    monkeypatch.setattr("basefs.sources.metadata.PAGE_IMAGES", 7)
    ids = [front.glance.add(b"x", os_hidden=n % 3 == 0) for n in range(50)]
    listed = [image["id"] for image in await metadata.list_images()]
    assert sorted(listed) == sorted(ids)


async def test_only_what_changed_since_is_listed(front, metadata):
    images = [front.glance.add(b"x") for _ in range(5)]
    since = front.glance.images[images[3]]["updated_at"]
    front.glance.change(images[0], name="new")
    listed = {image["id"]: image["name"] for image in await metadata.list_images(updated_since=since)}
    assert listed == {images[0]: "new", images[3]: "image", images[4]: "image"}


async def test_only_the_fields_that_are_used_are_kept(front, metadata):
    image = front.glance.add(b"x", bulky="x" * 10_000)
    assert "bulky" not in await metadata.show_image(image)
    assert (await metadata.show_image(image))["os_hash_algo"] == "sha512"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"images": 7}',
        b'{"images": [1]}',
        b'{"images": [{}], "next": 5}',
        b"{",
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/html", None])
async def test_an_answer_that_is_no_list_is_unavailable(front, access, metadata, body, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    front.on(LISTS).respond(lambda _answer: answers.Answer(status=200, headers=headers, body=body))
    with pytest.raises(errors.SourceUnavailableError):
        await metadata.list_images()
    front.behave()
    assert await metadata.list_images() == []


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"7", b"{", b"\xff\xfe"])
@pytest.mark.parametrize("content_type", ["application/json", None])
async def test_an_answer_that_is_no_image_is_unavailable(front, metadata, body, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    front.on(LISTS).respond(lambda _answer: answers.Answer(status=200, headers=headers, body=body))
    with pytest.raises(errors.SourceUnavailableError):
        await metadata.show_image("image")


@pytest.mark.parametrize("code", [300, 400, 404, 409, 413, 418, 429, 500, 503])
@pytest.mark.parametrize("content_type", ["application/json", "text/html", "text/plain", None])
async def test_a_list_refused_in_any_way_is_unavailable_never_absent(front, metadata, code, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    front.on(LISTS).respond(lambda _answer: answers.Answer(status=code, headers=headers, body=b'{"a": 1}\xff'))
    with pytest.raises(errors.SourceUnavailableError):
        await metadata.list_images()


@pytest.mark.parametrize("code", [401, 403])
async def test_a_list_we_may_not_have_is_forbidden(front, metadata, code):
    front.on(LISTS).respond(answers.status(code))
    with pytest.raises(errors.SourceForbiddenError, match=str(code)):
        await metadata.list_images()


@pytest.mark.parametrize("path", ["/v2/schemas/image", LISTS])
@pytest.mark.parametrize(
    "fault", [answers.status(500), answers.reset(), answers.cut(50), answers.garbage(), answers.chunked()]
)
async def test_a_list_that_breaks_off_on_any_page_is_not_had(front, metadata, monkeypatch, path, fault):
    monkeypatch.setattr("basefs.sources.metadata.PAGE_IMAGES", 10)
    for _ in range(25):
        front.glance.add(b"x")
    front.on(path).after(0 if "schemas" in path else 2).respond(fault, times=1)
    if fault(answers.Answer(status=200)).is_chunked:
        assert len(await metadata.list_images()) == 25
    else:
        with pytest.raises(errors.SourceUnavailableError):
            await metadata.list_images()
        assert len(await metadata.list_images()) == 25


async def test_an_image_that_is_not_there_is_not_found(front, metadata):
    with pytest.raises(errors.ImageNotFoundError, match="nobody: Glance answered 404"):
        await metadata.show_image("nobody")


async def test_an_endless_list_ends(front, metadata, monkeypatch):
    monkeypatch.setattr("basefs.sources.metadata.IMAGES_MAX", 100)
    page = b'{"images": [{"id": "x"}, {"id": "y"}], "next": "/v2/images?again"}'
    headers = {"Content-Type": "application/json"}
    front.on(LISTS).respond(lambda _answer: answers.Answer(status=200, headers=headers, body=page))
    with pytest.raises(errors.SourceUnavailableError, match="more than 100"):
        await metadata.list_images()
