"""A node in memory whose images may be linked: Cinder, Glance, keeper and overlays are in memory, too."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from basefs.cache.reader_table import ReaderTable
from basefs.catalog.records import ImageEntry
from basefs.core.link_record import LinkRecord
from basefs.core.names import base_name_of
from basefs.handlers.base import Patience
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.lending import VolumeLeases
from basefs.handlers.link import LinkSettings
from basefs.handlers.link_steps import LinkSteps
from basefs.handlers.links import Links
from basefs.handlers.uses import ImageUses
from basefs.handlers.volume_linking import VolumeLinkingTemplateImageHandler
from basefs.views.choice import Views
from tests.cache.conftest import CHUNK, make_entry
from tests.cache.memory_source import MemorySource
from tests.cache.services import make_services
from tests.fakes.escrow import MemoryEscrow
from tests.fakes.memory_volumes import MemoryCinder, MemoryVolumeLinks

PATIENCE = Patience(deadline_s=100_000, is_guest=False)
"""Longer than whatever the mock clock jumps over while a thread is at work on a machine that is busy."""
IDLE_S = 300.0


@dataclass
class Overlays:
    """What `ImageUses` asks the watch; `bases` have an overlay, `gone` had one when it looked last."""

    bases: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    is_known: bool = True
    looked: Callable[[], None] = lambda: None

    def users(self, base_name: str) -> list[str]:
        return ["uuid/disk"] if base_name in self.bases | self.gone else []

    def look_soon(self) -> None:
        if self.is_known:
            self.gone.clear()
            self.looked()

    async def see_all(self) -> bool:
        await trio.lowlevel.checkpoint()
        return self.is_known


@dataclass
class World:
    """What outlives a server: Cinder, Glance, the keeper, overlays, what was noted, and who has what open."""

    directory: Path
    cinder: MemoryCinder = field(default_factory=MemoryCinder)
    source: MemorySource = field(default_factory=lambda: MemorySource({}, in_thread=False))
    escrow: MemoryEscrow = field(default_factory=MemoryEscrow)
    overlays: Overlays = field(default_factory=Overlays)
    entries: dict[int, ImageEntry] = field(default_factory=dict)
    noted: dict[int, LinkRecord | None] = field(default_factory=dict)
    opens: dict[int, int] = field(default_factory=dict)
    table_fd: int | None = None
    """What readers look at, where there are some."""

    def reader_table(self) -> ReaderTable | None:
        """One more server's."""
        return None if self.table_fd is None else ReaderTable(self.table_fd)

    def add(self, data: bytes, *, has_volume: bool = True, is_multiattach: bool = True, **fields: object) -> ImageEntry:
        number = len(self.entries) + 1
        image_id = f"00000000-0000-0000-0000-{number:012}"
        entry = make_entry(len(data), image_id=image_id, **fields)
        entry.number, entry.base_name = number, base_name_of(image_id)
        entry.local.used_at_ns = 1
        self.entries[number] = entry
        self.source.images[image_id] = data
        if has_volume:
            self.cinder.add_volume(data, image_id=image_id, is_multiattach=is_multiattach)
        return entry

    def data(self, entry: ImageEntry) -> bytes:
        return self.source.images[entry.image_id]

    def volume(self, entry: ImageEntry):
        """The volume that the image's own is attached from: its clone, if there is one."""
        mine = [one for one in self.cinder.volumes.values() if one.image_id == entry.image_id]
        return max(mine, key=lambda one: one.clone_of is not None)


