"""The steps of a link: attached, checked, held, had again, detached. Each leaves what it did in the `Link`.

Invariants: what is done in Cinder was noted before (`local.link`); a volume is read from only after its size and first
bytes were compared with Glance's, and after its fd and connection are in escrow, so the next server goes on with them;
the fd leaves the escrow before the volume is detached, for a device that somebody has open cannot be taken away, the
connection after it, for the next server may have to. At most `concurrency_max` images are in a step with Cinder.
"""

import logging
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.core.escrow import Escrow
from basefs.core.link_record import LinkRecord
from basefs.handlers.comparing import Comparison
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.lending import VolumeLeases
from basefs.handlers.link import Link, LinkCounters, LinkSettings
from basefs.handlers.linked import LinkedImage, VolumeSource
from basefs.observability import ConditionLog
from basefs.views.choice import Views
from basefs.views.stored import ByteSource
from basefs.volumes.base import AttachedVolume, ImageFacts, Note, VolumeLinks

log = logging.getLogger(__name__)

FD_PREFIX, CONNECTION_PREFIX = "linked/", "link-connection/"
"""Keys in escrow: with the image number."""
LONGEST_CLONE_S = 7200.0
"""Beyond what `VolumeLinks.attach` allows itself for a clone on storage that copies whole volumes."""
REFUSED_AGAIN_S = 3600.0
"""So often an image in use that has no volume is looked at again: one question to Glance."""
AT_THE_END_MAX = 64


