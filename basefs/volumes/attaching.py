"""The steps from a volume in Cinder to bytes that can be read; each is noted before it is made."""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import trio

from basefs import errors
from basefs.core.link_record import LinkRecord
from basefs.volumes.base import AttachedVolume, FoundVolume, ImageFacts, Note, VolumeBytes
from basefs.volumes.brick import Brick, Device, Helper
from basefs.volumes.cinder import Cinder, Volume
from basefs.volumes.connection import sealed_connection
from basefs.volumes.removing import HOST_KEY, IMAGE_KEY, TAG_KEY, Remover, tag_of
from basefs.volumes.statuses import GrowingPauses, wait_for_status

log = logging.getLogger(__name__)

CLONE_LIMIT_S = 3600.0
"""Storage without copy-on-write copies whole volumes; nobody waits for it, reads go through Glance."""
UNDO_LIMIT_S = 20.0
"""What is not undone by then stays noted, and is undone by whoever comes next."""


class Attacher:
    """Attaches and reopens. `attach_deadline_s` holds for all steps together but the making of a clone."""

    def __init__(self, cinder: Cinder, brick: Brick, remover: Remover, *, host: str, attach_deadline_s: float) -> None:
        self._cinder = cinder
        self._brick = brick
        self._remover = remover
        self._host = host
        self._deadline_s = attach_deadline_s

    async def attach(self, image: ImageFacts, found: FoundVolume, note: Note) -> AttachedVolume:
        """See `VolumeLinks.attach`."""
        way = _Way(LinkRecord(stage="reserving", volume_id=found.volume_id, found_by=found.found_by), note)
        try:
            if not found.is_multiattach:
                await self._make_clone(image, way)
            with _limit(f"volume {found.volume_id} is not attached", self._deadline_s):
                return await self._attach(image, way)
        except BaseException:
            await self._undo(way)
            raise

    async def reopen(self, image: ImageFacts, record: LinkRecord, note: Note) -> AttachedVolume:
        """See `VolumeLinks.reopen`. When Cinder cannot be asked the record stays as it is: it may be tried again."""
        way = _Way(record, note)
        try:
            with _limit(f"attachment {record.attachment_id} is not reopened", self._deadline_s):
                return await self._reopen(image, way)
        except BaseException:
            await self._undo(way)
            raise

    # --- steps ----------------------------------------------------------------------------------------

    async def _make_clone(self, image: ImageFacts, way: "_Way") -> None:
        tag = str(uuid.uuid4())
        await way.goes_to(stage="cloning", is_cloned=True, clone_tag=tag)
        with _limit(f"no clone of volume {way.record.volume_id}", CLONE_LIMIT_S):
            source = await self._cinder.volume(way.record.volume_id)
            metadata = {HOST_KEY: self._host, IMAGE_KEY: image.image_id, TAG_KEY: tag}
            name = f"basefs-{self._host}-{image.image_id}"
            clone_id = await self._clone(source, name, metadata, way)
            await way.goes_to(clone_id=clone_id)
            await wait_for_status(self._cinder, clone_id, ("available",))
            await self._cinder.make_readonly(clone_id)

    async def _clone(self, source: Volume, name: str, metadata: Mapping[str, str], way: "_Way") -> str:
        """A clone of a volume that Glance is attaching to read, or detaching, is refused: it is tried again.

        Readers whose bytes come through Glance meanwhile make that the rule with the first open of a cold image.
        """
        pauses, until = GrowingPauses(), trio.current_time() + self._deadline_s
        while True:
            try:
                with way.doubt():
                    return await self._cinder.clone(source, name=name, metadata=metadata)
            except errors.VolumeBusyError as exc:
                if trio.current_time() >= until:
                    raise
                log.debug("%s", exc)
                await pauses.pause()

    async def _attach(self, image: ImageFacts, way: "_Way") -> AttachedVolume:
        volume_id = way.record.attached_volume_id
        assert volume_id is not None
        async with self._brick.helper() as helper:
            # First, for it takes longest; while the attachment is reserved nobody else can attach the volume.
            properties = await helper.properties(host=self._host, towards=await self._cinder.host_name())
            await self._reserve(volume_id, way)
            attachment_id = way.record.attachment_id
            assert attachment_id is not None
            await way.goes_to(stage="connecting")
            connector = {**properties, "mountpoint": tag_of(self._host)}
            connection_info = await self._cinder.connect(attachment_id, connector)
            opened = await self._connect(helper, connection_info, image, way)
            try:
                await self._cinder.complete(attachment_id)
                await way.goes_to(stage="attached")
            except BaseException:
                opened.close()
                raise
        return AttachedVolume(record=way.record, bytes=opened, connection_fd=way.take_connection())

    async def _reserve(self, volume_id: str, way: "_Way") -> None:
        """Others' attachments that are being made refuse ours for a moment: it is tried again."""
        pauses = GrowingPauses()
        while True:
            before = await self._cinder.attachments_of(volume_id)
            await way.goes_to(stage="reserving", attachments_before=tuple(one.attachment_id for one in before))
            try:
                with way.doubt():
                    attachment_id = await self._cinder.reserve(volume_id)
            except errors.VolumeBusyError as exc:
                log.debug("%s", exc)
                await pauses.pause()
                continue
            await way.goes_to(attachment_id=attachment_id)
            return

    async def _connect(
        self, helper: Helper, connection_info: Mapping[str, Any], image: ImageFacts, way: "_Way"
    ) -> VolumeBytes:
        if connection_info.get("encrypted"):
            raise errors.NoVolumeError(f"volume {way.record.attached_volume_id} is encrypted")
        # Known to the undoing from before it is made: it may fail half-way.
        way.knows_connection(sealed_connection(connection_info))
        assert way.connection_fd is not None
        device = await helper.connect(way.connection_fd, self._deadline_s)
        way.knows_connection(device.connection_fd)
        opened = _fitting(device, image)
        way.record = replace(way.record, connector=str(connection_info.get("driver_volume_type")), device=device.path)
        return opened

    async def _reopen(self, image: ImageFacts, way: "_Way") -> AttachedVolume:
        record = way.record
        if record.stage != "attached" or record.attachment_id is None:
            way.is_noted = True
            raise errors.VolumeError(f"volume {record.volume_id} was not attached to its end")
        async with self._brick.helper() as helper:
            try:
                connection_info = await self._cinder.connection_info(record.attachment_id)
            except errors.VolumeGoneError:
                way.is_noted = True
                raise
            way.is_noted = True
            opened = await self._connect(helper, connection_info, image, way)
        try:
            if way.record != record:
                await way.note(way.record)
        except BaseException:
            opened.close()
            raise
        return AttachedVolume(record=way.record, bytes=opened, connection_fd=way.take_connection())

    async def _undo(self, way: "_Way") -> None:
        """Everything that was done, in a bounded time; what fails stays noted. Cancellation: never."""
        with trio.move_on_after(UNDO_LIMIT_S, shield=True) as limit:
            try:
                if way.has_nothing_to_undo:
                    await way.note(None)
                elif way.is_noted:
                    await self._remover.remove(way.record, way.connection_fd, way.note)
            except errors.VolumeError as exc:
                log.info("what was begun for volume %s stays noted: %s", way.record.volume_id, exc)
        if limit.cancelled_caught:
            log.info("what was begun for volume %s stays noted", way.record.volume_id)
        way.close()


