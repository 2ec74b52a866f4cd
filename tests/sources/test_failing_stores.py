"""A real Ceph, S3 and Swift that fail under a reader: the bytes come from the next source in the same read."""

import dataclasses
import os
import uuid
from contextlib import asynccontextmanager

import pytest
import trio

from basefs.sources.choice import SourceChoice
from basefs.sources.s3_store import S3Store
from tests.cache.memory_source import MemorySource
from tests.contract.real_store_worlds import (
    RealDynamicSwiftWorld,
    RealRbdWorld,
    RealS3World,
    RealStaticSwiftWorld,
    RealSwiftWorld,
)
from tests.contract.test_image_source import Taken
from tests.fakes.slow_proxy import SlowProxy

pytestmark = [pytest.mark.glance, pytest.mark.keystone, pytest.mark.ceph]

MIB = 1 << 20
SIZE = 6 * MIB + 321
DATA = os.urandom(SIZE)
OTHER = os.urandom(SIZE)
PIECE = 64 * 1024


class Reader:
    """Reads one image by a choice of the world's store and a Glance in memory."""

    def __init__(self, world, nursery):
        self.image_id = str(uuid.uuid4())
        self.location = world.put(self.image_id, DATA)
        self.glance = MemorySource({self.image_id: DATA})
        self.choice = SourceChoice(
            self.glance,
            [world.store],
            self._ask,
            order=(world.store.name,),
            nursery=nursery,
            kept_start=self._kept_start,
            is_blamed=lambda _image_id: False,
        )

    async def _ask(self, _image_id):
        await trio.lowlevel.checkpoint()
        return [self.location]

    async def _kept_start(self, _image_id, _length):
        await trio.lowlevel.checkpoint()

    async def read(self, offset, length):
        taken = Taken()
        await self.choice.fetch_range(
            self.image_id, size=SIZE, offset=offset, length=length, piece_bytes=PIECE, deliver=taken
        )
        assert taken.joined(offset) == DATA[offset : offset + length]

    def state(self):
        (one,) = self.choice.report(self.image_id)["sources"]
        return one["state"], one["reason"] or ""


@asynccontextmanager
async def reading(world):
    closing = []
    try:
        async with trio.open_nursery() as nursery:
            reader = Reader(world, nursery)
            closing.append(reader.choice)
            await reader.read(0, 2 * MIB)
            assert (reader.glance.requests, reader.state()) == (0, ("read", ""))
            yield reader
            nursery.cancel_scope.cancel()
    finally:
        world.heal()
        # An image that is open when its connection ends would be closed by the collector, and hang there.
        for one in (*closing, world):
            await one.close()


async def read_on(reader):
    """The rest, in two reads, then all of it."""
    await reader.read(2 * MIB, 2 * MIB)
    await reader.read(4 * MIB, SIZE - 4 * MIB)
    await reader.read(0, SIZE)


REFUSALS = [
    (RealS3World, RealS3World.forbid),
    (RealS3World, RealS3World.withdraw_policy),
    (RealS3World, RealS3World.remove_key),
    (RealRbdWorld, RealRbdWorld.withdraw_caps),
    (RealSwiftWorld, RealSwiftWorld.forbid),
]


@pytest.mark.parametrize(
    ("kind", "refuse"), REFUSALS, ids=[f"{kind.__name__}: {what.__name__}" for kind, what in REFUSALS]
)
async def test_a_store_that_refuses_us_is_left_for_glance(object_stores_rig, expected_warnings, kind, refuse):
    expected_warnings("is not read from")
    world = kind(object_stores_rig)
    async with reading(world) as reader:
        refuse(world)
        await read_on(reader)
        assert reader.state()[0] == "resting"
        assert reader.glance.requests == 3


async def test_a_client_that_was_blocklisted_connects_anew(object_stores_rig, expected_warnings):
    expected_warnings("is not read from")
    world = RealRbdWorld(object_stores_rig)
    async with reading(world) as reader:
        world.end_connection()
        await read_on(reader)
        assert reader.glance.requests > 0
        await read_from_the_store_again(reader)


async def read_from_the_store_again(reader):
    """Return when the reader's store was tried and is read from."""
    with trio.fail_after(60):
        while reader.state()[0] == "resting":
            await reader.read(0, 1)
            await trio.sleep(0.1)  # tries are the choice's own
    asked = reader.glance.requests
    await read_on(reader)
    assert reader.glance.requests == asked


KINDS = [RealRbdWorld, RealS3World, RealSwiftWorld, RealDynamicSwiftWorld, RealStaticSwiftWorld]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["another", "shorter", "removed"])
async def test_an_object_that_changed_after_the_first_read_gives_no_other_byte(
    object_stores_rig, expected_warnings, kind, change
):
    expected_warnings("is not read from")
    world = kind(object_stores_rig)
    async with reading(world) as reader:
        if change == "removed":
            world.remove(reader.location)
        else:
            world.replace(reader.location, OTHER if change == "another" else DATA[: SIZE // 2])
        await read_on(reader)
        assert reader.state()[0] == "resting"


async def test_another_snapshot_of_the_same_name_gives_no_other_byte(object_stores_rig, expected_warnings):
    expected_warnings("is not read from")
    world = RealRbdWorld(object_stores_rig)
    async with reading(world) as reader:
        world.remake_snapshot(reader.location, OTHER)
        await read_on(reader)
        assert reader.state()[0] == "resting"


@pytest.mark.parametrize("kind", [RealRbdWorld, RealS3World, RealSwiftWorld])
@pytest.mark.parametrize("fail", ["away", "hang"])
async def test_a_store_that_is_away_or_hangs_is_left_and_read_from_again(
    object_stores_rig, expected_warnings, kind, fail
):
    expected_warnings("fails: .*; images are read from their next source")
    world = kind(object_stores_rig)
    async with reading(world) as reader:
        getattr(world, fail)()
        await read_on(reader)
        assert reader.state()[0] == "resting"
        world.heal()
        await read_from_the_store_again(reader)


async def test_a_store_whose_answers_trickle_is_left_for_glance(object_stores_rig, expected_warnings):
    expected_warnings("s3 at .* fails: nothing came for")
    world = RealS3World(object_stores_rig)
    await world.store.close()
    with SlowProxy(object_stores_rig.ceph.s3_url.removeprefix("http://")) as proxy:
        settings = dataclasses.replace(
            world.store._settings, endpoint=f"http://{proxy.host}", location_hosts=tuple(world.store._hosts)
        )
        world.store = S3Store(settings, threads_max=4)
        async with reading(world) as reader:
            proxy.is_slow = True
            await read_on(reader)
            state, reason = reader.state()
            assert (state, "nothing came for" in reason) == ("resting", True)
