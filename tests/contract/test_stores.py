"""What every `Store` promises, on one in memory and on real ones."""

import os
import uuid
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from basefs import errors
from tests.contract.object_store_worlds import MemoryRbdWorld, ServerS3World, ServerSwiftWorld
from tests.contract.real_store_worlds import (
    RealDynamicSwiftWorld,
    RealRbdWorld,
    RealS3World,
    RealStaticSwiftWorld,
    RealSwiftWorld,
)
from tests.contract.store_worlds import PIECE_BYTES, SECRET, HttpWorld, MemoryStoreWorld
from tests.contract.test_image_source import Taken

DATA = os.urandom(3 * 1024 * 1024 + 12345)
SIZE = len(DATA)
CANCEL_LIMIT_S = 10.0
"""A cancelled call ends within this time, whatever its store does; generous, for making a connection takes 5 s."""


WORLDS = {
    "memory": MemoryStoreWorld,
    "http": HttpWorld,
    "rbd in memory": MemoryRbdWorld,
    "rbd in memory, no object map": partial(MemoryRbdWorld, has_map=False),
    "s3 server": ServerS3World,
    "swift server": ServerSwiftWorld,
}


REAL_WORLDS = {
    "real rbd": RealRbdWorld,
    "real s3": RealS3World,
    "real swift": RealSwiftWorld,
    "real swift, dynamic large object": RealDynamicSwiftWorld,
    "real swift, static large object": RealStaticSwiftWorld,
}
_REAL_MARKS = (pytest.mark.glance, pytest.mark.keystone, pytest.mark.ceph)


def in_worlds_with(*faults):
    """The worlds that can do these, as parameters; all of them without any."""
    memory = [name for name, made in WORLDS.items() if {*faults} <= {*getattr(made, "func", made).faults}]
    real = [name for name, made in REAL_WORLDS.items() if {*faults} <= {*made.faults}]
    return [*memory, *(pytest.param(name, marks=_REAL_MARKS) for name in real)]


def needs(*faults):
    """For a test that makes its world do these."""
    return pytest.mark.parametrize("world", in_worlds_with(*faults), indirect=True)


@pytest.fixture(params=in_worlds_with())
async def world(request):
    if request.param in WORLDS:
        made = WORLDS[request.param]()
    else:
        made = REAL_WORLDS[request.param](request.getfixturevalue("object_stores_rig"))
    yield made
    made.heal()
    await made.close()


@pytest.fixture
def store(world):
    return world.store


@pytest.fixture
def image_id():
    return str(uuid.uuid4())


@asynccontextmanager
async def opened(store, location, image_id, size=SIZE):
    found = await store.open(location, image_id=image_id, size=size)
    try:
        yield found
    finally:
        await found.close()


async def fetched(found, offset, length, piece_bytes=PIECE_BYTES):
    taken = Taken()
    await found.fetch_range(offset=offset, length=length, piece_bytes=piece_bytes, deliver=taken)
    return taken.joined(offset)


