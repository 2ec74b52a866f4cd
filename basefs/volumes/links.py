"""`VolumeLinks` over a real Cinder and os-brick."""

from collections.abc import Mapping

import trio
from oslo_config import cfg

from basefs import errors
from basefs.config.volume_options import VolumeLinkingSettings
from basefs.core.link_record import LinkRecord
from basefs.volumes.access import open_cinder
from basefs.volumes.attaching import Attacher
from basefs.volumes.base import AttachedVolume, FoundVolume, ImageFacts, Note, VolumeLinks
from basefs.volumes.brick import Brick
from basefs.volumes.bytes import FdVolumeBytes
from basefs.volumes.cinder import Cinder
from basefs.volumes.connection import read_connection
from basefs.volumes.finding import Locations, VolumeFinder
from basefs.volumes.removing import Remover


def open_volume_links(
    conf: cfg.ConfigOpts, settings: VolumeLinkingSettings, locations: Locations, *, nursery: trio.Nursery
) -> VolumeLinks:
    """The links that `[cinder]` and `[volume_linking]` describe. Nothing is sent or started yet.

    Helper processes and what reads their logs live in `nursery`, and end with it. Without a usable `[cinder]` no image
    has a volume, and that is the reason: most who have no Cinder have never heard of the section.
    """
    try:
        cinder = open_cinder(conf)
    except errors.ConfigError as exc:
        return NoVolumeLinks(str(exc))
    brick = Brick(
        nursery=nursery,
        helpers_max=settings.attach_concurrency_max,
        lock_path=settings.lock_path,
        is_multipath=settings.multipath,
    )
    return CinderVolumeLinks(cinder, locations, settings, brick)


class CinderVolumeLinks:
    """See `VolumeLinks`."""

    def __init__(self, cinder: Cinder, locations: Locations, settings: VolumeLinkingSettings, brick: Brick) -> None:
        self._finder = VolumeFinder(
            cinder,
            locations,
            image_volume_map=settings.image_volume_map,
            use_volume_metadata=settings.use_volume_metadata,
        )
        self._remover = Remover(cinder, brick, host=settings.host)
        self._attacher = Attacher(
            cinder, brick, self._remover, host=settings.host, attach_deadline_s=settings.attach_deadline_s
        )

    async def find(self, image: ImageFacts) -> FoundVolume:
        """See `VolumeLinks`."""
        return await self._finder.find(image)

    async def attach(self, image: ImageFacts, found: FoundVolume, note: Note) -> AttachedVolume:
        """See `VolumeLinks`."""
        return await self._attacher.attach(image, found, note)

    async def reopen(self, image: ImageFacts, record: LinkRecord, note: Note) -> AttachedVolume:
        """See `VolumeLinks`."""
        return await self._attacher.reopen(image, record, note)

    async def adopt(self, record: LinkRecord, fd: int, connection_fd: int) -> AttachedVolume:
        """See `VolumeLinks`."""
        read_connection(connection_fd)
        return AttachedVolume(record=record, bytes=FdVolumeBytes(fd), connection_fd=connection_fd)

    async def detach(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:
        """See `VolumeLinks`."""
        await self._remover.remove(record, connection_fd, note)

    async def remove_unknown(self, records: Mapping[str, LinkRecord]) -> None:
        """See `VolumeLinks`."""
        await self._remover.remove_unknown(records)


class NoVolumeLinks:
    """See `VolumeLinks`; of a host that cannot ask any Cinder, for this reason. What is noted stays noted."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def find(self, image: ImageFacts) -> FoundVolume:  # noqa: ARG002
        """See `VolumeLinks`."""
        raise errors.NoVolumeError(self._reason)

    async def attach(self, image: ImageFacts, found: FoundVolume, note: Note) -> AttachedVolume:  # noqa: ARG002
        """See `VolumeLinks`."""
        raise errors.VolumeError(self._reason)

    async def reopen(self, image: ImageFacts, record: LinkRecord, note: Note) -> AttachedVolume:  # noqa: ARG002
        """See `VolumeLinks`."""
        raise errors.VolumeError(self._reason)

    async def adopt(self, record: LinkRecord, fd: int, connection_fd: int) -> AttachedVolume:
        """See `VolumeLinks`: a device that is attached needs no Cinder."""
        read_connection(connection_fd)
        return AttachedVolume(record=record, bytes=FdVolumeBytes(fd), connection_fd=connection_fd)

    async def detach(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:  # noqa: ARG002
        """See `VolumeLinks`."""
        raise errors.VolumeError(self._reason)

    async def remove_unknown(self, records: Mapping[str, LinkRecord]) -> None:
        """See `VolumeLinks`: nothing can be known of."""
