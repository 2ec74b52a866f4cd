"""Glance answers with an error: to the list, to the header probe, to a ranged read."""

import errno
import os

import pytest

from tests.conftest import ExpectedWarnings
from tests.fakes import answers
from tests.faults.conftest import HEADER_BYTES, Site
from tests.faults.readers import errno_of, eventually, opened, pread, read_at, reader_threads

pytestmark = pytest.mark.mount

STATUSES = (401, 403, 404, 409, 429, 500, 503)
REFUSALS = (401, 403, 404)
"""Statuses that waiting does not mend."""
PART = 64 * 1024


@pytest.mark.parametrize("code", STATUSES)
def test_a_ranged_read_fails_with_eio_and_comes_again(
    code: int, site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    expected_warnings(f"image {image.image_id}.*Glance answered {code}")
    with opened(image.path) as fd:
        site.front.on(image.file_path, ranged=True).respond(answers.status(code))
        assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
        assert pread(fd, 0, PART) == image.part(0, PART), "what is here is served"
        # The log's thread may write after the read was answered.
        eventually(lambda: any(f"{code}" in record for record in site.records()))
        site.front.behave()
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
    told = [record for record in site.records() if f"{code}" in record]
    assert len(told) <= 2, told  # that the bytes do not come, and that a reader was told so
    eventually(lambda: read_at(image.path, 2 * HEADER_BYTES, PART) == image.part(2 * HEADER_BYTES, PART))


@pytest.mark.parametrize("code", STATUSES)
def test_an_image_whose_header_does_not_come_is_not_shown_until_it_does(
    code: int, site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    site.front.on(f"/{image.image_id}").respond(answers.not_found() if code == 404 else answers.status(code))
    if code in REFUSALS:
        # nova downloads the image itself then, and its user is told what Glance says.
        assert errno_of(image.path.stat) == errno.ENOENT
        eventually(lambda: f"{code}" in site.mount.log_text)
    else:
        expected_warnings(f"image {image.image_id}")
        assert errno_of(image.path.stat) == errno.EIO
    site.front.behave()
    eventually(lambda: read_at(image.path, 0, PART) == image.part(0, PART))
    assert image.path.read_bytes() == image.data


@pytest.mark.parametrize("code", STATUSES)
def test_known_images_outlive_a_list_that_fails_and_unknown_names_are_no_absent_ones(
    code: int, site: Site, expected_warnings: ExpectedWarnings
) -> None:
    known = site.add()
    assert read_at(known.path, 0, PART) == known.part(0, PART)
    new = site.add(is_new=True)
    site.front.on("/file").respond(lambda answer: answer)
    site.front.on("/v2/images").respond(answers.status(code))
    is_outage = code >= 500
    expected_warnings("Glance is away" if is_outage else "catalog cannot be refreshed, known images stay")
    expected_warnings("lookup answered EIO")
    if is_outage:
        site.may_log("read answered EIO")
    for _ in range(2):
        assert errno_of(new.path.stat) == errno.EIO, "unknown is not absent"
    if not is_outage:
        assert read_at(known.path, HEADER_BYTES, PART) == known.part(HEADER_BYTES, PART)
    assert known.path.name in os.listdir(site.mount.mountpoint)
    assert len(site.records()) <= (3 if is_outage else 2), site.records()
    site.front.behave()
    eventually(lambda: read_at(new.path, 0, PART) == new.part(0, PART))


def test_many_failing_reads_make_few_records_and_few_requests(site: Site, expected_warnings: ExpectedWarnings) -> None:
    image = site.add()
    image.path.stat()
    expected_warnings(f"image {image.image_id}")
    site.front.on(image.file_path).respond(answers.status(503))
    asked = site.front.count(image.file_path)
    offsets = range(HEADER_BYTES, 3 * HEADER_BYTES, PART)
    with reader_threads(len(offsets)) as pool:
        failures = list(pool.map(lambda offset: errno_of(lambda: read_at(image.path, offset, PART)), offsets))
    assert failures == [errno.EIO] * len(offsets)
    assert len(site.records()) <= 2, "\n".join(site.records())
    # Four tries fit into the deadline of 1 s (after 0, 0.13, 0.38 and 0.88 s at least), each of as many requests as
    # there are slots.
    assert site.front.count(image.file_path) - asked <= 4 * 8
    site.front.behave()
    eventually(lambda: read_at(image.path, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
