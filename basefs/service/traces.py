"""Boot traces as the control socket shows and takes them."""

from collections.abc import AsyncGenerator
from typing import Any

import trio

from basefs import errors
from basefs.cache.trace_store import TraceStore, traced_image
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.control.api import PROGRESS_INTERVAL_S
from basefs.core.boot_trace import BootTrace
from basefs.core.trace_file import trace_document, trace_for
from basefs.handlers.downloading import DownloadingTemplateImageHandler


class Traces:
    """The traces of the node; see `ServiceView` for the answers."""

    def __init__(self, catalog: Catalog, handler: DownloadingTemplateImageHandler, store: TraceStore) -> None:
        self._catalog = catalog
        self._handler = handler
        self._store = store

    async def summaries(self) -> list[dict[str, Any]]:
        """Of every image that has a trace."""
        entries = [entry for entry in self._catalog.entries() if self._store.may_have(entry)]
        return [_summary(entry, trace) for entry in entries if (trace := await self._store.read(entry)) is not None]

    async def trace(self, entry: ImageEntry) -> dict[str, Any]:
        """The image's trace; NoSuchEntryError: it has none."""
        trace = await self._store.read(entry)
        if trace is None:
            raise errors.NoSuchEntryError(f"image {entry.image_id}: it has no boot trace")
        return {**_summary(entry, trace), "trace": trace_document(trace)}

    async def put(self, entry: ImageEntry, data: bytes) -> dict[str, Any]:
        """Have the image's trace from a file, in the place of one that is there.

        Raises:
            BadTraceError: it is none, or of other bytes than the image's.
            CacheError: the disk does not take it.
        """
        try:
            trace = trace_for(data, traced_image(entry))
        except ValueError as exc:
            raise errors.BadTraceError(f"not a boot trace of image {entry.image_id}: {exc}") from None
        await self._store.put(entry, trace)
        return _summary(entry, trace)

    async def replay(self, entry: ImageEntry) -> AsyncGenerator[dict[str, Any], None]:
        """Bring what the image's trace says while the caller iterates; progress without `base_name` and `size`.

        Raises:
            NoSuchEntryError: it has no trace.
        """
        trace = await self._store.read(entry)
        if trace is None:
            raise errors.NoSuchEntryError(
                f"image {entry.image_id}: it has no boot trace; nobody has booted it here yet"
            )
        async with self._handler.checked_image(entry) as fetcher:
            fetcher.trace.replay_asked()
            while fetcher.trace.is_replaying:
                yield {"state": "warming"}
                with trio.move_on_after(PROGRESS_INTERVAL_S):
                    await fetcher.trace.wait_replayed()
            missing = fetcher.trace.missing_bytes(trace.units())
        if missing:
            why = "the cache has no room for them, or Glance does not give them"
            if entry.local.source_kind == "streamed":
                why = "it comes as one stream; `basefs image warm` without --boot brings all of it"
            yield {"state": "failed", "error": f"{missing} bytes of its boot trace did not come: {why}"}
        else:
            yield {"state": "complete"}


def _summary(entry: ImageEntry, trace: BootTrace) -> dict[str, Any]:
    return {
        "image_id": entry.image_id,
        "name": entry.record.name,
        "base_name": entry.base_name,
        "size": entry.size,
        "traced_bytes": trace.traced_bytes,
        "traced_percent": round(100 * trace.traced_bytes / entry.size, 2),
        "ranges": len(trace.ranges),
        "seconds": trace.ranges[-1].at_ms / 1000 if trace.ranges else 0.0,
        "boots": trace.boots,
        "by": "guest" if trace.by_guest else "other",
    }
