"""Volumes that reader processes have open, too: none is detached before the last reader has closed it, or is dead."""

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from basefs.cache.reader_table import ReaderTable, Share, new_table
from basefs.catalog.records import ImageEntry
from basefs.handlers.lending import LEASE_PREFIX, RETURN_LIMIT_S
from basefs.reader_layout import SERIAL
from tests.conftest import ExpectedWarnings
from tests.handlers.linking_node import LinkingNode, World, a_linking_node, held
from tests.handlers.test_file_placing import a_node, place

CONTENT = bytes(range(256)) * 8_000
STILL_OPEN = "is not detached, trying again: a reader process has it open still"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "images").mkdir()
    world = World(tmp_path, table_fd=new_table())
    yield world
    world.escrow.close()
    for one in list(world.cinder.open_bytes):
        one.close()
    assert world.table_fd is not None
    os.close(world.table_fd)
    gc.collect()  # mappings keep fds of their own


class Borrower:
    """A reader process that was told of a volume: `share` as it came, and what says whether it may serve it."""

    def __init__(self, share: Share, table: ReaderTable) -> None:
        assert share.lease_fd >= 0
        self._share, self._table = share, table
        self._process = subprocess.Popen(["sleep", "1000"], pass_fds=[share.lease_fd, share.data_fd])

    @property
    def may_serve(self) -> bool:
        return self._table.words[self._share.entry + SERIAL] == self._share.serial

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def die(self) -> None:
        self._process.kill()
        self._process.wait()


async def lent(world: World, node: LinkingNode, entry: ImageEntry) -> Borrower:
    image = await node.handler.fetch_image(entry)
    table = world.reader_table()
    assert table is not None
    share = image.share(table, 0, 4096)
    assert share is not None
    assert (share.size, share.ready_fd) == (len(CONTENT), -1)
    assert os.pread(share.data_fd, 100, 1000) == CONTENT[1000:1100]
    return Borrower(share, table)


async def a_linked_image(world: World, node: LinkingNode) -> tuple[ImageEntry, Borrower]:
    entry = world.add(CONTENT)
    await node.open(entry)
    await node.linked(entry)
    await node.read(entry)
    return entry, await lent(world, node, entry)


