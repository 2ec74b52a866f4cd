"""What is known of one image's link to its volume, and of all together. No task, nothing awaited."""

from dataclasses import dataclass, field

import trio

from basefs.catalog.checks import View
from basefs.catalog.records import ImageEntry
from basefs.core.histogram import DurationHistogram
from basefs.core.link_record import LinkRecord
from basefs.core.retry import backoff_s
from basefs.handlers.base import LinkReport, LinkState
from basefs.handlers.linked import LinkedImage, VolumeSource

RETRY_BASE_S, RETRY_CAP_S = 5.0, 600.0
STEADY_S = 600.0
"""A volume that was read from for so long begins its pauses anew when it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """`is_on`: images are linked; else what an earlier server linked is detached. The others are options."""

    is_on: bool
    attach_deadline_s: float
    detach_idle_s: float
    concurrency_max: int
    require_verified: bool
    view: View


@dataclass(slots=True)
class LinkCounters:
    """Since the server began."""

    attaches: int = 0
    attach_failures: int = 0
    breaks: int = 0
    detaches: int = 0
    detach_failures: int = 0
    attach_durations: DurationHistogram = field(default_factory=DurationHistogram)


@dataclass(slots=True, eq=False)
class Link:
    """One image's link.

    `source` is what is open of the volume; `image` is what the image is read from, set exactly in the state `linked`.
    """

    entry: ImageEntry
    keep_until: float
    """Trio's clock until which it is wanted though nobody uses it: the last close and `detach_idle_s`."""
    state: LinkState = "none"
    reason: str | None = None
    source: VolumeSource | None = None
    image: LinkedImage | None = None
    connection_fd: int | None = None
    """The connection_info of what is noted, as `VolumeLinks.detach` wants it; ours."""
    is_ordered_off: bool = False
    """An operator detached it: it stays so until it is opened again."""
    is_inherited: bool = False
    """What is noted was attached by an earlier server, and may be had again without its fd."""
    failures: int = 0
    retry_at: float = 0.0
    linked_at: float | None = None
    detach_failures: int = 0
    detach_at: float = 0.0
    is_running: bool = False
    """Its task is at work."""
    attaching: trio.CancelScope | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    """Set, and replaced, whenever something of this changes."""

    @property
    def record(self) -> LinkRecord | None:
        """What is noted: None when there is nothing to undo."""
        return self.entry.local.link

    @property
    def is_under_way(self) -> bool:
        """Whether it is about to be linked, as far as is known."""
        return self.state in ("finding", "linking", "reopening") or (self.state == "none" and self.is_running)

    def set(self, state: LinkState, reason: str | None = None) -> None:
        """It stands there now."""
        self.state, self.reason = state, reason
        self.tell()

    def tell(self) -> None:
        """Wake who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    def refused(self, reason: str, *, again_s: float) -> None:
        """It is not to be linked; that is looked at again after `again_s`."""
        self.retry_at = trio.current_time() + again_s
        self.set("refused", reason)

    def failed(self, reason: str, *, jitter: float) -> None:
        """Something went wrong that may go right later."""
        now = trio.current_time()
        if self.linked_at is not None and now - self.linked_at >= STEADY_S:
            self.failures = 0
        self.linked_at = None
        self.failures += 1
        self.retry_at = now + backoff_s(self.failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=jitter)
        self.set("broken", reason)

    def serve(self, source: VolumeSource, image: LinkedImage) -> None:
        """The image is read from the volume from here."""
        self.source, self.image, self.linked_at = source, image, trio.current_time()
        self.set("linked")

    def stop_serving(self) -> None:
        """The image is read through Glance from here; the volume is open still, and attached."""
        if self.image is not None:
            self.image.source.stop()
            self.image = None
            self.set("detaching")

    def detach_failed(self, *, jitter: float) -> None:
        """What is noted is still there."""
        self.detach_failures += 1
        pause_s = backoff_s(self.detach_failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=jitter)
        self.detach_at = trio.current_time() + pause_s

    def report(self) -> LinkReport:
        """See `LinkReport`."""
        return LinkReport(state=self.state, reason=self.reason, record=self.record)
