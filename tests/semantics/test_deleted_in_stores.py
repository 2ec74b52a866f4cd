"""docs/SEMANTICS.md, section 22: what was deleted in a store; see also tests/contract/test_stores.py."""

import os
import uuid

import pytest
import trio

from basefs import errors
from tests.contract.object_store_worlds import MemoryRbdWorld, ServerS3World, ServerSwiftWorld

PIECE = 64 * 1024
DATA = os.urandom(5 * PIECE) + bytes(3 * PIECE) + os.urandom(PIECE + 77)


@pytest.mark.parametrize("make", [MemoryRbdWorld, ServerS3World, ServerSwiftWorld])
@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_what_was_deleted_or_replaced_gives_no_other_byte(make, change: str) -> None:
    """[S2211] An image that was deleted or replaced in Ceph, S3 or Swift gives no other byte from there than it had:
    above all none of the zeros that Ceph gives for what is not there any more.
    """
    trio.run(_change_and_read, make, change)


async def _change_and_read(make, change: str) -> None:
    world, image_id = make(), str(uuid.uuid4())
    location = world.put(image_id, DATA)
    found = await world.store.open(location, image_id=image_id, size=len(DATA))
    if change == "deleted":
        world.remove(location)
    else:
        world.replace(location, bytes(reversed(DATA)))
    taken = []
    for offset in range(0, len(DATA), PIECE):
        with pytest.raises(errors.StoreGoneError):
            await found.fetch_range(
                offset=offset,
                length=min(PIECE, len(DATA) - offset),
                piece_bytes=PIECE,
                deliver=lambda at, piece: taken.append((at, bytes(piece))) is None,
            )
    assert taken == []
    await found.close()
    await world.close()
