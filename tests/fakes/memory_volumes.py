"""A Cinder and hosts in memory: `MemoryVolumeLinks` passes the contract suite of the real one.

    cinder = MemoryCinder()
    volume = cinder.add_volume(b"...", image_id=image_id)             # is_multiattach=False: it is cloned
    links = MemoryVolumeLinks(cinder, host="a")
    cinder.on("connect").fails(times=1)                                # or .hangs(): until `release()`
    attached = await links.attach(facts, await links.find(facts), note)
    volume.breaks()                                                    # reads of its device: EIO; `heals()`
    assert cinder.is_clean()

Steps, in the order in which they are made: find, clone, reserve, connect, open, complete; disconnect,
delete_attachment, delete_clone; list.
"""

import errno
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import trio

from basefs import errors
from basefs.core.link_record import FoundBy, LinkRecord
from basefs.volumes.base import AttachedVolume, FoundVolume, ImageFacts, Note

Step = Literal[
    "find", "clone", "reserve", "connect", "open", "complete", "disconnect", "delete_attachment", "delete_clone", "list"
]
GIB = 1 << 30
UNDO_LIMIT_S = 10.0
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(slots=True, eq=False)
class StepFault:
    """What happens at a step; nothing until `fails` or `hangs`. `hits` counts the calls it met."""

    times: int | None = None
    error: errors.VolumeError | None = None
    gate: trio.Event | None = None
    is_late: bool = False
    hits: int = 0
    reached: trio.Event = field(default_factory=trio.Event)
    """Set when a call meets it."""

    def fails(self, text: str = "Cinder answered 500", *, times: int | None = None, late: bool = False) -> Self:
        """The step raises VolumeError; `late`: after it was done, as when an answer is lost."""
        self.error, self.times, self.is_late = errors.VolumeError(text), times, late
        return self

    def hangs(self, *, times: int | None = None, late: bool = False) -> Self:
        """The step waits until `release()` or cancellation."""
        self.gate, self.times, self.is_late = trio.Event(), times, late
        return self

    def release(self) -> None:
        """What hangs goes on."""
        assert self.gate is not None
        self.gate.set()

    async def meet(self) -> None:
        self.hits += 1
        self.reached.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise errors.VolumeError(str(self.error))


@dataclass(slots=True, eq=False)
class MemoryVolume:
    """A volume: `data`, then zeros up to whole GiB. A clone knows whose it is."""

    volume_id: str
    data: bytes
    image_id: str
    found_by: FoundBy
    is_multiattach: bool
    size: int
    clone_of: str | None = None
    host: str | None = None
    """Whose clone it is."""
    tag: str | None = None
    failure: OSError | None = None
    hang: threading.Event | None = None
    """While there is one, threads that read its devices wait for it."""
    reads: int = 0
    """Reads of its devices that were begun."""

    def breaks(self, code: int = errno.EIO) -> None:
        """Reads of its devices, opened ones too, fail until `heals()`."""
        self.failure = OSError(code, os.strerror(code))

    def hangs(self) -> None:
        """Reads of its devices wait, in their threads, until `heals()`."""
        self.hang = threading.Event()

    def heals(self) -> None:
        self.failure = None
        if self.hang is not None:
            self.hang.set()
            self.hang = None


@dataclass(slots=True)
class MemoryAttachment:
    """One of Cinder's attachments; `host` is None until it is connected."""

    attachment_id: str
    volume_id: str
    host: str | None = None
    is_complete: bool = False


