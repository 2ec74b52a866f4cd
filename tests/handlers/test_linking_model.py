"""Random lives of linked images: right bytes whatever happens, nothing detached that is in use, nothing left behind."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.core.link_record import LinkRecord
from basefs.volumes.base import Note
from tests.fakes.clock import jumping_clock
from tests.fakes.memory_volumes import MemoryVolumeLinks
from tests.handlers.linking_node import LinkingNode, World, a_linking_node, held

IMAGES = 3
SIZE = 3 << 20
STEPS = ("find", "clone", "reserve", "connect", "open", "complete", "disconnect", "delete_attachment", "delete_clone")

images = st.integers(0, IMAGES - 1)
actions = st.one_of(
    st.tuples(
        st.sampled_from(("open", "open", "release", "read", "read", "unlink", "overlay", "fail", "heal")), images
    ),
    st.tuples(st.just("fault"), st.sampled_from(STEPS), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from((0, 1, 30, 400))),
    st.tuples(st.sampled_from(("kill", "reboot", "upgrade", "blind", "see"))),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Failures are told as warnings; errors, which are bugs, still fail the test."""
    logger = logging.getLogger("basefs")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


class Life:
    """What a user, nova, Cinder and an operator do to a node, and what must hold meanwhile."""

    def __init__(self, directory: Path) -> None:
        self.world = World(directory)
        self.entries = [
            self.world.add(bytes([65 + n]) * SIZE, is_multiattach=n != 1, has_volume=True) for n in range(IMAGES)
        ]
        self.node: LinkingNode | None = None

    def check_detach(self, record: LinkRecord) -> None:
        node = self.node
        if node is None:
            return
        entry = next(one for one in self.entries if one.local.link is not None and one.local.link == record)
        is_used = self.world.opens.get(entry.number) or entry.base_name in self.world.overlays.bases
        is_wished = node.state(entry) == "detaching" and record.stage == "attached"
        assert not (is_used and is_wished), f"detached in use: {record}"

    async def act(self, node: LinkingNode, action: tuple[Any, ...]) -> None:
        name, world = action[0], self.world
        if name == "wait":
            await trio.sleep(action[1])
        elif name == "fault":
            world.cinder.on(action[1]).fails(times=action[2], late=action[3])
        elif name in ("blind", "see"):
            world.overlays.is_known = name == "see"
            node.links.look()
        elif len(action) > 1:
            await self.act_on(node, name, self.entries[action[1]])

    async def act_on(self, node: LinkingNode, name: str, entry: Any) -> None:
        world = self.world
        if name == "open":
            await node.open(entry)
        elif name == "release" and world.opens.get(entry.number):
            await node.release(entry)
        elif name == "read":
            await node.read(entry, 1234, 100_000)
            await node.read(entry, SIZE - 5000, 10_000)
        elif name == "unlink" and not world.opens.get(entry.number):
            await node.handler.remove_image(entry)
        elif name == "overlay":
            world.overlays.bases ^= {entry.base_name}
            node.links.look()
        elif name == "fail":
            world.volume(entry).breaks()
        elif name == "heal":
            for volume in world.cinder.volumes.values():
                volume.heals()

    async def run(self, lives: list[list[tuple[Any, ...]]]) -> None:
        for life in lives:
            ends = [n for n, action in enumerate(life) if action[0] in ("kill", "reboot", "upgrade")]
            end = life[ends[0]][0] if ends else "upgrade"
            async with a_linking_node(self.world, unmounts=False) as node:
                self.node = node
                for action in life[: ends[0] if ends else None]:
                    await self.act(node, action)
                if end != "upgrade":
                    node.kill()
            self.node = None
            if end == "reboot":
                self.world.escrow.close()
                self.world.opens.clear()
        await self.finish()

    async def finish(self) -> None:
        world = self.world
        world.cinder.behave()
        for volume in world.cinder.volumes.values():
            volume.heals()
        world.overlays.bases.clear()
        world.overlays.is_known = True
        async with a_linking_node(world) as node:
            self.node = node
            for entry in self.entries:
                await node.read(entry)
                while world.opens.get(entry.number):
                    await node.release(entry)
            await node.until(world.cinder.is_clean)
            assert held(world) == set()
            assert not any(world.noted.values())
            self.node = None


class CheckedLinks(MemoryVolumeLinks):
    life: Life

    async def detach(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:
        self.life.check_detach(record)
        await super().detach(record, connection_fd, note)


@settings(max_examples=15, deadline=None)
@given(lives=st.lists(st.lists(actions, min_size=4, max_size=14), min_size=1, max_size=3))
def test_random_lives(lives: list[list[tuple[Any, ...]]]) -> None:
    with tempfile.TemporaryDirectory(prefix="basefs-links-") as directory, pytest.MonkeyPatch.context() as patch:
        life = Life(Path(directory))
        patch.setattr(CheckedLinks, "life", life, raising=False)
        patch.setattr("tests.handlers.linking_node.MemoryVolumeLinks", CheckedLinks)
        try:
            trio.run(life.run, lives, clock=jumping_clock())
        finally:
            life.world.escrow.close()
            for one in list(life.world.cinder.open_bytes):
                one.close()
