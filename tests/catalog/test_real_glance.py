"""The catalog over a real Glance: every image the service user may see, and what happens to them there."""

import contextlib
import os

import pytest
import trio

from basefs import errors
from basefs.cache.state_db import StateDatabase
from basefs.catalog.glance_catalog import Catalog
from basefs.core.names import base_name_of
from basefs.sources.glance import GlanceSource
from basefs.sources.metadata import GlanceMetadata
from tests.contract.test_image_source import Taken
from tests.sources.access import access_to

pytestmark = pytest.mark.glance
DATA = b"0123456789abcdef" * 8192
READER_OF_DEMO1 = "svc:demo1:member,reader"


def conf_lines(rig, token: str) -> str:
    return f"[glance]\nauth_type = admin_token\nendpoint = {rig.glance_url}\ntoken = {token}\n"


@contextlib.asynccontextmanager
async def catalog_over(tmp_path, lines: str):
    """A catalog in its own nursery, and a source over the same access."""
    access = access_to(tmp_path, lines)
    db = await StateDatabase.open(tmp_path / "state.sqlite", numbers_from=0)
    async with trio.open_nursery() as nursery:
        catalog = Catalog(
            GlanceMetadata(access), db, nursery, refresh_s=60.0, full_refresh_s=3600.0, lookup_deadline_s=20.0
        )
        await catalog.load()
        yield catalog, GlanceSource(access, threads_max=2)
        nursery.cancel_scope.cancel()
    await db.close()
    access.close()


async def in_thread(fn, *args, **kwargs):
    return await trio.to_thread.run_sync(lambda: fn(*args, **kwargs))


def share(rig, image_id: str, status: str | None) -> None:
    """Share an image of u2 with demo1."""
    rig.api("u2").call("POST", f"/v2/images/{image_id}/members", {"member": "demo1"})
    if status is not None:
        rig.api("u1").call("PUT", f"/v2/images/{image_id}/members/demo1", {"status": status})


@pytest.fixture(scope="module")
def family(rig):
    """Images of every visibility, hidden and not: id by name. Only `private` is not for demo1."""
    made = {}
    for is_hidden in (False, True):
        for visibility in ("public", "community", "private"):
            name = f"{visibility}{'-hidden' if is_hidden else ''}"
            user = "admin" if visibility == "public" else "u2"
            made[name] = rig.api(user).upload(DATA, name, visibility=visibility, os_hidden=is_hidden)
        for status in (None, "accepted", "rejected"):
            name = f"shared-{status}{'-hidden' if is_hidden else ''}"
            made[name] = rig.api("u2").upload(DATA, name, visibility="shared", os_hidden=is_hidden)
            share(rig, made[name], status)
    made["own"] = rig.api("u1").upload(DATA, "own", visibility="private")
    return made


async def test_an_admin_sees_all_images(rig, family, tmp_path):
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, _source):
        await catalog.refresh(full=True)
        assert {name for name, image in family.items() if catalog.by_id(image) is None} == set()


async def test_a_member_sees_hidden_community_and_shared_images_pending_ones_too(rig, family, tmp_path):
    async with catalog_over(tmp_path, conf_lines(rig, READER_OF_DEMO1)) as (catalog, source):
        await catalog.refresh(full=True)
        unseen = {name for name, image in family.items() if catalog.by_id(image) is None}
        assert unseen == {"private", "private-hidden"}
        for name in ("shared-None", "community-hidden"):
            entry = catalog.by_id(family[name])
            taken = Taken()
            await source.fetch_range(
                entry.image_id, size=entry.size, offset=5, length=100, piece_bytes=4096, deliver=taken
            )
            assert taken.joined(5) == DATA[5:105]
            assert (entry.record.os_hash_algo, len(entry.record.os_hash_value)) == ("sha512", 128)


async def test_no_image_is_lost_between_pages(rig, family, tmp_path, monkeypatch):
    """Glance 33 forgets one of two `sort_key`s in its links to the next page: then images are missed."""
    monkeypatch.setattr("basefs.sources.metadata.PAGE_IMAGES", 7)
    clones = await in_thread(rig.clone, family["public"], 100)
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, _source):
        await catalog.refresh(full=True)
        assert [image for image in clones if catalog.by_id(image) is None] == []
        numbers = {entry.image_id: entry.number for entry in catalog.entries()}
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, _source):
        await catalog.refresh()
        assert {entry.image_id: entry.number for entry in catalog.entries()} == numbers


async def test_a_new_image_is_found_when_nova_asks_for_it(rig, tmp_path):
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, _source):
        await catalog.refresh(full=True)
        before = len(rig.requests("/v2/images"))
        image = await in_thread(rig.upload, DATA, "new")
        found = await catalog.resolve(base_name_of(image))
        assert (found.image_id, found.size) == (image, len(DATA))
        since = [r for r in rig.requests("/v2/images")[before:] if r.path == "/v2/images" and r.method == "GET"]
        assert len(since) == 2
        assert all("updated_at=gte" in request.query for request in since)
        assert await catalog.resolve(base_name_of("no such image")) is None


