"""The nginx that is shipped, as it is shipped, in front of a real Glance: who gets bytes from it, and what it keeps."""

import contextlib
import http.client
import os
import urllib.parse

import pytest
import trio

from tests.contract.test_image_source import PIECE, Taken
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.sources.access import over_tier
from tools.cache_tier import SLICE_BYTES, CacheTier

DATA = os.urandom(3 * SLICE_BYTES + 12345)
SIZE = len(DATA)

pytestmark = pytest.mark.glance


def get(
    url: str, image: str, first: int, last: int, token: str | None = None, *, patience_s: float = 20, **headers: str
) -> tuple[int, bytes]:
    """Status and body of a ranged GET by somebody who is no basefs."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=patience_s)
    sent = {"Range": f"bytes={first}-{last}", **({"X-Auth-Token": token} if token else {}), **headers}
    try:
        connection.request("GET", f"/v2/images/{image}/file", headers=sent)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.keystone
def test_nobody_gets_from_the_cache_what_glance_would_not_give_him(tmp_path, keystone_rig):
    rig = keystone_rig
    owner, other = rig.token("u1"), rig.token("u2")
    image = rig.api("u1").upload(DATA, "private", "raw", visibility="private")
    file = f"{image}/file"
    with CacheTier(tmp_path / "tier", rig.glance_url) as tier:
        assert get(tier.url, image, 0, 99, other)[0] == 403
        assert tier.cached_files() == []
        assert get(tier.url, image, 0, SIZE - 1, owner) == (206, DATA)
        kept = len(tier.cached_files())
        assert kept == 4
        for token, status in ((other, 403), (None, 401), ("gAAAAAno-token", 401)):
            assert get(tier.url, image, 0, 99, token)[0] == status
        assert get(tier.url, image, 0, 99, owner) == (206, DATA[:100])
        assert sum(one.length for one in rig.requests(file) if one.status == 206 and one.length > 1) == SIZE
        rig.api().action(image, "deactivate")
        assert get(tier.url, image, 0, 99, owner)[0] == 403  # who may see its metadata still
        rig.api().action(image, "reactivate")
        assert get(tier.url, image, 0, 99, owner) == (206, DATA[:100])
        rig.api().delete(image)
        assert get(tier.url, image, 0, 99, owner)[0] == 403
        said = b"".join(path.read_bytes() for path in tier.directory.rglob("*") if path.is_file())
    assert owner.encode() not in said
    assert b"gAAAAA" not in said
    assert "[error]" not in tier.error_log()


def test_only_ranges_of_bytes_are_answered(tmp_path, rig):
    image = rig.upload(DATA, "tier-only-ranges")
    with CacheTier(tmp_path / "tier", rig.glance_url) as tier:
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(tier.url).netloc, timeout=20)
        asked = [
            ("GET", f"/v2/images/{image}", {}, 404),
            ("GET", "/v2/images", {}, 404),
            ("GET", "/authorise", {}, 403),
            ("GET", f"/v2/images/{image}/file", {}, 416),
            ("GET", f"/v2/images/{image}/file", {"Range": "bytes=0-9,20-29"}, 416),
            ("GET", f"/v2/images/{image}/file", {"Range": "bytes=-9"}, 416),
            ("PUT", f"/v2/images/{image}/file", {}, 405),
            ("DELETE", f"/v2/images/{image}/file", {}, 405),
            ("GET", f"/v2/images/../images/{image}/file", {"Range": "bytes=0-9"}, 206),  # one spelling: nginx's
        ]
        for method, path, headers, status in asked:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            response.read()
            assert (method, path, response.status) == (method, path, status)
        connection.close()
        assert [one.range for one in rig.requests(f"{image}/file")][1:] == ["bytes=0-0", f"bytes=0-{SLICE_BYTES - 1}"]


SPOILT = [
    answers.status(500),
    answers.status(503, {"Retry-After": "7"}),
    answers.status(403),
    answers.not_found(),
    answers.status(204),
    answers.whole_for_range(),
    answers.whole_under_206(),
    answers.too_short(),
    answers.too_long(),
    answers.content_range(f"bytes 5-{SLICE_BYTES + 4}/{SIZE}"),
    answers.content_range(None),
    answers.chunked(),
    answers.cut(after=1000),
    answers.reset(),
    answers.garbage(),
]


def test_no_error_and_no_wrong_slice_is_kept(tmp_path):
    with MisbehavingFront() as front, CacheTier(tmp_path / "tier", front.url) as tier:
        for number, fault in enumerate(SPOILT):
            image = front.glance.add(DATA)
            front.on(image).after(1).respond(fault)  # the first request asks whether we may
            with contextlib.suppress(http.client.HTTPException, OSError):
                # A body that is too short leaves whoever reads it waiting for the rest.
                get(tier.url, image, 0, SLICE_BYTES - 1, patience_s=1)
            assert tier.cached_files() == [], number
            front.behave()
            assert get(tier.url, image, 0, SIZE - 1) == (206, DATA)
            assert len(tier.cached_files()) == 4
            for path in tier.cached_files():
                path.unlink()


async def test_one_working_set_leaves_glance_for_many_readers(tmp_path, rig, nursery):
    image = rig.upload(DATA, "tier-many-readers")
    with CacheTier(tmp_path / "tier", rig.glance_url) as tier:
        readers = [over_tier(tmp_path / str(n), rig, tier, nursery) for n in range(5)]

        async def read(source, shift):
            probe = await source.probe(image, size=SIZE, header_bytes=SLICE_BYTES)
            assert probe.header == DATA[:SLICE_BYTES]
            for offset in range(shift * PIECE, SIZE, 3 * PIECE):
                length = min(3 * PIECE, SIZE - offset)
                taken = Taken()
                await source.fetch_range(
                    image, size=SIZE, offset=offset, length=length, piece_bytes=PIECE, deliver=taken
                )
                assert taken.joined(offset) == DATA[offset : offset + length]

        async with trio.open_nursery() as reading:
            for shift, (source, _) in enumerate(readers):
                reading.start_soon(read, source, shift)
        for source, access in readers:
            assert source.failovers == 0
            source.tier.close()
            access.close()
    sent = [one for one in rig.requests(f"{image}/file") if one.method == "GET"]
    slices = [one.range for one in sent if one.length > 4096]
    assert len(slices) == len(set(slices)) == 4
    assert sum(one.length for one in sent if one.length > 4096) == SIZE


def test_authorised_for_ten_seconds_asks_glance_once(tmp_path, rig):
    image = rig.upload(DATA, "tier-authorised")
    with CacheTier(tmp_path / "tier", rig.glance_url, authorised_s10=True) as tier:
        for _ in range(5):
            assert get(tier.url, image, 0, 99, rig.token()) == (206, DATA[:100])
        assert get(tier.url, image, 0, 99, "nobody")[0] == 401
        assert get(tier.url, image, 0, 99, rig.token(), Authorization="Basic eDp5")[0] == 206  # somebody else, maybe
    asked = [one.range for one in rig.requests(f"{image}/file") if one.method == "GET"]
    assert asked.count("bytes=0-0") == 3
