"""The task of each image that is to be linked, or of whose link something is noted.

    none ─► finding ─► linking ─► linked ─► detaching ─► none
                │          │         └────► broken ─► (detached; after a pause) finding
                ├──────────┴──────────────► refused (looked at again later), broken
    (an earlier server's, without its fd) ─► reopening ─► linked, broken

Invariants: an image has at most one task, and only that calls VolumeLinks for it; it runs as long as something is noted
of the image or somebody wants it linked. What is attached stays so while the image is in use (`ImageUses`), or it is
not known that no overlay names it; but for a failure, an operator's order, a lower file in its place, and the end of
the mount: whoever reads goes on through Glance then. Owned by the trio loop.
"""

import logging
from collections.abc import Callable

import trio

from basefs.catalog.records import ImageEntry
from basefs.concurrency.guarded import guarded
from basefs.handlers.link import Link, LinkSettings
from basefs.handlers.link_steps import LinkSteps
from basefs.handlers.uses import ImageUses

log = logging.getLogger(__name__)

AT_HAND_AGAIN_S = 60.0
"""So often it is looked again whether what forbids linking an image here still holds."""
SEE_WAIT_S = 30.0
"""A look at the overlays of 1,000 instances takes 0.1 s; of NFS that hangs it takes for ever."""


class LinkTasks:
    """`wake` a link when its uses may have changed. `end` once the mount is gone."""

    def __init__(self, steps: LinkSteps, uses: ImageUses, settings: LinkSettings, nursery: trio.Nursery) -> None:
        """Tasks run in `nursery`."""
        self._steps = steps
        self._uses = uses
        self._settings = settings
        self._nursery = nursery
        self._is_ending = False
        self.changed: Callable[[], None] = lambda: None
        """Called when an image begins or ceases to be linked; the hydrator's, once there is one."""

    def end(self) -> None:
        """No image is wanted any more."""
        self._is_ending = True
        self._steps.hurry()

    def is_wanted(self, link: Link) -> bool:
        """Whether the image is to be linked, if that can be: it is in use, or was a moment ago."""
        if self._is_ending or link.is_ordered_off or link.entry.local.is_graduated or not self._settings.is_on:
            return False
        return trio.current_time() < link.keep_until or bool(self._uses.why_in_use(link.entry))

    def forbidden(self, entry: ImageEntry) -> str | None:
        """Why the image is not linked, whatever volume it has."""
        local = entry.local
        if self._settings.require_verified:
            return "require_verified is set, and the bytes of a volume are not compared with a hash"
        if local.whole in ("refetching", "quarantined"):
            return "its bytes did not have the hash that Glance tells"
        if entry.is_gone or entry.record.status != "active":
            return "Glance does not give it any more"
        if 0 < entry.size == local.cached_bytes:
            return "all of it is here"
        return None

    def wake(self, link: Link) -> None:
        """Have its task look at it, or stop what is under way for nobody; start the task if there is need."""
        is_wanted = self.is_wanted(link)
        if link.attaching is not None and not is_wanted:
            link.attaching.cancel()
        if not link.is_running and (is_wanted or link.record is not None):
            link.is_running = True
            self._nursery.start_soon(self._run, link)
        link.tell()

    async def _run(self, link: Link) -> None:
        """Ends when nothing is noted of the link and nobody wants it; cancelled with the service."""
        try:
            with guarded(log, "bug in the link of image %s", link.entry.image_id) as guard:
                await self._go_on(link)
            if guard.bug is not None:
                link.stop_serving()
                link.failed(f"internal error: {type(guard.bug).__name__}", jitter=1.0)
        finally:
            link.is_running = False
            link.tell()
            self.changed()

    async def _go_on(self, link: Link) -> None:
        """Return when nothing is noted of the link and nobody wants it, or that is left to the next server."""
        while True:
            if link.source is not None:
                await self._serve(link)
            elif link.record is not None:
                if not await self._settle(link):
                    break
            elif self.is_wanted(link):
                await self._begin(link)
            elif link.connection_fd is not None:
                await self._steps.forget_connection(link)
            else:
                # Nothing is awaited from here to the end: a wish that comes after it finds no task.
                if link.state != "refused":
                    link.set("none")
                break
            self.changed()

    async def _begin(self, link: Link) -> None:
        """Link it when it is time; else wait for that, or for a change."""
        changed = link.changed
        if trio.current_time() < link.retry_at:
            with trio.move_on_at(link.retry_at):
                await changed.wait()
        elif (reason := self.forbidden(link.entry)) is not None:
            link.refused(reason, again_s=AT_HAND_AGAIN_S)
        else:
            await self._steps.attach(link)

    async def _serve(self, link: Link) -> None:
        """Return when the volume, which is open, was closed: it failed, or is not wanted any more."""
        while link.image is not None:
            changed = link.changed
            if self._is_ending or link.is_ordered_off or link.entry.local.is_graduated:
                break
            if not self.is_wanted(link) and await self._is_unused(link):
                break
            now = trio.current_time()
            with trio.move_on_at(link.keep_until if link.keep_until > now else float("inf")):
                await changed.wait()
        link.stop_serving()
        source = link.source
        assert source is not None, "only this task closes it"
        await source.close()
        link.source = None

    async def _is_unused(self, link: Link) -> bool:
        """Whether it is known that nobody uses it, overlays that were made a moment ago included."""
        with trio.move_on_after(SEE_WAIT_S):
            if await self._uses.overlays.see_all():
                return not self.is_wanted(link)
        return False

    async def _settle(self, link: Link) -> bool:
        """Have again what an earlier server attached, or undo what is noted. False: that is left to the next server."""
        if link.is_inherited:
            link.is_inherited = False
            if not self._is_ending and await self._is_needed(link):
                await self._steps.reopen(link)
            else:
                link.set("none")
            return True
        changed = link.changed
        if trio.current_time() < link.detach_at:
            if self._is_ending:
                return False
            with trio.move_on_at(link.detach_at):
                await changed.wait()
            return True
        await self._steps.detach(link)
        return True

    async def _is_needed(self, link: Link) -> bool:
        """Whether somebody uses an image of a life before: who has it open, else an overlay, once those are known."""
        if not self._uses.has_open(link.entry):
            link.keep_until = trio.current_time()
            with trio.move_on_after(SEE_WAIT_S):
                await self._uses.overlays.see_all()
        return self.is_wanted(link)
