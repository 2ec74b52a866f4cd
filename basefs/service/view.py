"""What the control socket and `.basefs/` show and do: `control.api.ServiceView` over the service's objects."""

import math
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchCounters
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.control.api import PROGRESS_INTERVAL_S
from basefs.fuse.operations import Operations
from basefs.handlers.base import LinkState
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.gate import ServableGate
from basefs.handlers.links import Links
from basefs.handlers.report import image_report, map_note
from basefs.service.cache_parts import CacheParts
from basefs.service.drain import Drain
from basefs.service.integrity import Integrity
from basefs.service.linking import Linking
from basefs.service.sourcing import Sourcing
from basefs.service.traces import Traces
from basefs.sources.access import GlanceAccess


class View:
    """See `ServiceView`. `operations` and `drains` are set by the service once the face is built."""

    def __init__(
        self,
        catalog: Catalog,
        gate: ServableGate,
        handler: DownloadingTemplateImageHandler,
        sourcing: Sourcing,
        access: GlanceAccess,
        *,
        mountpoint: Path,
        view: str,
        keeper_pid: int,
        check_deadline_s: float,
        counters: FetchCounters,
        integrity: Integrity,
        cache: CacheParts,
        linking: Linking,
    ) -> None:
        self._catalog = catalog
        self._gate = gate
        self._handler = handler
        self._sourcing = sourcing
        self._access = access
        self._mountpoint = mountpoint
        self._view = view
        self._keeper_pid = keeper_pid
        self._check_deadline_s = check_deadline_s
        self._counters = counters
        self._integrity = integrity
        self._cache = cache
        self._traces = Traces(catalog, handler, cache.services.traces)
        self._linking = linking
        self._started_at = trio.current_time()
        self.operations: Operations | None = None
        self.drains: Drain | None = None
        self.state = "starting"

    def status(self) -> dict[str, Any]:
        """See `ServiceView.status`."""
        entries = self._catalog.entries()
        contact = self._access.contact
        refused = sum(1 for entry in entries if self._gate.verdict(entry).state == "refused")
        return {
            "mountpoint": str(self._mountpoint),
            "state": self.state,
            "keeper_pid": self._keeper_pid,
            "server_pid": os.getpid(),
            "uptime_s": math.floor(trio.current_time() - self._started_at),
            "handler": self._linking.handler.name,
            "view": self._view,
            "images": len(entries),
            "images_refused": refused,
            "images_in_use": sum(1 for entry in entries if self._cache.uses.why_in_use(entry)),
            "images_graduated": sum(1 for entry in entries if entry.local.is_graduated),
            "images_pinned": sum(1 for entry in entries if entry.local.pinned),
            "images_hydrating": self._handler.warmer.hydrating,
            "images_verified": sum(1 for entry in entries if entry.local.whole == "verified"),
            "images_quarantined": sum(1 for entry in entries if entry.local.whole == "quarantined"),
            **self._linking.status(),
            "hydrated_bytes": self._counters.hydrated_bytes,
            "open_handles": sum(self._handler.open_handles(entry) for entry in entries),
            "fetched_bytes": self._sourcing.source.received_bytes,
            "fetch_requests": self._sourcing.source.requests,
            **self._sourcing.status(),
            "cache_bytes": sum(entry.local.cached_bytes for entry in entries),
            **self._cache.status(),
            "damaged_chunks": self._counters.damaged_chunks,
            **self._integrity.status(),
            "glance_reachable": contact.reachable,
            "glance_error": contact.error,
            "glance_error_at": contact.error_at,
            "endpoints": self._access.endpoints.report(),
            "catalog_refreshed_at": self._catalog.refreshed_at,
            "fuse_requests": self._fuse_requests(),
        }

    def _fuse_requests(self) -> dict[str, int]:
        if self.operations is None:
            return {}
        counts = dict(self.operations.requests)
        counts["read"] = counts.get("read", 0) + self.operations.hits + self.operations.lower_hits
        return counts

    async def wait_known(self) -> None:
        """See `ServiceView.wait_known`."""
        await self._catalog.wait_known()

    def images(self) -> list[dict[str, Any]]:
        """See `ServiceView.images`."""
        return [self.report(entry) for entry in self._catalog.entries()]

    def image(self, ref: str) -> dict[str, Any]:
        """See `ServiceView.image`."""
        return self.report(self._catalog.find(ref))

    def report(self, entry: ImageEntry) -> dict[str, Any]:
        """Everything about one image."""
        report = image_report(entry, self._gate, self._linking.handler, self._cache.uses, self._view)
        return report | self._sourcing.report(entry)

    async def warm(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.warm`."""
        entry = await self._warmable(ref)
        if entry.local.is_graduated:  # all of it is here, and nova's own
            yield self._progress(entry) | {"cached_bytes": entry.size, "state": "complete"}
            return
        if (links := self._linking.links) is not None:
            links.want(entry)
            while (link := await _settled(links, entry)) is None:
                yield self._progress(entry)
            if link == "linked":
                yield self._progress(entry) | {"state": "linked"}
                return
        async with self._handler.warmer.hold(entry) as warming:
            while not warming.done.is_set():
                yield self._progress(entry)
                with trio.move_on_after(PROGRESS_INTERVAL_S):
                    await warming.done.wait()
            if warming.error is not None:
                yield self._progress(entry) | {"state": "failed", "error": str(warming.error)}
            else:
                yield self._progress(entry) | {"state": "complete"}

    async def warm_boot(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.warm_boot`."""
        entry = await self._warmable(ref)
        if entry.local.is_graduated:  # all of it is here
            yield self._progress(entry) | {"cached_bytes": entry.size, "state": "complete"}
            return
        async with aclosing(self._traces.replay(entry)) as progress:
            async for step in progress:
                yield self._progress(entry) | step

    async def traces(self) -> list[dict[str, Any]]:
        """See `ServiceView.traces`."""
        return await self._traces.summaries()

    async def trace(self, ref: str) -> dict[str, Any]:
        """See `ServiceView.trace`."""
        return await self._traces.trace(self._catalog.find(ref))

    async def put_trace(self, ref: str, data: bytes) -> dict[str, Any]:
        """See `ServiceView.put_trace`."""
        return await self._traces.put(self._catalog.find(ref), data)

    async def start_warm(self, ref: str) -> dict[str, Any]:
        """See `ServiceView.start_warm`."""
        entry = await self._warmable(ref)
        if not entry.local.is_graduated:
            self._linking.bring(entry, lambda: self._handler.warmer.keep(entry))
        return self._progress(entry)

    async def _warmable(self, ref: str) -> ImageEntry:
        entry = self._catalog.find(ref)
        await self._gate.let_through(entry, deadline_s=self._check_deadline_s, for_warming=True)
        if entry.local.used_at_ns is None:
            entry.local.used_at_ns = time.time_ns()
            self._catalog.touch(entry)
        return entry

    def _progress(self, entry: ImageEntry) -> dict[str, Any]:
        report = self.report(entry)
        return {
            "image_id": entry.image_id,
            **{key: report[key] for key in ("base_name", "cached_bytes", "size", "fetched_bytes", "state")},
        }

    def verify(self, ref: str | None) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.verify`."""
        if ref is not None:
            self._catalog.find(ref)
        return self._integrity.verify(ref)

    def drain(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `ServiceView.drain`."""
        assert self.drains is not None, "set before commands are served"
        return self.drains.run()

    async def image_map(self, ref: str, *, cells_max: int) -> dict[str, Any]:
        """See `ServiceView.image_map`."""
        entry = self._catalog.find(ref)
        cells = await self._handler.cells(entry, cells_max)
        report = self.report(entry)
        return {
            "image_id": entry.image_id,
            **{key: report[key] for key in ("name", "base_name", "state")},
            "note": map_note(entry, refused_reason=report["refused_reason"], state=report["state"]),
            "taken_at": int(time.time()),
            **cells.report(),
        }

    async def evict(self, ref: str) -> dict[str, Any]:
        """See `ServiceView.evict`."""
        entry = self._catalog.find(ref)
        handles = self._handler.open_handles(entry)
        if entry.local.whole == "quarantined":
            await self._handler.lift_quarantine(entry)
        elif handles:
            raise errors.ImageBusyError(f"image {entry.image_id} is open ({handles} handles); its bytes are kept")
        elif entry.local.pinned:
            raise errors.ImageBusyError(f"image {entry.image_id} is pinned; its bytes are kept (basefs image unpin)")
        if not handles:
            entry.local.used_at_ns = entry.local.mtime_ns = entry.local.atime_ns = None
            entry.local.is_wanted = False
            self._catalog.touch(entry)
        return {"image_id": entry.image_id, "evicted_bytes": await self._linking.handler.remove_image(entry)}

    async def detach(self, ref: str, *, force: bool) -> dict[str, Any]:
        """See `ServiceView.detach`."""
        entry = self._catalog.find(ref)
        if self._linking.links is None:
            raise errors.ControlError(f"image {entry.image_id} is not linked: template_image_handler is downloading")
        was = await self._linking.links.detach(entry, force=force)
        volume_id = None if was.record is None else was.record.attached_volume_id
        return {"image_id": entry.image_id, "volume_id": volume_id}

    def pin(self, ref: str, *, pinned: bool) -> dict[str, Any]:
        """See `ServiceView.pin`."""
        entry = self._catalog.find(ref)
        entry.local.pinned = pinned
        self._catalog.touch(entry)
        self._handler.uses_changed()
        return {"image_id": entry.image_id, "pinned": pinned}


async def _settled(links: Links, entry: ImageEntry) -> LinkState | None:
    """How the image stands to its volume; None if that is not decided in PROGRESS_INTERVAL_S."""
    with trio.move_on_after(PROGRESS_INTERVAL_S):
        return await links.wait_settled(entry)
    return None
