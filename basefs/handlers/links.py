"""Which images are linked to their volumes: all links of the node, what others see of them, and their wishes.

Only `detach`, the `wait…`s, and what begins and ends a server's life wait for anything. Owned by the trio loop.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.concurrency.guarded import guarded
from basefs.core.escrow import Escrow, HeldFd
from basefs.core.retry import backoff_s
from basefs.handlers.base import LinkReport, LinkState
from basefs.handlers.lending import LEASE_PREFIX
from basefs.handlers.link import Link, LinkSettings
from basefs.handlers.link_steps import CONNECTION_PREFIX, FD_PREFIX, LinkSteps
from basefs.handlers.link_tasks import AT_HAND_AGAIN_S, SEE_WAIT_S, LinkTasks
from basefs.handlers.linked import LinkedImage
from basefs.handlers.uses import ImageUses

log = logging.getLogger(__name__)

REOPEN_WAIT_S = 5.0
"""Readers of an image whose volume is being had again wait so long, then go through Glance."""
DETACH_WAIT_S = 45.0
"""An operator's command waits so long for a detach."""
END_LIMIT_S = 15.0
"""What is not detached so long after the mount's end is left to the next `init`."""
PENDING_FAILURES_MAX = 3
"""An image whose volume failed so often in a row is completed through Glance like any other."""


