"""What basefs knows of an image: Glance's word, the verdict of the checks, and what happened here.

`ImageRecord` and `Verdict` are immutable and replaced as a whole; `ImageEntry` is the one mutable object
per image, owned by the trio loop: only code in the loop changes it, and no `await` stands between reading
and changing it.
"""

from dataclasses import dataclass, field
from typing import Literal

from basefs.core.link_record import LinkRecord

VerdictState = Literal["unchecked", "servable", "refused"]
WholeState = Literal["unknown", "verified", "no_hash", "refetching", "quarantined"]
"""What is known of an image as a whole: `unknown` (not complete, or not hashed yet), `verified` (it has the hash that
Glance tells), `no_hash` (complete; Glance tells none), `refetching` (the hash was wrong once; it is fetched again),
`quarantined` (wrong again: left for the operator)."""
WHOLE: tuple[WholeState, ...] = ("verified", "no_hash")
"""All of it is here, and as right as can be known: what may become a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image as Glance describes it. `size` is in bytes, None while the image is queued."""

    image_id: str
    name: str
    size: int | None
    disk_format: str | None
    container_format: str | None
    status: str
    visibility: str
    os_hidden: bool
    owner: str | None
    created_at: str
    updated_at: str
    checksum: str | None
    os_hash_algo: str | None
    os_hash_value: str | None
    is_signed: bool
    boot_trace: str | None = None
    """What another node has left there of a boot, unchecked (`core/trace_property`); only where traces are shared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the image's bytes may be shown. `reason` says why not, in an operator's words.

    `shown_size`: see `LocalState`; of a verdict on the content that was made just now.
    """

    state: VerdictState
    reason: str | None = None
    shown_size: int | None = None


UNCHECKED = Verdict(state="unchecked")


@dataclass(slots=True, kw_only=True)
class LocalState:
    """What happened to the image on this node; persisted.

    `used_at_ns` is None until the first open, utime or warm: only then the image has local state and
    its own mtime. `fetched_bytes` counts what was ever fetched for it here, header included;
    `cached_bytes` is what is in the chunk file (while that is closed: as of its last closing).
    `last_used_ns` is when it was last opened, closed or seen to be read: what the evictor goes by.
    `shown_size` is what the content check found the raw view to be long; None where the stored bytes are shown.
    `checked_view` is the `view` that the verdict on the content of a qcow2 image was made for.
    `is_wanted`: nova asked for all of it (its pre-cache call). `is_graduated`: we made it a lower file of its own name.
    `is_replaying`: its boot trace is fetched ahead of those who have it open; a server that follows goes on with that.
    `link` is what was begun in Cinder for it. `no_volume` is why it has no volume that may be linked: empty when it has
    one, None when that was not looked at; only `template_image_handler = volume-linking` asks.
    `glance_only`: a store behind Glance may have given wrong bytes of it, so it is read through Glance.
    `locations`: at which stores behind Glance it was read, without keys; Glance is asked again, and may be away.
    """

    used_at_ns: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    fetched_bytes: int = 0
    cached_bytes: int = 0
    source_kind: str | None = None
    source_reason: str | None = None
    last_used_ns: int | None = None
    pinned: bool = False
    shown_size: int | None = None
    checked_view: str = "stored"
    is_wanted: bool = False
    whole: WholeState = "unknown"
    is_graduated: bool = False
    is_replaying: bool = False
    link: LinkRecord | None = None
    no_volume: str | None = None
    glance_only: bool = False
    locations: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class ImageEntry:
    """One image in the catalog. `number` > 0 never changes and is never used again: it makes the inode."""

    number: int
    base_name: str
    record: ImageRecord
    verdict: Verdict = UNCHECKED
    local: LocalState = field(default_factory=LocalState)
    is_gone: bool = False
    """Glance said with authority that it has no such image any more."""
    looked_at: float | None = None
    """Trio's clock when `local.source_kind` was last found out in this life."""

    @property
    def image_id(self) -> str:
        """Glance's id."""
        return self.record.image_id

    @property
    def size(self) -> int:
        """Stored bytes; 0 while Glance does not know."""
        return self.record.size or 0

    @property
    def shown_size(self) -> int:
        """Bytes that `stat` shows: those of the raw view, else the stored ones."""
        return self.size if self.local.shown_size is None else self.local.shown_size
