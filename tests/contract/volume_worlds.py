"""A Cinder with image-volumes, in memory or real, of which the contract suite asks the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trio

from basefs.config.loading import load_settings
from basefs.core.link_record import LinkRecord
from basefs.sources.access import open_glance
from basefs.sources.locations import GlanceLocations
from basefs.volumes.access import open_cinder
from basefs.volumes.base import ImageFacts, VolumeLinks
from basefs.volumes.brick import HELPER_COMMAND, Brick
from basefs.volumes.links import CinderVolumeLinks
from tests.fakes.memory_volumes import MemoryCinder, MemoryVolumeLinks
from tools.rig import Rig
from tools.rig.cinder import Backend


class Notes:
    """A `note` that keeps every record; `hold_at` makes a note of that number (from 0) hang, as if the server died."""

    def __init__(self, hold_at: int | None = None) -> None:
        self.records: list[LinkRecord | None] = []
        self.hold_at = hold_at
        self.is_held = trio.Event()
        self.is_over = False

    async def __call__(self, record: LinkRecord | None) -> None:
        if len(self.records) == self.hold_at:
            self.hold_at = None
            self.is_held.set()
            await trio.sleep_forever()
        self.records.append(record)

    @property
    def last(self) -> LinkRecord | None:
        return self.records[-1] if self.records else None


class World(Protocol):
    """One Cinder."""

    def links(self, host: str, nursery: trio.Nursery) -> VolumeLinks: ...

    def image(self, data: bytes, *, is_multiattach: bool = True) -> ImageFacts:
        """An image that has a volume with these bytes."""
        ...

    def image_without_volume(self) -> ImageFacts: ...

    def attachments(self) -> list[str]: ...

    def clones(self) -> list[str]: ...

    def forget_attachment(self, attachment_id: str) -> None:
        """An operator deletes it."""
        ...

    def close(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self.cinder = MemoryCinder()

    def links(self, host: str, nursery: trio.Nursery) -> VolumeLinks:
        return MemoryVolumeLinks(self.cinder, host=host)

    def image(self, data: bytes, *, is_multiattach: bool = True) -> ImageFacts:
        image_id = f"image-{len(self.cinder.volumes)}"
        self.cinder.add_volume(data, image_id=image_id, is_multiattach=is_multiattach)
        return ImageFacts(image_id=image_id, size=len(data))

    def image_without_volume(self) -> ImageFacts:
        return ImageFacts(image_id="image-none", size=1)

    def attachments(self) -> list[str]:
        return list(self.cinder.attachments)

    def clones(self) -> list[str]:
        return [one.volume_id for one in self.cinder.clones()]

    def forget_attachment(self, attachment_id: str) -> None:
        del self.cinder.attachments[attachment_id]

    def close(self) -> None:
        assert self.cinder.is_clean()


_images: dict[tuple[str, bytes, bool, str], str] = {}


class RealWorld:
    """A rig's Cinder; `conf_lines` may lead to a front before it, `command` to another helper."""

    def __init__(self, rig: Rig, directory: Path, conf_lines: str | None = None) -> None:
        self.rig = rig
        self._directory = directory
        self._cinder = rig.cinder_api()
        (directory / "base").mkdir()
        self._conf_path = directory / "basefs.conf"
        self._conf_lines = conf_lines or rig.conf_lines()
        self._closes: list[Callable[[], None]] = []
        self.helper_command = HELPER_COMMAND
        self.brick: Brick | None = None
        """One for all hosts: a helper takes 0.8 s to start."""

    def links(self, host: str, nursery: trio.Nursery, options: str = "") -> CinderVolumeLinks:
        directory = self._directory
        self._conf_path.write_text(
            f"[basefs]\nmountpoint = {directory}/base\ncache_dir = {directory}/cache\ncontrol_socket = {directory}/s\n"
            f"[volume_linking]\nhost = {host}\n{options}\n{self._conf_lines}"
        )
        conf, settings = load_settings([str(self._conf_path)])
        access = open_glance(conf, threads_max=2)
        self._closes.append(access.close)
        locations = GlanceLocations(access).locations
        self.brick = self.brick or Brick(
            nursery=nursery,
            helpers_max=4,
            lock_path=directory / "locks",
            is_multipath=False,
            command=self.helper_command,
        )
        return CinderVolumeLinks(open_cinder(conf), locations, settings.volume_linking, self.brick)

    def image(self, data: bytes, *, is_multiattach: bool = True, backend: Backend = "loop") -> ImageFacts:
        """One for all tests: making it takes 0.5 s."""
        key = (self.rig.directory, data, is_multiattach, backend)
        if key not in _images:
            source = self._directory / "image"
            source.write_bytes(data)
            _images[key] = self.rig.place_cinder(source, "contract", backend=backend, multiattach=is_multiattach)
        return ImageFacts(image_id=_images[key], size=len(data))

    def image_without_volume(self) -> ImageFacts:
        return ImageFacts(image_id=self.rig.upload(os.urandom(1000), "no volume"), size=1000)

    def attachments(self) -> list[str]:
        return [one["id"] for one in self._cinder.attachments()]

    def clones(self) -> list[str]:
        return [one["id"] for one in self._cinder.volumes() if "basefs_host" in one["metadata"]]

    def forget_attachment(self, attachment_id: str) -> None:
        self._cinder.delete_attachment(attachment_id)

    def close(self) -> None:
        for close in self._closes:
            close()
