"""Whether an image may be shown: the checks nova makes at download and skips when the base exists (design section 4).

A name resolves only when this gate lets it. The verdict on the content is made once, from the image's first
bytes, and persisted; so a later start without Glance resolves what was resolved before.
"""

import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from basefs import errors
from basefs.catalog.checks import HEADER_BYTES_MAX, QCOW2, View, content_verdict, disk_verdict, metadata_verdict
from basefs.catalog.records import UNCHECKED, ImageEntry, Verdict
from basefs.concurrency.single_flight import SingleFlight
from basefs.concurrency.threads import BlockingCalls
from basefs.core.retry import backoff_s
from basefs.handlers.base import Patience, TemplateImageHandler
from basefs.sources.base import ImageSource, ProbeResult

log = logging.getLogger(__name__)

HEADER_BYTES = 1 << 20
"""Read for the checks and kept. The checks want 256 KiB; a first boot by nova reads up to there, twice, and the
kernel's readahead goes on to 768 KiB: with 1 MiB here a first boot asks Glance for nothing. One request costs
the same 5-8 ms whatever its size up to MiBs."""


NO_VOLUME_AGAIN_S = 600.0
"""A name of an image without a volume asks Glance for one so often at the most."""


class ServableGate:
    """Lets images through that may be shown; each refusal is logged once with its reason."""

    def __init__(
        self,
        source: ImageSource,
        handler: TemplateImageHandler,
        nursery: trio.Nursery,
        changed: Callable[[ImageEntry], None],
        *,
        view: View,
        verify_signatures: bool,
        header_bytes: int,
        require_verified: bool,
        is_in_use: Callable[[ImageEntry], bool],
        find_volume: Callable[[ImageEntry], Awaitable[None]] | None = None,
    ) -> None:
        """`find_volume(entry)`, where only images with a volume are shown, raises NoVolumeError for one without."""
        self._source = source
        self._handler = handler
        self._changed = changed
        self._view = view
        self._verify_signatures = verify_signatures
        self._require_verified = require_verified
        self._is_in_use = is_in_use
        self._find_volume = find_volume
        self._looked_for_volume: dict[int, float] = {}
        self._header_bytes = max(HEADER_BYTES, header_bytes)
        self._checks: SingleFlight[int, None] = SingleFlight(nursery)
        self._inspections = BlockingCalls("inspections", threads_max=2)
        self._logged: dict[int, str] = {}
        self._denied: dict[int, str] = {}

    def verdict(self, entry: ImageEntry) -> Verdict:
        """What is known now, without asking anybody; `unchecked` when the content was not looked at yet."""
        verdict = self._checked(entry)
        reason = None if verdict.state == "refused" else self._hidden_reason(entry)
        return verdict if reason is None else Verdict(state="refused", reason=reason)

    def _hidden_reason(self, entry: ImageEntry) -> str | None:
        """Why an image that passes the checks is hidden as long as it is not in use: what it is as a whole."""
        whole = entry.local.whole
        is_shown = whole == "verified" if self._require_verified else whole != "quarantined"
        if is_shown or self._is_in_use(entry):
            return None
        if whole == "quarantined":
            return "its bytes, fetched twice, did not have the hash that Glance tells (basefs image evict ends that)"
        if whole == "no_hash":
            return "require_verified is set, and Glance tells no hash of it"
        return "require_verified is set, and it is not verified here (basefs image warm brings it)"

    def _checked(self, entry: ImageEntry) -> Verdict:
        record = entry.record
        if entry.is_gone and not self._is_kept(entry):
            return Verdict(state="refused", reason="Glance has no such image any more")
        if record.status != "active" and entry.local.used_at_ns is not None and entry.verdict.state == "servable":
            # In use here before it was deactivated: nova's own cache would go on serving it, too.
            record = replace(record, status="active")
        by_metadata = metadata_verdict(record, verify_signatures=self._verify_signatures)
        if by_metadata.state == "refused":
            return by_metadata
        if record.disk_format == QCOW2 and not self.knows_view(entry):
            return UNCHECKED
        if self._find_volume is None or entry.verdict.state == "refused":
            return entry.verdict
        return self._by_volume(entry)

    def _by_volume(self, entry: ImageEntry) -> Verdict:
        """The verdict on an image whose content is not refused, where only images with a volume are shown."""
        no_volume = entry.local.no_volume
        if no_volume == "" or self._is_in_use(entry):
            return entry.verdict
        if no_volume is None:
            return UNCHECKED
        return Verdict(state="refused", reason=f"template_image_handler is volume-linking: {no_volume}")

    def knows_view(self, entry: ImageEntry) -> bool:
        """False where the raw view of a qcow2 image is shown and its size is not known, or the other way round.

        So it is after a change of `view`, and for an image in use only where the state database was lost.
        """
        local = entry.local
        if entry.record.disk_format != QCOW2:
            return True
        is_raw = self._view == "raw"
        return local.checked_view == self._view and (
            entry.verdict.state != "servable" or is_raw == bool(local.shown_size)
        )

    def refused_reason(self, entry: ImageEntry) -> str | None:
        """Why the image is not shown; also where its bytes could not be checked when it was last looked up."""
        verdict = self.verdict(entry)
        return self._denied.get(entry.number) if verdict.state == "unchecked" else verdict.reason

    def _is_kept(self, entry: ImageEntry) -> bool:
        return entry.size > 0 and entry.local.cached_bytes == entry.size

    async def let_through(self, entry: ImageEntry, *, deadline_s: float, for_warming: bool = False) -> None:
        """Return if the image may be shown; `for_warming`: if it may be brought here, which it may need first.

        Raises:
            ImageRefusedError: it must not be shown; the name is to be answered with ENOENT, so nova
                downloads the image itself.
            SourceUnavailableError, DeadlineExceededError: that could not be found out now.
        Cancellation: ends this wait only; a check under way goes on.
        """
        known = self._checked if for_warming else self.verdict
        self._forget_old_volume_verdict(entry)
        verdict = known(entry)
        if verdict.state == "unchecked":
            with trio.move_on_after(deadline_s):
                await self._checks.run(entry.number, lambda: self._check(entry, deadline_s))
            verdict = known(entry)
        if verdict.state == "refused":
            self._log_once(entry, verdict.reason or "refused")
            raise errors.ImageRefusedError(f"image {entry.image_id}: {verdict.reason}")
        if verdict.state == "unchecked":
            raise errors.DeadlineExceededError(f"image {entry.image_id}: not checked within {deadline_s:g} s")

    def _forget_old_volume_verdict(self, entry: ImageEntry) -> None:
        """An image may have got a volume, or the operator's map an entry, since it was found to have none."""
        looked_at = self._looked_for_volume.get(entry.number, -math.inf)
        if entry.local.no_volume and trio.current_time() - looked_at >= NO_VOLUME_AGAIN_S:
            entry.local.no_volume = None

    def _log_once(self, entry: ImageEntry, reason: str) -> None:
        if self._logged.get(entry.number) != reason:
            self._logged[entry.number] = reason
            log.info("image %s (%s) is not shown: %s", entry.image_id, entry.base_name, reason)

    async def _check(self, entry: ImageEntry, deadline_s: float) -> None:
        """Runs as a flight: look at the image's first bytes, keep them, and note the verdict."""
        until = trio.current_time() + deadline_s
        if self._find_volume is not None and entry.local.no_volume is None:
            await self._look_for_volume(entry, self._find_volume)
            if entry.local.no_volume or (entry.verdict.state == "servable" and self.knows_view(entry)):
                return
        try:
            probe = await self._probe(entry, until)
            # In a thread: inspecting 256 KiB takes 5-20 ms.
            record = entry.record
            verdict = await self._inspections.run(lambda: content_verdict(record, probe.header, view=self._view))
            if verdict.shown_size is not None:
                verdict = await self._disk_verdict(entry, verdict, probe.header, until)
        except errors.ImageNotFoundError as exc:
            entry.is_gone = True
            self._changed(entry)
            raise errors.ImageRefusedError(str(exc)) from exc
        except errors.SourceUnavailableError:
            raise
        except errors.SourceError as exc:
            # Not ours to have (403) or broken in the store: nova's own download will tell its user so.
            self._log_once(entry, str(exc))
            self._denied[entry.number] = str(exc)
            raise errors.ImageRefusedError(str(exc)) from exc
        self._denied.pop(entry.number, None)
        entry.verdict, entry.local.shown_size, entry.local.checked_view = verdict, verdict.shown_size, self._view
        if verdict.state == "servable" and verdict.shown_size is None:
            await self._handler.keep_header(entry, probe.header)
        self._changed(entry)

    async def _look_for_volume(self, entry: ImageEntry, find: Callable[[ImageEntry], Awaitable[None]]) -> None:
        try:
            await find(entry)
        except errors.NoVolumeError as exc:
            entry.local.no_volume = str(exc)
        except errors.VolumeError as exc:
            raise errors.SourceUnavailableError(f"image {entry.image_id}: its volume is not known: {exc}") from exc
        else:
            entry.local.no_volume = ""
        self._looked_for_volume[entry.number] = trio.current_time()
        self._changed(entry)

    async def _probe(self, entry: ImageEntry, until: float) -> ProbeResult:
        """The image's first bytes and how it comes; tried again `until` then, except in an outage."""
        attempt = 0
        while True:
            try:
                probe = await self._source.probe(entry.image_id, size=entry.size, header_bytes=self._header_bytes)
            except errors.SourceUnavailableError as exc:
                if exc.is_outage:
                    raise  # it says so at once to whoever lists a thousand images
                attempt += 1
                wait_s = backoff_s(attempt, base_s=0.2, cap_s=2.0, jitter=random.random())  # noqa: S311 (no secret)
                if trio.current_time() + wait_s >= until:
                    raise
                log.debug("image %s: %s; trying again", entry.image_id, exc)
                await trio.sleep(wait_s)
            else:
                entry.local.source_kind, entry.local.source_reason = probe.kind, probe.reason
                entry.looked_at = trio.current_time()
                return probe

    async def _disk_verdict(self, entry: ImageEntry, servable: Verdict, header: bytes, until: float) -> Verdict:
        """The verdict on the first bytes that a raw view shows; what the header does not hold is fetched, and kept."""
        entry.local.shown_size = servable.shown_size
        await self._handler.keep_header(entry, header)
        image = await self._handler.fetch_image(entry)
        patience = Patience(deadline_s=max(0.0, until - trio.current_time()), is_guest=False)
        try:
            first = bytes(await image.read(0, HEADER_BYTES_MAX, patience))
        except errors.ImageDamagedError as exc:
            return Verdict(state="refused", reason=str(exc))
        return await self._inspections.run(disk_verdict, servable, first)