class MemoryCinder:
    """All volumes and attachments, and the devices that hosts have open; any number of hosts may use it."""

    def __init__(self) -> None:
        self.volumes: dict[str, MemoryVolume] = {}
        self.attachments: dict[str, MemoryAttachment] = {}
        self.devices: dict[str, int] = {}
        """Attachment id -> how often its device is connected; an entry without connections is gone."""
        self.open_bytes: list[MemoryVolumeBytes] = []
        self._faults: dict[Step, list[StepFault]] = {}
        self.steps: list[Step] = []
        """Every step that was made, oldest first."""

    def add_volume(
        self,
        data: bytes,
        *,
        image_id: str,
        volume_id: str | None = None,
        found_by: FoundBy = "location",
        is_multiattach: bool = True,
        size: int | None = None,
    ) -> MemoryVolume:
        """A volume behind an image; `size` in bytes, by default whole GiB."""
        volume_id = volume_id or str(uuid.uuid4())
        size = size or max(1, -(-len(data) // GIB)) * GIB
        volume = self.volumes[volume_id] = MemoryVolume(volume_id, data, image_id, found_by, is_multiattach, size)
        return volume

    def on(self, step: Step) -> StepFault:
        """A fault at the step, to be made up: `.fails()`, `.hangs()`. The first one with calls left counts."""
        fault = StepFault()
        self._faults.setdefault(step, []).append(fault)
        return fault

    def behave(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def is_clean(self) -> bool:
        """No attachment, device, open fd or clone is left."""
        return not (self.attachments or self.devices or self.open_bytes or self.clones())

    def clones(self) -> list[MemoryVolume]:
        """Those that there are."""
        return [volume for volume in self.volumes.values() if volume.clone_of is not None]

    def fault_at(self, step: Step) -> StepFault | None:
        for fault in self._faults.get(step, []):
            if (fault.error is not None or fault.gate is not None) and (
                fault.times is None or fault.hits < fault.times
            ):
                return fault
        return None


class _At:
    """`async with _At(cinder, step):` the step, before or after which its fault strikes."""

    def __init__(self, cinder: MemoryCinder, step: Step) -> None:
        self._cinder, self._step = cinder, step
        self._fault: StepFault | None = None

    async def __aenter__(self) -> None:
        self._cinder.steps.append(self._step)
        self._fault = self._cinder.fault_at(self._step)
        if self._fault is not None and not self._fault.is_late:
            await self._fault.meet()
        await trio.lowlevel.checkpoint()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._fault is not None and self._fault.is_late and kind is None:
            await self._fault.meet()


class MemoryVolumeBytes:
    """See `VolumeBytes`: over a memfd, so that its fd can be held and read like a device's."""

    def __init__(self, cinder: MemoryCinder, volume: MemoryVolume, fd: int | None = None) -> None:
        self.size = volume.size
        self._cinder, self._volume = cinder, volume
        if fd is None:
            fd = os.memfd_create(f"volume-{volume.volume_id}", os.MFD_CLOEXEC)
            os.truncate(fd, volume.size)
            os.pwrite(fd, volume.data, 0)
        self._fd = fd
        cinder.open_bytes.append(self)

    def read_now(self, target: list[memoryview], offset: int) -> bool:
        self._volume.reads += 1
        if self._volume.failure is not None or self._volume.hang is not None or self._fd < 0:
            return False
        return os.preadv(self._fd, target, offset) == sum(len(one) for one in target)

    def read(self, offset: int, length: int) -> bytes:
        self._volume.reads += 1
        if self._volume.hang is not None:
            self._volume.hang.wait()
        if self._volume.failure is not None:
            raise OSError(self._volume.failure.errno, self._volume.failure.strerror)
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"the volume ends after {offset + len(data)} bytes")
        return data

    def fd_to_hold(self) -> int | None:
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._cinder.open_bytes.remove(self)


class MemoryVolumeLinks:
    """See `VolumeLinks`; one host's."""

    def __init__(self, cinder: MemoryCinder, *, host: str = "host") -> None:
        self.cinder, self.host = cinder, host
        self.is_killed = False
        self._opened: list[MemoryVolumeBytes] = []

    def kill(self) -> None:
        """The server that uses this is dead: it notes, undoes and holds nothing more. What runs is to be cancelled."""
        self.is_killed = True
        for one in self._opened:
            one.close()

    async def find(self, image: ImageFacts) -> FoundVolume:
        async with _At(self.cinder, "find"):
            for volume in self.cinder.volumes.values():
                if volume.image_id == image.image_id and volume.clone_of is None:
                    if volume.size < image.size:
                        raise errors.NoVolumeError(f"volume {volume.volume_id} is smaller than the image")
                    return FoundVolume(
                        volume_id=volume.volume_id, found_by=volume.found_by, is_multiattach=volume.is_multiattach
                    )
            raise errors.NoVolumeError(f"image {image.image_id} has no volume")

    async def attach(self, image: ImageFacts, found: FoundVolume, note: Note) -> AttachedVolume:
        noted = _Noted(note)
        try:
            record = LinkRecord(stage="cloning", volume_id=found.volume_id, found_by=found.found_by)
            if not found.is_multiattach:
                record = await noted(replace(record, is_cloned=True, clone_tag=str(uuid.uuid4())))
                async with _At(self.cinder, "clone"):
                    clone_id = self._clone(record)
                record = await noted(replace(record, clone_id=clone_id))
            volume = self._volume(record)
            before = tuple(one.attachment_id for one in self._attachments_of(volume.volume_id))
            record = await noted(replace(record, stage="reserving", attachments_before=before))
            async with _At(self.cinder, "reserve"):
                attachment = MemoryAttachment(str(uuid.uuid4()), volume.volume_id)
                self.cinder.attachments[attachment.attachment_id] = attachment
            record = await noted(replace(record, attachment_id=attachment.attachment_id))
            record = await noted(replace(record, stage="connecting"))
            return await self._connect(attachment.attachment_id, record, volume, noted)
        except BaseException:
            await self._undo(noted)
            raise

    async def reopen(self, image: ImageFacts, record: LinkRecord, note: Note) -> AttachedVolume:
        noted = _Noted(note, record)
        try:
            if (
                record.stage != "attached"
                or record.attachment_id is None
                or record.attachment_id not in self.cinder.attachments
            ):
                raise errors.VolumeError(f"image {image.image_id}: attachment {record.attachment_id} is gone")
            return await self._connect(record.attachment_id, record, self._volume(record), noted)
        except BaseException:
            await self._undo(noted)
            raise

    async def adopt(self, record: LinkRecord, fd: int, connection_fd: int) -> AttachedVolume:
        opened = MemoryVolumeBytes(self.cinder, self._volume(record), fd)
        self._opened.append(opened)
        return AttachedVolume(record=record, bytes=opened, connection_fd=connection_fd)

    async def detach(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:
        noted = _Noted(note, record)
        await self._remove(noted)

    async def remove_unknown(self, records: Mapping[str, LinkRecord]) -> None:
        async with _At(self.cinder, "list"):
            known = {one.attachment_id for one in records.values()}
        tags = {one.clone_tag for one in records.values()}
        for attachment in list(self.cinder.attachments.values()):
            if attachment.host == self.host and attachment.attachment_id not in known:
                self._forget(attachment.attachment_id)
        for clone in self.cinder.clones():
            if clone.host == self.host and clone.tag not in tags:
                del self.cinder.volumes[clone.volume_id]

    # --- steps ----------------------------------------------------------------------------------------

    async def _connect(
        self, attachment_id: str, record: LinkRecord, volume: MemoryVolume, noted: "_Noted"
    ) -> AttachedVolume:
        attachment = self.cinder.attachments[attachment_id]
        async with _At(self.cinder, "connect"):
            attachment.host = self.host
            self.cinder.devices[attachment_id] = self.cinder.devices.get(attachment_id, 0) + 1
        async with _At(self.cinder, "open"):
            opened = noted.opened = MemoryVolumeBytes(self.cinder, volume)
            self._opened.append(opened)
        async with _At(self.cinder, "complete"):
            attachment.is_complete = True
        device = f"/dev/memory/{attachment_id}"
        record = await noted(replace(record, stage="attached", connector="memory", device=device))
        return AttachedVolume(record=record, bytes=opened, connection_fd=_sealed({"secret": "open sesame"}))

    async def _undo(self, noted: "_Noted") -> None:
        if self.is_killed:
            return
        if noted.opened is not None:
            noted.opened.close()
        with trio.move_on_after(UNDO_LIMIT_S, shield=True):
            with suppress(errors.VolumeError):  # it is noted
                await self._remove(noted)

    async def _remove(self, noted: "_Noted") -> None:
        record = noted.record
        if record is None:
            return
        await noted(replace(record, stage="detaching"))
        async with _At(self.cinder, "disconnect"):
            self.cinder.devices.pop(record.attachment_id or "", None)
        async with _At(self.cinder, "delete_attachment"):
            for attachment in self._ours(record):
                self._forget(attachment.attachment_id)
        if record.is_cloned:
            async with _At(self.cinder, "delete_clone"):
                for clone in self.cinder.clones():
                    if clone.tag == record.clone_tag:
                        del self.cinder.volumes[clone.volume_id]
        await noted(None)

    def _ours(self, record: LinkRecord) -> list[MemoryAttachment]:
        if record.attachment_id is not None:
            return [one for one in self.cinder.attachments.values() if one.attachment_id == record.attachment_id]
        return [
            one
            for one in self._attachments_of(record.attached_volume_id or "")
            if one.host is None and one.attachment_id not in record.attachments_before
        ]

    def _forget(self, attachment_id: str) -> None:
        self.cinder.devices.pop(attachment_id, None)
        self.cinder.attachments.pop(attachment_id, None)

    def _attachments_of(self, volume_id: str) -> list[MemoryAttachment]:
        return [one for one in self.cinder.attachments.values() if one.volume_id == volume_id]

    def _clone(self, record: LinkRecord) -> str:
        clone_id = str(uuid.uuid4())
        self.cinder.volumes[clone_id] = replace(
            self.cinder.volumes[record.volume_id],
            volume_id=clone_id,
            clone_of=record.volume_id,
            host=self.host,
            tag=record.clone_tag,
            failure=None,
            reads=0,
        )
        return clone_id

    def _volume(self, record: LinkRecord) -> MemoryVolume:
        volume = self.cinder.volumes.get(record.attached_volume_id or "")
        if volume is None:
            raise errors.VolumeError(f"volume {record.attached_volume_id} is gone")
        return volume


class _Noted:
    """`note`, the last record it was given, and what was opened meanwhile."""

    def __init__(self, note: Note, record: LinkRecord | None = None) -> None:
        self._note, self.record = note, record
        self.opened: MemoryVolumeBytes | None = None

    async def __call__(self, record: LinkRecord | None) -> LinkRecord:
        await self._note(record)
        former, self.record = self.record, record
        return record or former  # type: ignore[return-value]  # one of them is there


def _sealed(content: Mapping[str, str]) -> int:
    fd = os.memfd_create("link-connection", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, json.dumps(content).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
