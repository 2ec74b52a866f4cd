"""A body that is not what was asked for: the reader gets right bytes or an error, never others."""

import errno
import random
import threading

import pytest

from tests.conftest import ExpectedWarnings
from tests.fakes import answers
from tests.faults.conftest import HEADER_BYTES, MIB, Site
from tests.faults.readers import errno_of, eventually, opened, pread, read_at, reader_threads

pytestmark = pytest.mark.mount

PART = 64 * 1024

TRIED_AGAIN = {
    "cut": (answers.cut(after=100_000),),
    "cut and reset": (answers.cut_and_reset(after=100_000),),
    "cut without a length": (answers.chunked(), answers.cut(after=100_000)),
    "reset before the answer": (answers.reset(),),
    "no HTTP": (answers.garbage(),),
    "too short": (answers.too_short(by=5),),
    "length too short": (answers.states_length(1000),),
    "no data (204)": (answers.status(204),),
    "another size": (answers.content_range(f"bytes {HEADER_BYTES}-{HEADER_BYTES + 262143}/9999999"),),
}
READ_AS_A_STREAM = {
    "200": (answers.whole_for_range(),),
    "400": (answers.status(400),),
    "416": (answers.status(416),),
    "all under a 206": (answers.whole_under_206(),),
    "too long": (answers.too_long(by=7),),
    "too long without a length": (answers.chunked(), answers.too_long(by=7)),
    "no Content-Range": (answers.content_range(None),),
    "other bytes": (answers.content_range("bytes 0-262143/3145729"),),
    "no range at all": (answers.content_range("pages 1-2/3"),),
}


@pytest.mark.parametrize("faults", TRIED_AGAIN.values(), ids=TRIED_AGAIN.keys())
def test_what_is_wrong_for_a_moment_is_fetched_again(faults: tuple[answers.Fault, ...], site: Site) -> None:
    image = site.add()
    site.may_log("read answered EIO")
    site.may_log(f"image {image.image_id}")
    with opened(image.path) as fd:
        site.front.on(image.file_path).respond(*faults, times=2)
        eventually(lambda: pread(fd, HEADER_BYTES, 4 * PART) == image.part(HEADER_BYTES, 4 * PART))
    assert image.path.read_bytes() == image.data
    assert len(site.records()) <= 2, site.records()


@pytest.mark.parametrize("name", ["cut", "too short", "another size"])
def test_what_stays_wrong_is_eio_until_it_is_right(name: str, site: Site, expected_warnings: ExpectedWarnings) -> None:
    image = site.add()
    expected_warnings(f"image {image.image_id}")
    with opened(image.path) as fd:
        site.front.on(image.file_path).respond(*TRIED_AGAIN[name])
        offset = 2 * MIB  # whose chunks lie behind every cut
        assert errno_of(lambda: pread(fd, offset, 8 * PART)) == errno.EIO
        site.front.behave()
        eventually(lambda: pread(fd, offset, 8 * PART) == image.part(offset, 8 * PART))
    assert image.path.read_bytes() == image.data


@pytest.mark.parametrize("faults", READ_AS_A_STREAM.values(), ids=READ_AS_A_STREAM.keys())
def test_a_range_that_is_not_honoured_any_more_is_read_as_a_stream(
    faults: tuple[answers.Fault, ...], site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    with opened(image.path) as fd:
        assert pread(fd, 0, PART) == image.part(0, PART)
        expected_warnings(f"image {image.image_id}: read as one stream from now on")
        site.front.on(image.file_path, ranged=True).respond(*faults)
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
    assert image.path.read_bytes() == image.data
    assert len(site.records()) == 1, site.records()


@pytest.mark.parametrize("faults", READ_AS_A_STREAM.values(), ids=READ_AS_A_STREAM.keys())
def test_a_store_that_never_honoured_ranges_is_read_as_a_stream(faults: tuple[answers.Fault, ...], site: Site) -> None:
    image = site.add()
    site.front.on(image.file_path, ranged=True).respond(*faults)
    eventually(lambda: read_at(image.path, 2 * MIB, PART) == image.part(2 * MIB, PART))
    assert image.path.read_bytes() == image.data
    assert sum("range" not in request.headers for request in site.front.requests(image.file_path)) <= 2


def test_a_stream_with_wrong_bytes_is_not_kept(site: Site, expected_warnings: ExpectedWarnings) -> None:
    image = site.add()
    expected_warnings(f"image {image.image_id}.*sha512")
    site.front.on(image.file_path, ranged=True).respond(answers.status(400))
    assert read_at(image.path, 0, PART) == image.part(0, PART)
    site.front.on(image.file_path, ranged=False).respond(answers.other_bytes(), times=1)
    site.may_log("did not come within 1 s")
    with opened(image.path) as fd:
        errno_of(lambda: pread(fd, 2 * MIB, PART))  # while it runs nobody can know
        eventually(lambda: "sha512" in site.mount.log_text)
        eventually(lambda: pread(fd, 2 * MIB, PART) == image.part(2 * MIB, PART))
        assert pread(fd, 0, HEADER_BYTES) == image.part(0, HEADER_BYTES)
    eventually(lambda: read_at(image.path, 0, len(image.data)) == image.data)


def test_a_slow_body_is_waited_for_and_wakes_each_reader_with_its_own_bytes(
    site: Site, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("read answered EIO.*did not come within 1 s")
    image = site.add(random.Random("slow").randbytes(2 * MIB))
    with opened(image.path) as fd:
        site.front.on(image.file_path).respond(answers.slow(bytes_per_s=MIB / 2))
        with reader_threads(2) as pool:
            # The request of 1 MiB takes two seconds, the deadline is one: who wants its start is served long before.
            late = pool.submit(errno_of, lambda: pread(fd, HEADER_BYTES, MIB))
            eventually(lambda: site.front.count(image.file_path) == 2)
            assert pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART)
            assert site.front.count(image.file_path) == 2
            assert late.result() == errno.EIO
        site.front.behave()
        eventually(lambda: pread(fd, HEADER_BYTES, MIB) == image.part(HEADER_BYTES, MIB))


def test_a_glance_that_hangs_is_eio_in_time_and_the_bytes_come_once_it_answers(
    site: Site, expected_warnings: ExpectedWarnings
) -> None:
    image = site.add()
    expected_warnings("read answered EIO.*within 1 s")
    release = threading.Event()
    with opened(image.path) as fd:
        site.front.on(image.file_path).respond(answers.hang(release))
        try:
            assert errno_of(lambda: pread(fd, HEADER_BYTES, PART)) == errno.EIO
            assert pread(fd, 0, PART) == image.part(0, PART)
        finally:
            release.set()
        eventually(lambda: pread(fd, HEADER_BYTES, PART) == image.part(HEADER_BYTES, PART))
    assert len(site.records()) == 1, site.records()
