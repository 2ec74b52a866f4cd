"""What was begun in Cinder for an image on this host: noted before it is done, so that the next server can undo it."""

from dataclasses import dataclass
from typing import Literal

LinkStage = Literal["cloning", "reserving", "connecting", "attached", "detaching"]
"""The last step that was begun; `attached`: all were done."""
FoundBy = Literal["location", "map", "metadata"]
"""How the volume is known to be the image's: Glance's location, the operator's map, or the volume's metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRecord:
    """One image's volume on this host. Holds no secret: ids, names, paths.

    `clone_id` is the volume that was made of the image's for this host, None where the image's own is attached (or the
    clone has no id yet); `clone_tag` is in its metadata from the beginning, so one whose id was lost is found by it.
    `attachments_before` are those the volume had when ours was asked for: one that has no connector and is not among
    them may be ours, should its id have been lost. `connector` is os-brick's `driver_volume_type`, `device` the path,
    None where there is none.
    """

    stage: LinkStage
    volume_id: str
    found_by: FoundBy
    is_cloned: bool = False
    clone_tag: str | None = None
    clone_id: str | None = None
    attachments_before: tuple[str, ...] = ()
    attachment_id: str | None = None
    connector: str | None = None
    device: str | None = None

    @property
    def attached_volume_id(self) -> str | None:
        """The volume that is attached, or is to be; None while the clone is being asked for."""
        return self.clone_id if self.is_cloned else self.volume_id