async def test_a_volume_is_detached_when_the_reader_that_has_it_is_dead(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(STILL_OPEN)
    async with a_linking_node(world, detach_idle_s=0) as node:
        entry, borrower = await a_linked_image(world, node)
        assert held(world) == {"linked/1", "link-connection/1", f"{LEASE_PREFIX}1"}
        borrower.stop()
        await node.release(entry)
        await trio.sleep(3 * RETURN_LIMIT_S)
        assert world.cinder.devices, "it was taken away from under the reader"
        assert not borrower.may_serve
        borrower.die()
        await node.until(world.cinder.is_clean)
        await node.until(lambda: held(world) == set())


async def test_a_volume_that_no_reader_was_told_of_waits_for_none(world: World, clock: MockClock) -> None:
    async with a_linking_node(world) as node:
        entry = world.add(CONTENT)
        await node.open(entry)
        await node.linked(entry)
    assert world.cinder.is_clean()
    assert held(world) == set()


async def test_readers_go_on_over_a_killed_server_and_the_next_one_knows_that_they_have_it(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings(STILL_OPEN)
    async with a_linking_node(world, detach_idle_s=0) as node:
        entry, borrower = await a_linked_image(world, node)
        node.kill()
    assert borrower.may_serve
    async with a_linking_node(world, detach_idle_s=0) as node:
        await node.linked(entry)
        await node.read(entry)
        assert borrower.may_serve, "the volume is the same"
        second = await lent(world, node, entry)
        assert not borrower.may_serve
        assert second.may_serve
        second.die()
        await node.release(entry)
        await trio.sleep(3 * RETURN_LIMIT_S)
        assert world.cinder.devices
        borrower.die()
        await node.until(world.cinder.is_clean)


@pytest.mark.parametrize("is_on", [True, False], ids=["without its fd", "where nothing is linked any more"])
async def test_a_volume_that_the_next_server_does_not_go_on_with_is_not_taken_from_a_reader_either(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings, is_on: bool
) -> None:
    expected_warnings(STILL_OPEN)
    async with a_linking_node(world, detach_idle_s=0) as node:
        entry, borrower = await a_linked_image(world, node)
        node.kill()
    world.opens.clear()
    if is_on:
        await world.escrow.drop("linked/1")
    async with a_linking_node(world, detach_idle_s=0, is_on=is_on) as node:
        await trio.sleep(3 * RETURN_LIMIT_S)
        assert world.cinder.devices
        assert not borrower.may_serve
        borrower.die()
        await node.until(world.cinder.is_clean)
    assert held(world) == set()
    assert entry.local.link is None


async def test_the_lease_of_an_image_without_a_link_is_no_readers_and_goes(world: World, clock: MockClock) -> None:
    async with a_linking_node(world) as node:
        entry, borrower = await a_linked_image(world, node)
        node.kill()
    del world.noted[entry.number]
    world.opens.clear()
    async with a_linking_node(world):
        assert not borrower.may_serve
        assert held(world) == set()
    borrower.die()


async def test_nothing_is_told_of_a_volume_that_failed_or_that_cannot_be_read_at_once(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("its volume .* failed")
    entry = world.add(CONTENT)
    table = world.reader_table()
    assert table is not None
    async with a_linking_node(world) as node:
        await node.open(entry)
        await node.linked(entry)
        image = await node.handler.fetch_image(entry)
        world.volume(entry).breaks()
        assert image.share(table, 0, 4096) is None
        world.volume(entry).heals()
        share = image.share(table, 0, 4096)
        assert share is not None
        world.volume(entry).breaks()
        await node.read(entry)
        assert image.share(table, 0, 4096) is None
        assert table.words[share.entry + SERIAL] != share.serial
        world.volume(entry).heals()
    assert world.cinder.is_clean()


async def test_a_volume_is_the_servers_where_no_lease_can_be_kept(world: World, clock: MockClock) -> None:
    entry = world.add(CONTENT)
    table = world.reader_table()
    assert table is not None
    async with a_linking_node(world) as node:
        keep = world.escrow.hold

        async def hold(key: str, note: str, fd: int) -> None:
            if key.startswith(LEASE_PREFIX):
                raise OSError(24, "Too many open files")
            await keep(key, note, fd)

        world.escrow.hold = hold  # type: ignore[method-assign]
        await node.open(entry)
        await node.linked(entry)
        assert (await node.handler.fetch_image(entry)).share(table, 0, 4096) is None
    assert world.cinder.is_clean()


async def test_a_file_in_place_is_lent_without_a_lease_until_it_is_distrusted(world: World, clock: MockClock) -> None:
    entry = place(world, CONTENT)
    table = world.reader_table()
    assert table is not None
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        await node.read(entry)
        share = (await node.handler.fetch_image(entry)).share(table, 0, 4096)
        assert share is not None
        assert (share.lease_fd, share.size) == (-1, len(CONTENT))
        assert table.words[share.entry + SERIAL] == share.serial
        entry.local.glance_only = True
        node.placed.distrust(entry)
        assert table.words[share.entry + SERIAL] != share.serial


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_file_in_place_is_served_over_a_killed_server_as_long_as_the_next_one_goes_on_with_it(
    world: World, clock: MockClock, goes_on: bool
) -> None:
    entry = place(world, CONTENT)
    table = world.reader_table()
    assert table is not None
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        await node.read(entry)
        share = (await node.handler.fetch_image(entry)).share(table, 0, 4096)
        assert share is not None
        node.handler.close = trio.lowlevel.checkpoint  # type: ignore[method-assign]  # as kill -9
    os.close(share.data_fd)
    entry.local.glance_only = not goes_on
    async with a_node(world):
        assert (table.words[share.entry + SERIAL] == share.serial) == goes_on