class _Way:
    """How far it went: the record, as it was last noted, and the connection, whose memfd is its own."""

    def __init__(self, record: LinkRecord, note: Note) -> None:
        self.record = record
        self.note = note
        self.is_noted = False
        """Whether something may have to be undone."""
        self._is_in_doubt = False
        self.connection_fd: int | None = None

    async def goes_to(self, **changes: Any) -> None:  # noqa: ANN401  fields of LinkRecord
        """Note the next step. It is to be undone from here, whether or not the note was made."""
        self.record = replace(self.record, **changes)
        self.is_noted = True
        await self.note(self.record)

    @contextmanager
    def doubt(self) -> Iterator[None]:
        """The block asks for a clone or an attachment, and has its id at the end or knows that there is none."""
        self._is_in_doubt = True
        try:
            yield
        except errors.VolumeRefusedError:
            self._is_in_doubt = False
            raise

    @property
    def has_nothing_to_undo(self) -> bool:
        """All that was noted was refused. Else others' attachments would be suspected to be ours, for a while."""
        record = self.record
        made = record.clone_id if record.is_cloned else record.attachment_id
        return self.is_noted and record.stage in ("cloning", "reserving") and made is None and not self._is_in_doubt

    def knows_connection(self, fd: int) -> None:
        """`fd` of `sealed_connection`, ours from here."""
        self.close()
        self.connection_fd = fd

    def take_connection(self) -> int:
        """The memfd, the caller's."""
        assert self.connection_fd is not None
        fd, self.connection_fd = self.connection_fd, None
        return fd

    def close(self) -> None:
        if self.connection_fd is not None:
            os.close(self.connection_fd)
            self.connection_fd = None


@contextmanager
def _limit(what: str, limit_s: float) -> Iterator[None]:
    try:
        with trio.fail_after(limit_s):
            yield
    except trio.TooSlowError:
        raise errors.VolumeError(f"{what} within {limit_s:g} s") from None


def _fitting(device: Device, image: ImageFacts) -> VolumeBytes:
    size = device.bytes.size
    if size < image.size:
        device.bytes.close()
        raise errors.NoVolumeError(f"what was attached has {size} bytes, less than the image's {image.size}")
    return device.bytes
