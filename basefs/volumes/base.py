"""What the volume-linking handler asks of Cinder and the host. The real one and the fake pass one contract suite."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from basefs.core.link_record import FoundBy, LinkRecord

Note = Callable[[LinkRecord | None], Awaitable[None]]
"""`await note(record)` returns when the record outlives this server; None: nothing is left to undo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What must be known of an image to link it; `size` is of the stored bytes."""

    image_id: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundVolume:
    """The volume that has the image's stored bytes, from byte 0 on."""

    volume_id: str
    found_by: FoundBy
    is_multiattach: bool


class VolumeBytes(Protocol):
    """An attached volume's bytes. Once closed it answers as a volume that failed."""

    size: int
    """Bytes of the device or file, at least the image's."""

    def read_now(self, target: list[memoryview], offset: int) -> bool:
        """Fill `target` if all of it can be had without waiting; after False it holds anything. Never raises."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """All of `[offset, offset + length)`. Blocks: for threads.

        Raises:
            OSError: the volume failed.
        """
        ...

    def fd_to_hold(self) -> int | None:
        """The fd from which a later server can go on; None where there is none, and the volume must be reopened."""
        ...

    def close(self) -> None:
        """Give it back; may block. Reads that are inside must have ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedVolume:
    """An attachment whose bytes can be read. `connection_fd` is a sealed memfd of the connection_info: a secret."""

    record: LinkRecord
    bytes: VolumeBytes
    connection_fd: int


class VolumeLinks(Protocol):
    """Finds, attaches and detaches. Methods run in any number at a time; each image in one of them at most."""

    async def find(self, image: ImageFacts) -> FoundVolume:
        """The image's volume.

        Raises:
            NoVolumeError: it has none that may be linked; the message is the reason.
            VolumeError: that cannot be found out now.
        """
        ...

    async def attach(self, image: ImageFacts, found: FoundVolume, note: Note) -> AttachedVolume:
        """Attach the volume, or a clone of it, read-only. On an error everything that was done is undone, or noted.

        Raises:
            VolumeError: why not.
        Cancellation: as an error; the undoing is bounded.
        """
        ...

    async def reopen(self, image: ImageFacts, record: LinkRecord, note: Note) -> AttachedVolume:
        """Go on with an attachment that an earlier server or the life before a reboot made.

        Raises:
            VolumeError: it cannot be had any more; it is undone, or noted.
        """
        ...

    async def adopt(self, record: LinkRecord, fd: int, connection_fd: int) -> AttachedVolume:
        """Go on with an attachment whose fd (`fd_to_hold`) and connection an earlier server had held: nobody is asked.

        Both fds are the answer's; on an error they stay the caller's.

        Raises:
            VolumeError: `fd` is no volume that can be read.
        """
        ...

    async def detach(self, record: LinkRecord, connection_fd: int | None, note: Note) -> None:
        """Disconnect, delete the attachment and the clone; nobody reads any more. `connection_fd` stays the caller's.

        Raises:
            VolumeError: something is left, and noted; call it again later.
        """
        ...

    async def remove_unknown(self, records: Mapping[str, LinkRecord]) -> None:
        """Detach and delete what is this host's in Cinder by its tags, and in none of the records (by image id).

        Raises:
            VolumeError: that cannot be found out now.
        """
        ...
