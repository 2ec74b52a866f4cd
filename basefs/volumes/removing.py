"""The way back: from whatever stage of attaching to nothing left on the host and in Cinder. Every step may be repeated.

The order is the point: first the host, then Cinder. An attachment that is deleted while the host has its device leaves
a device that the storage may give to somebody else (CVE-2023-2088).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import close

import trio

from basefs import errors
from basefs.core.link_record import LinkRecord
from basefs.volumes.base import Note
from basefs.volumes.brick import Brick
from basefs.volumes.cinder import Attachment, Cinder, Volume
from basefs.volumes.connection import sealed_connection
from basefs.volumes.helper import NO_DISCONNECT
from basefs.volumes.statuses import GrowingPauses, wait_until_gone

log = logging.getLogger(__name__)

LOST_AFTER_S = 30.0
"""What was asked for without an answer is there after so long, or never will be.

And an attachment that is reserved for so long is ours or dead: nova, Glance and other basefs' give theirs a connector
within a second, and no other is made until it is gone.
"""
_NOTHING = ""
CLONE_GONE_LIMIT_S = 60.0
HOST_KEY, IMAGE_KEY, TAG_KEY = "basefs_host", "basefs_image_id", "basefs_link"
"""Metadata of clones."""


def tag_of(host: str) -> str:
    """What our attachments have as their mount point: by it they are known as ours."""
    return f"basefs@{host}"


class Remover:
    """Disconnects, deletes attachments and clones."""

    def __init__(self, cinder: Cinder, brick: Brick, *, host: str) -> None:
        self._cinder = cinder
        self._brick = brick
        self._host = host
        self._seen: dict[str, dict[str, float]] = {}
        """What was looked for -> what was found, or nothing -> when it first was, monotonic."""

    async def remove(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:
        """See `VolumeLinks.detach`; for a record of any stage."""
        if record.stage != "detaching":
            record = replace(record, stage="detaching")
            await note(record)
        volume_id = record.attached_volume_id
        if record.is_cloned and record.clone_id is None:
            clone = await self._lost_clone(record)
            volume_id = clone.volume_id if clone else None
        if volume_id is not None:
            await self._remove_attachments(volume_id, record, connection_fd)
            if record.is_cloned:
                await self._delete_clone(volume_id)
        await note(None)

    async def _lost_clone(self, record: LinkRecord) -> Volume | None:
        if record.clone_tag is None:
            return None
        for one in await self._cinder.volumes_by(metadata={TAG_KEY: record.clone_tag}):
            if one.metadata.get(TAG_KEY) == record.clone_tag:
                return one
        self._certain(f"clone of volume {record.volume_id}", ())
        return None

    # --- attachments ----------------------------------------------------------------------------------

    async def _remove_attachments(self, volume_id: str, record: LinkRecord, connection_fd: int | None) -> None:
        try:
            attachments = await self._cinder.attachments_of(volume_id)
        except errors.VolumeGoneError:
            attachments = []
        if record.is_cloned:
            # The clone is this host's alone, so all its attachments are.
            ours = [one.attachment_id for one in attachments]
        elif record.attachment_id is not None:
            ours = [record.attachment_id]
        else:
            ours = self._lost_ones(attachments, record)
        if record.attachment_id is not None and record.attachment_id not in ours:
            ours.append(record.attachment_id)
        others = [one for one in attachments if one.attachment_id not in ours]
        for attachment_id in ours:
            known_fd = connection_fd if attachment_id == record.attachment_id else None
            await self._disconnect(attachment_id, record, known_fd, may_be_shared=bool(others))
            with suppress(errors.VolumeGoneError):
                await self._cinder.delete_attachment(attachment_id)

    def _lost_ones(self, attachments: Sequence[Attachment], record: LinkRecord) -> list[str]:
        """Those that can only be ours.

        Raises:
            VolumeError: that cannot be told yet: one that is there may be another's, one may come yet.
        """
        maybe = [
            one.attachment_id
            for one in attachments
            if one.status == "reserved" and one.server_id is None and one.attachment_id not in record.attachments_before
        ]
        self._certain(f"attachment of volume {record.attached_volume_id}", maybe)
        return maybe

    def _certain(self, what: str, found: Sequence[str]) -> None:
        """Return when the same was found for LOST_AFTER_S.

        Raises:
            VolumeError: it was not.
        """
        now, before = time.monotonic(), self._seen.pop(what, {})
        seen = {one: before.get(one, now) for one in (_NOTHING, *found)}
        if any(now - since < LOST_AFTER_S for since in seen.values()):
            self._seen[what] = seen
            raise errors.VolumeError(f"{what}: whether one is ours can be told in {LOST_AFTER_S:g} s")

    async def _disconnect(
        self, attachment_id: str, record: LinkRecord, connection_fd: int | None, *, may_be_shared: bool
    ) -> None:
        asked_fd = None
        try:
            if connection_fd is None:
                connection_fd = asked_fd = await self._asked_connection(attachment_id, record)
            if connection_fd is None:
                return
            async with self._brick.helper() as helper:
                users = await helper.disconnect(connection_fd, may_be_shared=may_be_shared)
            if users:
                log.info("attachment %s: its device stays connected, for %s", attachment_id, ", ".join(users))
        finally:
            if asked_fd is not None:
                close(asked_fd)

    async def _asked_connection(self, attachment_id: str, record: LinkRecord) -> int | None:
        """The connection as Cinder knows it; None if the attachment is gone or never had a connector."""
        try:
            connection_info = await self._cinder.connection_info(attachment_id)
        except errors.VolumeGoneError:
            if record.device is not None and record.connector not in NO_DISCONNECT:
                log.warning(
                    "attachment %s is gone from Cinder, and with it what is needed to disconnect %s: look whether the "
                    "device is left on this host",
                    attachment_id, record.device,
                )  # fmt: skip
            return None
        if "driver_volume_type" not in connection_info:
            return None
        is_known = record.attachment_id == attachment_id and record.device is not None
        return sealed_connection(connection_info, {"type": "block", "path": record.device} if is_known else None)

    # --- clones ---------------------------------------------------------------------------------------

    async def _delete_clone(self, clone_id: str) -> None:
        with trio.move_on_after(CLONE_GONE_LIMIT_S) as limit, suppress(errors.VolumeGoneError):
            pauses = GrowingPauses()
            while not await self._is_deletion_accepted(clone_id):
                await pauses.pause()
            await wait_until_gone(self._cinder, clone_id)
        if limit.cancelled_caught:
            raise errors.VolumeError(f"clone {clone_id} is not gone within {CLONE_GONE_LIMIT_S:g} s")

    async def _is_deletion_accepted(self, clone_id: str) -> bool:
        try:
            await self._cinder.delete_volume(clone_id)
        except errors.VolumeBusyError as exc:
            # It is being made still, or its attachment is about to go.
            log.debug("%s", exc)
            return False
        return True

    # --- what no record knows -------------------------------------------------------------------------

    async def remove_unknown(self, records: Mapping[str, LinkRecord]) -> None:
        """See `VolumeLinks.remove_unknown`.

        Clones are found by their metadata. Attachments of images' own volumes are looked for only when there is no
        record at all: records are noted before attachments are made, so only a lost state database loses them, and
        the search asks for every volume in use that we may see.
        """
        tags = {record.clone_tag for record in records.values()}
        clones = await self._cinder.volumes_by(metadata={HOST_KEY: self._host})
        for clone in clones:
            is_ours = clone.metadata.get(HOST_KEY) == self._host and TAG_KEY in clone.metadata
            if is_ours and clone.metadata[TAG_KEY] not in tags:
                log.info("clone %s of this host belongs to no image: it is deleted", clone.volume_id)
                await self.remove(_record_of(clone, clone_id=clone.volume_id), None, _noted_nowhere)
        if records:
            return
        for volume in await self._cinder.volumes_by(status="in-use"):
            for attachment in volume.attached:
                if attachment.tag == tag_of(self._host):
                    log.info("attachment %s of this host belongs to no image: it goes", attachment.attachment_id)
                    record = _record_of(volume, attachment_id=attachment.attachment_id)
                    await self.remove(record, None, _noted_nowhere)


def _record_of(volume: Volume, *, clone_id: str | None = None, attachment_id: str | None = None) -> LinkRecord:
    return LinkRecord(
        stage="detaching",
        volume_id=volume.volume_id,
        found_by="metadata",
        is_cloned=clone_id is not None,
        clone_tag=volume.metadata.get(TAG_KEY),
        clone_id=clone_id,
        attachment_id=attachment_id,
    )


async def _noted_nowhere(record: LinkRecord | None) -> None:
    """What Cinder's tags tell needs no record: it is found again by them."""