async def test_an_image_shared_later_is_found(rig, tmp_path, monkeypatch):
    """Sharing does not change `updated_at`; the full list after a miss finds it."""
    monkeypatch.setattr("basefs.catalog.glance_catalog.FULL_AFTER_MISS_S", 0.0)
    image = await in_thread(rig.api("u2").upload, DATA, "late", visibility="shared")
    async with catalog_over(tmp_path, conf_lines(rig, READER_OF_DEMO1)) as (catalog, _source):
        await catalog.refresh(full=True)
        assert catalog.by_id(image) is None
        for n in range(3):
            await in_thread(rig.upload, DATA, f"other {n}")
        monkeypatch.setattr("basefs.catalog.refresher.OVERLAP_S", 0.0)
        await in_thread(share, rig, image, None)
        assert (await catalog.resolve(base_name_of(image))).image_id == image


async def test_a_queued_image_becomes_active(rig, tmp_path):
    image = await in_thread(rig.api().create, "queued")
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, _source):
        await catalog.refresh(full=True)
        entry = catalog.by_id(image)
        assert (entry.record.status, entry.size) == ("queued", 0)
        await in_thread(rig.api().put_data, image, DATA)
        assert await catalog.resolve(base_name_of(image)) is entry
        assert (entry.record.status, entry.size) == ("active", len(DATA))


async def test_a_deleted_image_is_gone_and_a_deactivated_one_is_not(rig, tmp_path):
    deleted = await in_thread(rig.upload, DATA, "deleted")
    deactivated = await in_thread(rig.api("u1").upload, DATA, "deactivated")
    async with catalog_over(tmp_path, conf_lines(rig, READER_OF_DEMO1)) as (catalog, source):
        await catalog.refresh(full=True)
        await in_thread(rig.api().delete, deleted)
        await in_thread(rig.api().action, deactivated, "deactivate")
        await catalog.refresh(full=True)
        entry = catalog.by_id(deactivated)
        assert (entry.record.status, entry.is_gone) == ("deactivated", False)
        with pytest.raises(errors.SourceForbiddenError, match="deactivated"):
            await source.probe(deactivated, size=len(DATA), header_bytes=4096)
        await in_thread(rig.api().action, deactivated, "reactivate")
        await catalog.recheck(entry)
        assert entry.record.status == "active"
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, source):
        await catalog.refresh(full=True)
        gone = await in_thread(rig.upload, DATA, "soon gone")
        await catalog.refresh()
        assert not catalog.by_id(gone).is_gone
        await in_thread(rig.api().delete, gone)
        await catalog.refresh(full=True)
        assert catalog.by_id(gone).is_gone
        with pytest.raises(errors.ImageNotFoundError):
            await source.probe(gone, size=len(DATA), header_bytes=4096)


async def test_an_image_of_the_http_store_is_streamed_with_glances_reason(rig, tmp_path):
    image = await in_thread(rig.upload_web, DATA, "web")
    async with catalog_over(tmp_path, rig.conf_lines()) as (catalog, source):
        entry = await catalog.resolve(base_name_of(image))
        assert (entry.size, entry.record.os_hash_value) == (len(DATA), None)
        probe = await source.probe(image, size=entry.size, header_bytes=4096)
        assert (probe.kind, probe.header) == ("streamed", DATA[:4096])
        assert "Getting images randomly from this store is not supported" in probe.reason
        with pytest.raises(errors.RangeNotHonouredError, match="400"):
            await source.fetch_range(image, size=entry.size, offset=0, length=100, piece_bytes=100, deliver=Taken())
        taken = Taken()
        await source.fetch_stream(image, size=entry.size, piece_bytes=65536, digest=None, deliver=taken)
        assert taken.joined(0) == DATA


async def test_data_lost_from_the_store_or_truncated_there_are_no_bytes(rig, tmp_path, monkeypatch):
    # gunicorn promises all of a truncated file, sends what there is, and keeps the connection open.
    monkeypatch.setattr("basefs.sources.session.INACTIVITY_TIMEOUT_S", 1.0)
    image = await in_thread(rig.upload, DATA, "damaged")
    access = access_to(tmp_path, rig.conf_lines())
    source = GlanceSource(access, threads_max=2)
    os.truncate(rig.data_path(image), len(DATA) // 2)
    taken = Taken()
    with pytest.raises(errors.SourceUnavailableError, match=r"the body ended|timed out"):
        await source.fetch_range(image, size=len(DATA), offset=0, length=len(DATA), piece_bytes=16384, deliver=taken)
    assert DATA.startswith(taken.joined(0))
    os.unlink(rig.data_path(image))
    with pytest.raises(errors.SourceCorruptError, match="204"):
        await source.probe(image, size=len(DATA), header_bytes=4096)
    access.close()


async def test_an_expired_fixed_token_is_forbidden(rig, tmp_path):
    access = access_to(tmp_path, conf_lines(rig, "doomed:demo1:member,reader"))
    await GlanceMetadata(access).list_images()
    rig.expire("doomed:demo1:member,reader")
    with pytest.raises(errors.SourceForbiddenError, match="401"):
        await GlanceMetadata(access).list_images()
    assert access.contact.reachable is True
    access.close()
