"""The rbd store on a Ceph in memory: holes, zeros in doubt, and a cluster that hangs or refuses."""

import errno
import os
import uuid

import pytest
import trio

from basefs import errors
from basefs.config.store_options import RbdSettings
from basefs.sources.ceph_cluster import MISSING_LIBRARY
from basefs.sources.rbd_store import RbdStore
from tests.contract.test_image_source import Taken
from tests.fakes.memory_ceph import OBJECT_BYTES, MemoryCeph

IMAGE = str(uuid.uuid4())
SETTINGS = RbdSettings(pools=("images",), ceph_conf="/c", user="basefs", connect_timeout_s=1, op_timeout_s=1)


@pytest.fixture
def ceph():
    made = MemoryCeph()
    yield made
    made.answers.set()
    made.confirming.set()


@pytest.fixture
async def store(ceph):
    made = RbdStore(SETTINGS, threads_max=4, library=ceph.library)
    yield made
    await made.close()


async def read(found, offset, length, piece_bytes=64 * 1024):
    taken = Taken()
    await found.fetch_range(offset=offset, length=length, piece_bytes=piece_bytes, deliver=taken)
    return taken.joined(offset)


async def test_where_the_snapshot_has_no_object_nothing_is_read(ceph, store):
    data = bytes(2 * OBJECT_BYTES) + os.urandom(OBJECT_BYTES) + bytes(OBJECT_BYTES)
    found = await store.open(ceph.add(IMAGE, data), image_id=IMAGE, size=len(data))
    assert await read(found, 0, 2 * OBJECT_BYTES) == bytes(2 * OBJECT_BYTES)
    assert (store.requests, store.received_bytes, ceph.reads, ceph.confirms) == (0, 0, 0, 0)
    assert await read(found, 0, len(data)) == data
    assert store.received_bytes == OBJECT_BYTES
    await found.close()


async def test_what_was_read_is_delivered_after_the_header_was_asked(ceph, store):
    data = os.urandom(64 * 1024) + bytes(OBJECT_BYTES - 64 * 1024)
    found = await store.open(ceph.add(IMAGE, data), image_id=IMAGE, size=len(data))
    for number, offset in enumerate((0, 64 * 1024)):
        assert await read(found, offset, 64 * 1024) == data[offset : offset + 64 * 1024]
        assert ceph.confirms == number + 1
    await found.close()


async def test_an_image_that_was_written_after_its_snapshot_was_removed_gives_no_byte(ceph, store):
    found = await store.open(ceph.add(IMAGE, b"data"), image_id=IMAGE, size=4)
    stored = ceph.images["images", IMAGE]
    stored.data, stored.snapshot_id = b"more", 5
    taken = Taken()
    with pytest.raises(errors.StoreGoneError):
        await found.fetch_range(offset=0, length=4, piece_bytes=4, deliver=taken)
    assert taken.pieces == []
    await found.close()


async def test_a_cluster_that_does_not_answer_is_given_up_and_what_comes_late_is_closed(ceph, store, monkeypatch):
    location = ceph.add(IMAGE, b"data")
    ceph.answers.clear()
    with monkeypatch.context() as shorter:
        shorter.setattr("basefs.sources.rbd_store._CONNECT_SLACK_S", -0.9)
        with pytest.raises(errors.SourceUnavailableError, match="no answer within") as caught:
            await store.open(location, image_id=IMAGE, size=4)
    assert caught.value.may_be_away
    ceph.answers.set()
    found = await store.open(location, image_id=IMAGE, size=4)
    await found.close()
    await store.close()
    with trio.fail_after(30):
        while ceph.connections or ceph.opened:  # noqa: ASYNC110  a thread that was left behind tells nobody
            await trio.sleep(0.01)


async def test_after_it_was_blocklisted_another_connection_is_made(ceph, store):
    location = ceph.add(IMAGE, b"data")
    found = await store.open(location, image_id=IMAGE, size=4)
    ceph.code = errno.ESHUTDOWN
    with pytest.raises(errors.StoreGoneError):
        await read(found, 0, 4)
    await found.close()
    ceph.code = 0
    again = await store.open(location, image_id=IMAGE, size=4)
    assert ceph.connections == 2
    assert await read(again, 0, 4) == b"data"
    await again.close()


async def test_another_cluster_is_refused_when_it_is_known(ceph, store):
    location = ceph.add(IMAGE, b"data")
    elsewhere = location.replace(ceph.fsid, str(uuid.uuid4()))
    assert store.refusal(IMAGE, elsewhere) is None
    with pytest.raises(errors.SourceForbiddenError, match="another Ceph cluster"):
        await store.open(elsewhere, image_id=IMAGE, size=4)
    assert "another Ceph cluster" in store.refusal(IMAGE, elsewhere)


async def test_without_the_library_every_location_is_refused(ceph, monkeypatch):
    monkeypatch.setattr("basefs.sources.rbd_store.load_library", lambda: None)
    store = RbdStore(SETTINGS, threads_max=1)
    assert store.missing == store.refusal(IMAGE, ceph.add(IMAGE, b"data")) == MISSING_LIBRARY
    await store.close()