class LinkSteps:
    """Over `volumes`; bytes that these do not give come from `downloading`."""

    def __init__(
        self,
        volumes: VolumeLinks,
        downloading: DownloadingTemplateImageHandler,
        views: Views,
        escrow: Escrow,
        settings: LinkSettings,
        *,
        stored: Callable[[ImageEntry], Awaitable[None]],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`stored(entry)` returns when what changed of the entry outlives this server."""
        self.volumes = volumes
        self._downloading = downloading
        self._views = views
        self._escrow = escrow
        self._settings = settings
        self._stored = stored
        self._jitter = jitter
        self._turns = trio.CapacityLimiter(settings.concurrency_max)
        # Apart: a clone may be made for an hour, and what is to go does not wait for it.
        self._detach_turns = trio.CapacityLimiter(settings.concurrency_max)
        self._comparison = Comparison(downloading, settings.view)
        self._told = ConditionLog(log, clock=trio.current_time)
        self.counters = LinkCounters()
        self.leases = VolumeLeases(downloading.reader_table, escrow)

    def ask_before_replays(self, expects_volume: Callable[[ImageEntry], bool]) -> None:
        """Have no boot trace replayed at the open of an image for which that is so, unless it is not linked then."""
        self._downloading.expects_volume = expects_volume

    def hurry(self) -> None:
        """It is the end: let all be detached at once."""
        self._detach_turns.total_tokens = AT_THE_END_MAX

    # --- to a volume ------------------------------------------------------------------------------------

    async def attach(self, link: Link) -> None:
        """Find the volume, attach and check it: the state is `linked` then; or `refused`, `broken`, `none`.

        `link.attaching` may be cancelled: `none`.
        """
        begun, facts = trio.current_time(), _facts(link.entry)
        attached: AttachedVolume | None = None
        link.set("finding")
        try:
            with trio.CancelScope() as link.attaching:
                async with self._turns:
                    with trio.fail_after(self._settings.attach_deadline_s):
                        found = await self.volumes.find(facts)
                    link.set("linking")
                    with trio.fail_after(self._settings.attach_deadline_s + LONGEST_CLONE_S):
                        attached = await self.volumes.attach(facts, found, self._note_of(link))
            if attached is None:
                link.set("none")
                return
            await self._take_over(link, attached)
        except trio.TooSlowError:
            self._attach_failed(link, "it was not found, or not attached, in time")
        except errors.NoVolumeError as exc:
            link.refused(str(exc), again_s=REFUSED_AGAIN_S)
            log.info("image %s is not linked to a volume: %s", link.entry.image_id, exc)
        except errors.BasefsError as exc:
            self._attach_failed(link, str(exc))
        else:
            self.counters.attaches += 1
            self.counters.attach_durations.add(trio.current_time() - begun)
            self._told_linked(link, trio.current_time() - begun)
        finally:
            link.attaching = None
            if link.image is None:
                self._downloading.note_link(link.entry, is_linked=False)

    async def reopen(self, link: Link) -> None:
        """Have the volume again that an earlier server attached; as `attach`, but never `refused`."""
        record = link.record
        assert record is not None, "there is nothing to be had again"
        try:
            async with self._turns:
                with trio.fail_after(self._settings.attach_deadline_s):
                    attached = await self.volumes.reopen(_facts(link.entry), record, self._note_of(link))
            await self._take_over(link, attached)
        except trio.TooSlowError:
            self._attach_failed(link, "it was not attached again in time")
        except errors.BasefsError as exc:
            self._attach_failed(link, str(exc))

    async def adopt(self, link: Link, fd: int, connection_fd: int) -> None:
        """Read on from the fd that an earlier server had held, which had checked it; both fds are ours from here."""
        record = link.record
        assert record is not None, "there is nothing to go on with"
        link.connection_fd = connection_fd
        try:
            attached = await self.volumes.adopt(record, fd, connection_fd)
        except errors.VolumeError as exc:
            os.close(fd)
            self._attach_failed(link, str(exc))
            return
        source = self._source(link, attached)
        source.lend(await self.leases.lend(link.entry.number))
        self._serve(link, source)

    def _told_linked(self, link: Link, took_s: float) -> None:
        record = link.record
        if record is not None:
            log.info(
                "image %s is read from volume %s from now on (%s, %s), after %.2f s",
                link.entry.image_id, record.attached_volume_id, record.connector, record.device, took_s,
            )  # fmt: skip

    def _attach_failed(self, link: Link, reason: str) -> None:
        self.counters.attach_failures += 1
        link.failed(reason, jitter=self._jitter())
        self._told.begins(
            (link.entry.number, "attach"), logging.WARNING,
            "image %s is not linked to its volume, it is read through Glance, trying again: %s",
            link.entry.image_id, reason,
        )  # fmt: skip

    async def _take_over(self, link: Link, attached: AttachedVolume) -> None:
        """Check what was attached, and move the readers over.

        Raises:
            BasefsError: why not; it is open (`link.source`) and noted.
        """
        link.connection_fd = attached.connection_fd
        link.source = source = self._source(link, attached)
        await self._comparison.check(link.entry, source, attached.bytes.size, what="its volume")
        await self._hold(link.entry, attached)
        source.lend(await self.leases.lend(link.entry.number))
        self._serve(link, source)

    def _serve(self, link: Link, source: VolumeSource) -> None:
        link.serve(source, LinkedImage(link.entry, source, self._views))
        self._downloading.note_link(link.entry, is_linked=True)

    def _source(self, link: Link, attached: AttachedVolume) -> VolumeSource:
        async def otherwise() -> ByteSource:
            return (await self._downloading.downloaded_image(link.entry)).fetcher

        return VolumeSource(link.entry, attached.bytes, otherwise, partial(self._broke, link))

    async def _hold(self, entry: ImageEntry, attached: AttachedVolume) -> None:
        fd = attached.bytes.fd_to_hold()
        try:
            await self._escrow.hold(f"{CONNECTION_PREFIX}{entry.number}", "", attached.connection_fd)
            if fd is not None:
                await self._escrow.hold(f"{FD_PREFIX}{entry.number}", "", fd)
        except OSError as exc:
            raise errors.VolumeError(f"its volume cannot be held for the next server: {exc.strerror}") from exc

    def _broke(self, link: Link, why: str) -> None:
        """A read from the volume failed. The readers go through Glance from here."""
        if link.image is None:
            return
        self.counters.breaks += 1
        link.stop_serving()
        link.failed(f"its volume failed: {why}", jitter=self._jitter())
        record = link.record
        self._told.begins(
            (link.entry.number, "broke"), logging.WARNING,
            "image %s: its volume %s failed, it is read through Glance, trying again: %s",
            link.entry.image_id, None if record is None else record.attached_volume_id, why,
        )  # fmt: skip

    # --- away from it -----------------------------------------------------------------------------------

    async def detach(self, link: Link) -> None:
        """Take back all that is noted; nothing of the volume is open here. What is left is noted still."""
        entry, record = link.entry, link.record
        assert record is not None, "there is nothing to be detached"
        if link.state not in ("broken", "refused"):
            link.set("detaching", link.reason)
        await self._escrow.drop(f"{FD_PREFIX}{entry.number}")
        try:
            await self.leases.take_back(entry.number)
            async with self._detach_turns:
                with trio.fail_after(self._settings.attach_deadline_s):
                    await self.volumes.detach(record, link.connection_fd, self._note_of(link))
        except (errors.BasefsError, trio.TooSlowError) as exc:
            self._detach_failed(link, record, str(exc) or "Cinder or the host did not answer in time")
            return
        self.counters.detaches += 1
        link.detach_failures = 0
        await self.forget_connection(link)
        if link.state == "detaching":
            link.set("none")
        log.info("image %s: volume %s is detached", entry.image_id, record.attached_volume_id)

    def _detach_failed(self, link: Link, record: LinkRecord, reason: str) -> None:
        self.counters.detach_failures += 1
        link.detach_failed(jitter=self._jitter())
        link.set(link.state, f"not detached: {reason}" if link.state == "detaching" else link.reason)
        self._told.begins(
            (link.entry.number, "detach"), logging.WARNING, "image %s: volume %s is not detached, trying again: %s",
            link.entry.image_id, record.attached_volume_id, reason,
        )  # fmt: skip

    async def forget_connection(self, link: Link) -> None:
        """There is nothing to detach any more. Never fails."""
        fd, link.connection_fd = link.connection_fd, None
        if fd is not None:
            os.close(fd)
        await self._escrow.drop(f"{CONNECTION_PREFIX}{link.entry.number}")

    def _note_of(self, link: Link) -> Note:
        async def note(record: LinkRecord | None) -> None:
            link.entry.local.link = record
            await self._stored(link.entry)

        return note

    async def find(self, entry: ImageEntry) -> None:
        """Return if the image has a volume that may be linked.

        Raises:
            NoVolumeError: it has none; the message is the reason.
            VolumeError: that cannot be found out now.
        """
        await self.volumes.find(_facts(entry))

    async def remove_unknown(self, entries: Callable[[], list[ImageEntry]]) -> None:
        """Have what is this host's in Cinder and noted nowhere removed, while nothing is attached.

        Raises:
            VolumeError: that cannot be found out now.
        """
        mine = [object() for _ in range(int(self._turns.total_tokens))]
        taken = []
        try:
            for one in mine:
                await self._turns.acquire_on_behalf_of(one)
                taken.append(one)
            records = {entry.image_id: entry.local.link for entry in entries() if entry.local.link is not None}
            with trio.fail_after(self._settings.attach_deadline_s):
                await self.volumes.remove_unknown(records)
        except trio.TooSlowError:
            raise errors.VolumeError("Cinder did not say in time what this host has attached") from None
        finally:
            for one in taken:
                self._turns.release_on_behalf_of(one)


def _facts(entry: ImageEntry) -> ImageFacts:
    return ImageFacts(image_id=entry.image_id, size=entry.size)