class Links:
    """All links of the node. `restore`, then `run` in the service nursery, `close` at the end."""

    def __init__(
        self,
        steps: LinkSteps,
        uses: ImageUses,
        escrow: Escrow,
        settings: LinkSettings,
        nursery: trio.Nursery,
        entries: Callable[[], Collection[ImageEntry]],
    ) -> None:
        """`entries` gives every image of the catalog; tasks run in `nursery`."""
        self.steps = steps
        self._uses = uses
        self._escrow = escrow
        self._settings = settings
        self._entries = entries
        self.tasks = LinkTasks(steps, uses, settings, nursery)
        self._links: dict[int, Link] = {}
        self._reopen_until = 0.0
        steps.ask_before_replays(self.expects_volume)

    # --- what others see --------------------------------------------------------------------------------

    def image(self, entry: ImageEntry) -> LinkedImage | None:
        """What the image is read from, if it is linked."""
        link = self._links.get(entry.number)
        return None if link is None or entry.local.is_graduated else link.image

    def report(self, entry: ImageEntry) -> LinkReport:
        """How the image stands."""
        link = self._links.get(entry.number)
        return LinkReport(state="none", reason=None, record=entry.local.link) if link is None else link.report()

    def is_linked(self, entry: ImageEntry) -> bool:
        """Whether the image is read from its volume, or is about to be: there is no need to bring its bytes."""
        link = self._links.get(entry.number)
        if link is None or entry.local.is_graduated:
            return False
        is_pending = link.state == "broken" and link.failures <= PENDING_FAILURES_MAX and link.is_running
        return link.image is not None or link.is_under_way or is_pending

    def expects_volume(self, entry: ImageEntry) -> bool:
        """Whether an image that is opened now will be linked, as far as is known without asking anybody."""
        link = self._links.get(entry.number)
        if not self._settings.is_on or (link is not None and link.state in ("refused", "broken")):
            return False
        was_linked = link is not None and link.linked_at is not None
        return was_linked or entry.local.link is not None or entry.local.no_volume == ""

    def states(self) -> Counter[LinkState]:
        """How many images stand where; those of no interest are left out."""
        return Counter(link.state for link in self._links.values() if link.state != "none")

    def is_reopening(self, entry: ImageEntry) -> bool:
        """Whether readers are to wait for the volume to be had again."""
        link = self._links.get(entry.number)
        return link is not None and link.state == "reopening" and trio.current_time() < self._reopen_until

    async def wait_reopened(self, entry: ImageEntry) -> None:
        """Return when `is_reopening` is over."""
        link = self._links[entry.number]
        with trio.move_on_at(self._reopen_until):
            while link.state == "reopening":
                await link.changed.wait()

    async def wait_settled(self, entry: ImageEntry) -> LinkState:
        """Where the image stands once nothing is under way."""
        link = self._link_of(entry)
        while link.is_under_way or (link.state == "detaching" and link.reason is None):
            await link.changed.wait()
        return link.state

    # --- wishes -----------------------------------------------------------------------------------------

    def want(self, entry: ImageEntry) -> None:
        """The image was opened, or is asked for: link it, and keep it so for `detach_idle_s` at least."""
        link = self._link_of(entry)
        link.keep_until = trio.current_time() + self._settings.detach_idle_s
        if link.is_ordered_off:
            link.is_ordered_off, link.retry_at = False, 0.0
            link.set("none")
        self.tasks.wake(link)

    def released(self, entry: ImageEntry) -> None:
        """A handle was closed: if that was the last one, it is idle from here."""
        link = self._links.get(entry.number)
        if link is not None:
            link.keep_until = trio.current_time() + self._settings.detach_idle_s
            self.tasks.wake(link)

    def removed(self, entry: ImageEntry) -> None:
        """The image was removed here: detach it as soon as nobody uses it."""
        link = self._links.get(entry.number)
        if link is not None:
            link.keep_until = trio.current_time()
            self.tasks.wake(link)
            # Nova removes a base after its last instance, whose overlay was seen by the look of a minute ago.
            self._uses.overlays.look_soon()

    def look(self, entry: ImageEntry | None = None) -> None:
        """The uses of the image, or of all, may have changed."""
        for link in list(self._links.values()):
            if entry is None or link.entry is entry:
                self.tasks.wake(link)

    def distrust(self, entry: ImageEntry) -> None:
        """Something of the image was found to be wrong. Is it the image as a whole, its volume is wrong, too."""
        link = self._links.get(entry.number)
        if link is not None and link.image is not None and (reason := self.tasks.forbidden(entry)) is not None:
            link.stop_serving()
            link.refused(reason, again_s=AT_HAND_AGAIN_S)

    async def detach(self, entry: ImageEntry, *, force: bool) -> LinkReport:
        """An operator's order; `force`: also while it is in use, reads go through Glance then.

        It is linked again when it is opened next. What there was is the answer.

        Raises:
            ImageBusyError: it is in use, or that is not known.
            ControlError: there is no link, or it was not detached in time.
        """
        link = self._links.get(entry.number)
        if link is None or not (link.is_running or link.record):
            raise errors.ControlError(f"image {entry.image_id} is not linked to a volume")
        if not force:
            await self._check_unused(entry)
        was = link.report()
        link.is_ordered_off = True
        link.stop_serving()
        self.tasks.wake(link)
        with trio.move_on_after(DETACH_WAIT_S):
            while link.is_running:
                await link.changed.wait()
        if link.record is not None or link.is_running:
            raise errors.ControlError(f"image {entry.image_id} is not detached yet, it is tried again: {link.reason}")
        link.refused("an operator detached it; it is linked again when it is opened next", again_s=0.0)
        return was

    async def _check_unused(self, entry: ImageEntry) -> None:
        is_known = False
        with trio.move_on_after(SEE_WAIT_S):
            is_known = await self._uses.overlays.see_all()
        reasons = self._uses.why_in_use(entry)
        if not is_known:
            reasons.append("its overlays are not known")
        if reasons:
            raise errors.ImageBusyError(
                f"image {entry.image_id} is in use ({'; '.join(reasons)}): with --force it is detached all the same, "
                "and read through Glance"
            )

    # --- begin and end ----------------------------------------------------------------------------------

    async def restore(self, held: Sequence[HeldFd]) -> None:
        """Go on with what the servers before attached and had held; the fds of `held` are ours from here.

        Images that are open and were not linked yet begin to be.
        """
        leases = [one for one in held if one.key.startswith(LEASE_PREFIX)]
        fds = {one.key: one.fd for one in held if one not in leases}
        noted = {entry.number for entry in self._entries() if entry.local.link is not None}
        await self.steps.leases.restore(leases, noted)
        self._reopen_until = trio.current_time() + REOPEN_WAIT_S
        for entry in list(self._entries()):
            if entry.local.link is None:
                if self._uses.has_open(entry):
                    self.want(entry)
                continue
            link = self._link_of(entry)
            fd = fds.pop(f"{FD_PREFIX}{entry.number}", None)
            link.connection_fd = fds.pop(f"{CONNECTION_PREFIX}{entry.number}", None)
            may_go_on = self._settings.is_on and entry.local.link.stage == "attached"
            if may_go_on and fd is not None and link.connection_fd is not None:
                await self.steps.adopt(link, fd, link.connection_fd)
            else:
                link.is_inherited = may_go_on
                link.set("reopening" if may_go_on else "none")
                if fd is not None:
                    os.close(fd)
            self.tasks.wake(link)
        for key, fd in fds.items():
            os.close(fd)
            await self._escrow.drop(key)

    async def run(self) -> None:
        """Remove what is this host's in Cinder and noted nowhere, once. Ends with that, or when it is cancelled."""
        failures = 0
        with guarded(log, "bug in the look for what this host has attached"):
            while True:
                try:
                    await self.steps.remove_unknown(lambda: list(self._entries()))
                except errors.VolumeError as exc:
                    failures += 1
                    log.debug("not known what this host has attached: %s", exc)
                    await trio.sleep(backoff_s(failures, base_s=10.0, cap_s=600.0, jitter=0.5))
                else:
                    return

    async def close(self) -> None:
        """Detach everything, within END_LIMIT_S: the mount is gone. What is left is noted."""
        self.tasks.end()
        for link in self._links.values():
            self.tasks.wake(link)
        with trio.move_on_after(END_LIMIT_S):
            for link in list(self._links.values()):
                while link.is_running:
                    await link.changed.wait()

    @property
    def has_some(self) -> bool:
        """Whether `close` has something to do."""
        return any(link.is_running for link in self._links.values())

    def _link_of(self, entry: ImageEntry) -> Link:
        link = self._links.get(entry.number)
        if link is None:
            keep_until = trio.current_time() + self._settings.detach_idle_s
            link = self._links[entry.number] = Link(entry, keep_until)
        return link
