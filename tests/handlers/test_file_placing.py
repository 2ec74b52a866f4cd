"""An image that is read from Glance's own file: opened under readers, failing, removed, and over killed servers."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from basefs import errors
from basefs.handlers.comparing import Comparison
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.file_placing import FilePlacingTemplateImageHandler
from basefs.handlers.placed import REFUSED_AGAIN_S, PlacedImages, PlaceFinder
from basefs.handlers.uses import ImageUses
from basefs.sources.file_locations import FileLocations
from basefs.views.choice import Views
from basefs.volumes.bytes import FdVolumeBytes
from tests.cache.conftest import CHUNK
from tests.cache.services import make_services
from tests.conftest import ExpectedWarnings
from tests.handlers.linking_node import PATIENCE, World

CONTENT = bytes(range(256)) * 12_000 + b"the end"
MIB = 1 << 20


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    (tmp_path / "images").mkdir()
    yield world
    world.escrow.close()


@dataclass
class Node:
    """One server over a world, whose Glance tells `locations`."""

    world: World
    handler: FilePlacingTemplateImageHandler
    placed: PlacedImages
    scope: trio.CancelScope
    locations: dict[str, list[str]] = field(default_factory=dict)

    async def open(self, entry):
        image = await self.handler.fetch_image(entry)
        self.world.opens[entry.number] = self.world.opens.get(entry.number, 0) + 1
        self.handler.opened(entry, image)

    async def release(self, entry):
        self.world.opens[entry.number] -= 1
        await self.handler.released(entry)

    async def read(self, entry, offset=0, size=MIB):
        image = await self.handler.fetch_image(entry)
        hit = image.hit(offset, size)
        data = bytes(hit) if hit is not None else bytes(await image.read(offset, size, PATIENCE))
        assert data == self.world.data(entry)[offset : offset + size]
        return data

    def state(self, entry):
        report = self.placed.report(entry)
        return report[0]["state"] if report else "none"

    def reason(self, entry):
        return self.placed.report(entry)[0]["reason"]

    async def until_state(self, entry, state):
        await until(lambda: self.state(entry) == state)


async def until(condition):
    with trio.fail_after(10_000):
        while not condition():  # noqa: ASYNC110 (of the mock clock)
            await trio.sleep(2.0)


def file_of(world, entry):
    return world.directory / "images" / entry.image_id


@asynccontextmanager
async def a_node(world: World, *, has_before=False, require_verified=False) -> AsyncIterator[Node]:
    chunks = world.directory / "chunks"
    chunks.mkdir(exist_ok=True)
    locations: dict[str, list[str]] = {}

    async def told(image_id: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        return locations.get(image_id, [f"file://{world.directory}/images/{image_id}"])

    async with trio.open_nursery() as nursery:
        services = replace(make_services(nursery, world.source, chunks), reader_table=world.reader_table())
        views = Views("raw")
        downloading = DownloadingTemplateImageHandler(chunks, CHUNK, services, views)
        finder = PlaceFinder(
            files=FileLocations([world.directory / "images"], any_name=False),
            locations=told,
            has_before=lambda _id: has_before,
            require_verified=require_verified,
        )
        uses = ImageUses(downloading, world.overlays)  # type: ignore[arg-type]
        comparison = Comparison(downloading, "raw")
        placed = PlacedImages(finder, downloading, comparison, views, uses, world.escrow, nursery, jitter=lambda: 1.0)
        handler = FilePlacingTemplateImageHandler(downloading, placed)
        handler.restore_opens({number: count for number, count in world.opens.items() if count})
        await placed.restore(world.escrow.held(), world.entries.values())
        yield Node(world, handler, placed, nursery.cancel_scope, locations)
        await handler.close()
        nursery.cancel_scope.cancel()


def place(world, content=CONTENT, **fields):
    entry = world.add(content, has_volume=False, **fields)
    file_of(world, entry).write_bytes(content)
    return entry


async def test_an_open_image_is_read_from_its_file_and_nothing_is_copied(world: World, clock: MockClock) -> None:
    entry = place(world)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        requests, cached = world.source.requests, entry.local.cached_bytes
        assert cached <= 2 * MIB, "what was compared, and what was read ahead of that"
        for offset in range(0, len(CONTENT), 100_000):
            await node.read(entry, offset, 100_000)
        assert await node.read(entry, len(CONTENT), 10) == b""
        assert (world.source.requests, entry.local.cached_bytes) == (requests, cached)
        assert node.placed.is_placed(entry)
        assert node.handler.is_placed(entry)
        assert set(world.escrow.kept) == {"placed/1"}
        await node.release(entry)
        await until(lambda: not world.escrow.kept)
        await node.read(entry, MIB, 4096)


async def test_a_file_that_is_deleted_or_replaced_is_read_on_while_it_is_open(world: World, clock: MockClock) -> None:
    entry = place(world)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        file_of(world, entry).unlink()
        await node.read(entry, 2 * MIB)
        file_of(world, entry).write_bytes(os.urandom(len(CONTENT)))
        await node.read(entry)


async def test_the_next_server_reads_on_from_the_same_fd(world: World, clock: MockClock) -> None:
    entry = place(world)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        file_of(world, entry).unlink()
        node.scope.cancel()
    async with a_node(world) as node:
        assert node.state(entry) == "in place"
        requests = world.source.requests
        await node.read(entry, 2 * MIB)
        assert world.source.requests == requests
        await node.release(entry)
        await until(lambda: not world.escrow.kept)


async def test_a_server_without_the_fd_opens_the_file_of_who_has_it_open_anew(world: World, clock: MockClock) -> None:
    entry = place(world)
    world.opens[entry.number] = 1
    async with a_node(world) as node:
        await node.until_state(entry, "in place")
        await node.read(entry, 2 * MIB)


async def test_what_is_held_of_an_image_that_is_no_more_is_let_go(world: World, clock: MockClock) -> None:
    entry = place(world)
    fd = os.open(file_of(world, entry), os.O_RDONLY)
    await world.escrow.hold("placed/7", "", fd)
    os.close(fd)
    async with a_node(world):
        assert not world.escrow.kept


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("other", "its file does not begin with the bytes that Glance gives"),
        ("short", "the file has 1000 bytes, the image's metadata say"),
        ("none", "the file cannot be opened: No such file or directory"),
        ("link", "the file cannot be opened"),
        ("elsewhere", "it is not below"),
        ("untold", "Glance tells no file location of it"),
    ],
)
async def test_a_file_that_is_not_the_image_is_not_read(
    world: World, clock: MockClock, spoil: str, reason: str
) -> None:
    entry = place(world)
    file = file_of(world, entry)
    if spoil == "other":
        file.write_bytes(b"x" + CONTENT[1:])
    elif spoil == "short":
        file.write_bytes(CONTENT[:1000])
    elif spoil in ("none", "link"):
        file.unlink()
        if spoil == "link":
            (world.directory / "other").write_bytes(CONTENT)
            file.symlink_to(world.directory / "other")
    async with a_node(world) as node:
        if spoil == "elsewhere":
            node.locations[entry.image_id] = ["rbd://a/b/c/d", "file:///etc/shadow"]
        elif spoil == "untold":
            node.locations[entry.image_id] = []
        await node.open(entry)
        await node.until_state(entry, "refused")
        assert reason in node.reason(entry)
        await node.read(entry, 2 * MIB)
        assert not world.escrow.kept
        file.unlink(missing_ok=True)
        file.write_bytes(CONTENT)
        node.locations.clear()
        await node.open(entry)
        assert node.state(entry) == "refused", "it is not looked at for each open"
        await trio.sleep(REFUSED_AGAIN_S)
        await node.open(entry)
        await node.until_state(entry, "in place")


async def test_a_file_that_fails_costs_no_read_and_is_tried_again(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_warnings("is not read in place, but from its next source, trying again: its file failed: bytes .*: Stale")
    entry = place(world)
    fails = False
    read = FdVolumeBytes.read

    def read_or_fail(self, offset, length):
        if fails:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, offset, length)

    monkeypatch.setattr(FdVolumeBytes, "read_now", lambda *_: False)
    monkeypatch.setattr(FdVolumeBytes, "read", read_or_fail)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        fails = True
        await node.read(entry, 2 * MIB)
        assert node.state(entry) == "failed"
        assert node.placed.is_placed(entry), "it is about to be read in place again"
        fails = False
        await node.until_state(entry, "in place")
        requests = world.source.requests
        await node.read(entry, MIB, MIB)
        assert world.source.requests == requests
        assert node.placed.breaks == 1


@pytest.mark.parametrize("why", ["before", "require_verified", "glance_only", "deactivated", "all here"])
async def test_what_is_to_be_read_elsewhere_is_not_read_in_place(world: World, clock: MockClock, why: str) -> None:
    entry = place(world, **({"status": "deactivated"} if why == "deactivated" else {}))
    entry.local.glance_only = why == "glance_only"
    async with a_node(world, has_before=why == "before", require_verified=why == "require_verified") as node:
        if why == "all here":
            for offset in range(0, len(CONTENT), MIB):
                await node.read(entry, offset, MIB)
            await until(lambda: entry.local.cached_bytes == entry.size)
        await node.open(entry)
        await node.until_state(entry, "refused")


async def test_an_image_that_turns_out_wrong_is_not_read_from_its_file(world: World, clock: MockClock) -> None:
    entry = place(world)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        node.placed.distrust(entry)
        assert node.state(entry) == "in place", "a damage in the cache is none of the file"
        entry.local.whole = "refetching"
        node.placed.distrust(entry)
        assert node.state(entry) == "refused"
        entry.local.whole = "unknown"
        await node.read(entry, 2 * MIB)


async def test_a_base_of_an_overlay_stays_in_place_until_it_is_removed(world: World, clock: MockClock) -> None:
    entry = place(world)
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "in place")
        world.overlays.bases.add(entry.base_name)
        await node.release(entry)
        await trio.testing.wait_all_tasks_blocked()
        assert node.state(entry) == "in place"
        world.overlays.bases.clear()
        await node.handler.remove_image(entry)
        await node.until_state(entry, "none")


async def test_where_no_fd_is_left_it_is_read_elsewhere(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("cannot be held for the next server")
    entry = place(world)
    world.escrow.refuses = OSError(errno.EMFILE, "Too many open files")
    async with a_node(world) as node:
        await node.open(entry)
        await node.until_state(entry, "failed")
        await node.read(entry, 2 * MIB)
        world.escrow.refuses = None
        await node.until_state(entry, "in place")


async def test_glance_that_does_not_tell_now_is_asked_again(
    world: World, clock: MockClock, expected_warnings: ExpectedWarnings
) -> None:
    entry = place(world)
    expected_warnings("is not read in place, but from its next source, trying again: no")
    expected_warnings(f"image {entry.image_id}: no")
    async with a_node(world) as node:
        world.source.faults = [errors.SourceForbiddenError("no")]
        await node.open(entry)
        await node.until_state(entry, "failed")
        await node.until_state(entry, "in place")