async def test_an_object_is_opened_with_its_size(world, store, image_id):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        assert found.size == SIZE
        await found.close()
        # More than once is allowed.


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, PIECE_BYTES), (0, SIZE), (1, PIECE_BYTES), (PIECE_BYTES, 3 * PIECE_BYTES), (SIZE - 1, 1)],
)
async def test_a_range_comes_exactly_in_pieces_and_is_counted(world, store, image_id, offset, length):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        requests, received, taken = store.requests, store.received_bytes, Taken()
        await found.fetch_range(offset=offset, length=length, piece_bytes=PIECE_BYTES, deliver=taken)
        assert taken.joined(offset) == DATA[offset : offset + length]
        assert {len(piece) for _, piece in taken.pieces[:-1]} <= {PIECE_BYTES}
        assert len(taken.pieces) == -(-length // PIECE_BYTES)
        assert store.requests > requests
        assert store.received_bytes == received + length


async def test_zeros_come_as_zeros(world, store, image_id):
    data = bytes(5 * PIECE_BYTES) + DATA[:PIECE_BYTES] + bytes(4 * PIECE_BYTES)
    async with opened(store, world.put(image_id, data), image_id, len(data)) as found:
        assert await fetched(found, 0, len(data)) == data
        assert await fetched(found, 4 * PIECE_BYTES, 3 * PIECE_BYTES) == data[4 * PIECE_BYTES : 7 * PIECE_BYTES]


async def test_a_receiver_that_has_enough_gets_no_more(world, store, image_id):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        taken = Taken(pieces_max=2)
        await found.fetch_range(offset=0, length=SIZE, piece_bytes=PIECE_BYTES, deliver=taken)
        assert taken.joined(0) == DATA[: 2 * PIECE_BYTES]
        assert await fetched(found, 7, PIECE_BYTES) == DATA[7 : 7 + PIECE_BYTES]


async def test_many_ranges_at_once_are_not_mixed_up(world, store, image_id):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        results = {}

        async def fetch(offset):
            results[offset] = await fetched(found, offset, 50_000)

        async with trio.open_nursery() as nursery:
            for offset in range(0, 20 * 70_000, 70_000):
                nursery.start_soon(fetch, offset)
        assert all(data == DATA[offset : offset + 50_000] for offset, data in results.items())
        assert len(results) == 20


async def test_two_images_are_not_mixed_up(world, store, image_id):
    other, other_data = str(uuid.uuid4()), os.urandom(SIZE)
    async with (
        opened(store, world.put(image_id, DATA), image_id) as one,
        opened(store, world.put(other, other_data), other) as two,
    ):
        assert await fetched(one, 0, 1000) == DATA[:1000]
        assert await fetched(two, 0, 1000) == other_data[:1000]


async def test_the_location_glance_would_give_is_allowed_for_its_image(world, store, image_id):
    location = world.put(image_id, DATA)
    assert store.refusal(image_id, location) is None


async def test_other_locations_are_refused_and_no_secret_is_told(world, store, image_id, caplog):
    for location in world.refused_locations(image_id):
        reason = store.refusal(image_id, location)
        assert reason, f"{location!r} is refused"
        assert SECRET not in reason
    assert SECRET not in caplog.text


async def test_an_object_of_another_size_is_not_the_image(world, store, image_id):
    location = world.put(image_id, DATA)
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(errors.SourceCorruptError):
            await store.open(location, image_id=image_id, size=size)


@needs("remove")
async def test_an_object_that_is_not_there_is_gone(world, store, image_id):
    location = world.put(image_id, DATA)
    world.remove(location)
    with pytest.raises(errors.StoreGoneError):
        await store.open(location, image_id=image_id, size=SIZE)


@needs("remove")
async def test_an_object_that_was_removed_while_open_is_gone_or_what_it_was(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        world.remove(location)
        with suppress(errors.StoreGoneError):
            assert await fetched(found, 0, SIZE) == DATA


@needs("replace")
async def test_an_object_that_was_replaced_while_open_gives_no_other_byte(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        world.replace(location, os.urandom(SIZE))
        with suppress(errors.StoreGoneError):
            assert await fetched(found, 0, SIZE) == DATA


@needs("replace")
async def test_an_object_that_became_shorter_gives_no_other_byte_and_is_not_opened(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        assert await fetched(found, 0, 100) == DATA[:100]
        world.replace(location, DATA[: SIZE // 2])
        with suppress(errors.StoreGoneError):
            assert await fetched(found, 0, SIZE) == DATA
    with pytest.raises(errors.SourceCorruptError):
        await store.open(location, image_id=image_id, size=SIZE)


@needs("forbid")
async def test_who_may_not_read_is_told_so(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        world.forbid()
        with pytest.raises(errors.SourceForbiddenError):
            await fetched(found, 0, SIZE)
        with pytest.raises(errors.SourceForbiddenError):
            await store.open(location, image_id=image_id, size=SIZE)
        world.heal()
        assert await fetched(found, 0, 100) == DATA[:100]


@needs("away")
async def test_a_store_that_is_away_is_unavailable_and_comes_back(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        world.away()
        with pytest.raises(errors.SourceUnavailableError) as caught:
            await fetched(found, 0, SIZE)
        assert caught.value.may_be_away
        with pytest.raises(errors.SourceUnavailableError):
            await store.open(location, image_id=image_id, size=SIZE)
        world.heal()
        assert await fetched(found, 0, 100) == DATA[:100]


@needs("cut")
async def test_an_answer_that_breaks_off_leaves_a_right_prefix(world, store, image_id):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        world.cut()
        taken = Taken()
        with pytest.raises(errors.SourceUnavailableError):
            await found.fetch_range(offset=0, length=SIZE, piece_bytes=PIECE_BYTES, deliver=taken)
        got = taken.joined(0)
        assert 0 < len(got) < SIZE
        assert got == DATA[: len(got)]
        assert {len(piece) for _, piece in taken.pieces} == {PIECE_BYTES}, "whole pieces only"


async def test_a_cancelled_transfer_ends_at_the_next_piece(world, store, image_id):
    async with opened(store, world.put(image_id, DATA), image_id) as found:
        taken = Taken()
        with trio.CancelScope() as scope:

            def deliver(offset, piece):
                taken(offset, piece)
                if len(taken.pieces) == 3:
                    trio.from_thread.run_sync(scope.cancel)
                return True

            await found.fetch_range(offset=0, length=SIZE, piece_bytes=PIECE_BYTES, deliver=deliver)
        assert scope.cancelled_caught
        assert taken.joined(0) == DATA[: 3 * PIECE_BYTES]


@needs("hang")
async def test_a_hanging_store_lets_go_of_what_is_cancelled(world, store, image_id):
    location = world.put(image_id, DATA)
    async with opened(store, location, image_id) as found:
        world.hang()
        taken = Taken()
        with trio.fail_after(CANCEL_LIMIT_S):
            with trio.move_on_after(0.1) as scope:
                await found.fetch_range(offset=0, length=SIZE, piece_bytes=PIECE_BYTES, deliver=taken)
            assert scope.cancelled_caught
            with trio.move_on_after(0.1) as scope:
                await store.open(location, image_id=image_id, size=SIZE)
            assert scope.cancelled_caught
        count = len(taken.pieces)
        world.heal()
        assert await fetched(found, 0, 100) == DATA[:100]
        assert len(taken.pieces) == count, "nothing comes to who has left"
