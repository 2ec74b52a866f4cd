"""Glance, or what stands before it, lies once in the middle of a boot: the guest never learns of it."""

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LOG_LINE
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.faults.conftest import HEADER_BYTES, MIB
from tests.faults.readers import eventually, opened, pread, reader_threads
from tools.mount import BasefsMount, base_name

pytestmark = pytest.mark.mount

PART = 64 * 1024
IMAGE_BYTES = 6 * MIB
MOMENTS = (0, 4)
"""Which ranged request of the boot is answered wrongly."""
NEVER = threading.Event()

LIES: dict[str, tuple[answers.Fault, ...]] = {
    "cut": (answers.cut(after=30_000),),
    "cut and reset": (answers.cut_and_reset(after=30_000),),
    "cut in chunks": (answers.chunked(), answers.cut(after=30_000)),
    "reset before the answer": (answers.reset(),),
    "no HTTP": (answers.garbage(),),
    "half a head": (answers.garbage(b"HTTP/1.1 206 Partial\r\nContent-Le"),),
    "too short": (answers.too_short(by=5),),
    "too long": (answers.too_long(by=5),),
    "a length too short": (answers.states_length(1000),),
    "a length too long": (answers.states_length(10_000_000),),
    "200 and all": (answers.whole_for_range(),),
    "206 and all": (answers.whole_under_206(),),
    "no Content-Range": (answers.content_range(None),),
    "another place": (answers.content_range(f"bytes 0-65535/{IMAGE_BYTES}"),),
    "another size": (answers.content_range("bytes 1048576-2097151/77"),),
    "gzip": (answers.header("Content-Encoding", "gzip"),),
    "a page with 200": (answers.status(200, body=b"<html>Please log in</html>"),),
    "a page with 206": (answers.status(206, body=b"<html>Please log in</html>"),),
    "a redirect": (answers.status(302, {"Location": "http://127.0.0.1:1/elsewhere"}),),
    "a redirect to nowhere": (answers.status(301),),
    "a proxy's 404": (answers.status(404),),
    **{str(code): (answers.status(code),) for code in (204, 400, 405, 408, 409, 410, 416, 429, 500, 502, 503, 504)},
    "503, come back in a second": (answers.status(503, {"Retry-After": "1"}),),
    "a byte a second": (answers.slow(1),),
    "silence inside the body": (answers.slow(1), answers.cut(after=1_000_000)),
    "no answer": (answers.hang(NEVER),),
}


@pytest.fixture(scope="module")
def boots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MisbehavingFront, BasefsMount]]:
    """A mount whose readers are as patient as guests."""
    with MisbehavingFront() as front:
        data = random.Random(3).randbytes(IMAGE_BYTES)
        for _ in range(len(LIES) * len(MOMENTS)):
            front.glance.add(data)
        options = {"other_io_deadline_s": 120.0, "lookup_deadline_s": 60.0}
        with BasefsMount(tmp_path_factory.mktemp("boots"), front.conf_lines(), options) as mount:
            status = mount.mountpoint / ".basefs" / "status.json"
            eventually(lambda: json.loads(status.read_text())["images"] >= len(front.glance.images))
            yield front, mount


def boot(path: Path, data: bytes) -> None:
    """Reads as a guest makes them: one at a time, here and there, each compared."""
    places = random.Random(path.name).sample(range(HEADER_BYTES // PART, IMAGE_BYTES // PART), 40)
    with opened(path) as fd:
        for place in places:
            offset = place * PART
            assert pread(fd, offset, PART) == data[offset : offset + PART], f"wrong bytes at {offset} of {path.name}"
        assert pread(fd, 0, IMAGE_BYTES) == data


def test_no_lie_at_any_moment_of_a_boot_reaches_a_guest(boots: tuple[MisbehavingFront, BasefsMount]) -> None:
    """All lies side by side, each to an image of its own; the slowest takes as long as a silent request may."""
    front, mount = boots
    ids = list(front.glance.images)
    rules = {}
    for number, (name, faults) in enumerate(LIES.items()):
        for at, moment in enumerate(MOMENTS):
            image_id = ids[number * len(MOMENTS) + at]
            mount.path(image_id).stat()  # its header is no part of the boot
            rules[name, moment] = front.on(f"/{image_id}/file").after(moment)
            rules[name, moment].respond(*faults, times=1)
    with reader_threads(len(rules)) as pool:
        booting = {
            key: pool.submit(boot, mount.mountpoint / base_name(image_id), front.glance.data[image_id])
            for key, image_id in zip(rules, ids, strict=True)
        }
        trouble = {key: error for key, one in booting.items() if (error := one.exception()) is not None}
    assert trouble == {}
    assert {key for key, rule in rules.items() if not rule.hits} == set(), "lies that were not told"
    reports = [mount.mountpoint / ".basefs" / "images" / f"{image_id}.json" for image_id in ids]
    kinds = {json.loads(report.read_text())["source"] for report in reports}
    assert kinds == {"ranged"}, "one odd answer makes no image a streamed one"
    found = (LOG_LINE.match(line) for line in mount.log_text.splitlines())
    assert [hit["record"] for hit in found if hit and "EIO" in hit["record"]] == []