@dataclass
class LinkingNode:
    """One server over a world."""

    world: World
    handler: VolumeLinkingTemplateImageHandler
    downloading: DownloadingTemplateImageHandler
    links: Links
    volumes: MemoryVolumeLinks
    scope: trio.CancelScope
    was_killed: bool = False

    async def open(self, entry: ImageEntry) -> None:
        image = await self.handler.fetch_image(entry)
        self.world.opens[entry.number] = self.world.opens.get(entry.number, 0) + 1
        self.handler.opened(entry, image)

    async def release(self, entry: ImageEntry) -> None:
        self.world.opens[entry.number] -= 1
        await self.handler.released(entry)

    async def read(self, entry: ImageEntry, offset: int = 0, size: int = 1 << 20) -> bytes:
        """As the face reads: what is there at once, else what comes; right bytes or an AssertionError."""
        image = await self.handler.fetch_image(entry)
        hit = image.hit(offset, size)
        data = bytes(hit) if hit is not None else bytes(await image.read(offset, size, PATIENCE))
        assert data == self.world.data(entry)[offset : offset + size]
        return data

    def state(self, entry: ImageEntry) -> str:
        return self.links.report(entry).state

    async def linked(self, entry: ImageEntry) -> None:
        assert await self.links.wait_settled(entry) == "linked", self.links.report(entry)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, which is looked at every 20 s of the mock clock."""
        with trio.fail_after(6000):
            while not condition():  # noqa: ASYNC110 (of the mock clock)
                await trio.sleep(20)

    async def until_state(self, entry: ImageEntry, state: str) -> None:
        link = self.links._link_of(entry)
        with trio.fail_after(10_000):
            while link.state != state:
                await link.changed.wait()

    def glance_requests(self) -> int:
        return self.world.source.requests

    def kill(self) -> None:
        """As kill -9: nothing is noted, undone or held any more."""
        self.was_killed = True
        self.volumes.kill()
        self.scope.cancel()


def settings(**values: object) -> LinkSettings:
    chosen = {
        "is_on": True, "attach_deadline_s": 60.0, "detach_idle_s": IDLE_S, "concurrency_max": 4,
        "require_verified": False, "view": "raw", **values,
    }  # fmt: skip
    return LinkSettings(**chosen)  # type: ignore[arg-type]


@asynccontextmanager
async def a_linking_node(world: World, *, unmounts: bool = True, **chosen: object) -> AsyncIterator[LinkingNode]:
    """A server, until the body ends: then it is unmounted, unless it was killed or `unmounts` is false (upgrade)."""
    chunks = world.directory / "chunks"
    chunks.mkdir(exist_ok=True)
    for entry in world.entries.values():
        entry.local.link = world.noted.get(entry.number)
    volumes = MemoryVolumeLinks(world.cinder)
    made: list[LinkingNode] = []

    async def stored(entry: ImageEntry) -> None:
        if volumes.is_killed:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        world.noted[entry.number] = entry.local.link

    async with trio.open_nursery() as nursery:
        services = replace(make_services(nursery, world.source, chunks), reader_table=world.reader_table())
        views = Views("raw")
        downloading = DownloadingTemplateImageHandler(chunks, CHUNK, services, views)
        uses = ImageUses(downloading, world.overlays)  # type: ignore[arg-type]
        link_settings = settings(**chosen)
        steps = LinkSteps(volumes, downloading, views, world.escrow, link_settings, stored=stored, jitter=lambda: 1.0)
        links = Links(steps, uses, world.escrow, link_settings, nursery, world.entries.values)
        world.overlays.looked = links.look
        handler = VolumeLinkingTemplateImageHandler(downloading, links)
        handler.restore_opens({number: count for number, count in world.opens.items() if count})
        await links.restore(world.escrow.held())
        nursery.start_soon(links.run)
        node = LinkingNode(world, handler, downloading, links, volumes, nursery.cancel_scope)
        made.append(node)
        yield node
        if not node.was_killed:
            if unmounts:
                await links.close()
            else:
                node.volumes.kill()  # as far as Cinder and the fds of the server are concerned
            await handler.close()
        nursery.cancel_scope.cancel()
        _close_as_its_end_does(steps.leases)


def _close_as_its_end_does(leases: VolumeLeases) -> None:
    for lending in leases._lent.values():
        os.close(lending._lease_fd)
    for end in leases._ends.values():
        os.close(end)


def held(world: World) -> set[str]:
    return set(world.escrow.kept)
