"""A ServiceView of a few images whose warming is stepped by the test."""

from collections.abc import AsyncGenerator
from typing import Any

import trio

from basefs import errors
from basefs.core.boot_trace import UNIT_BYTES, BootTrace, TracedImage, TraceRecording
from basefs.core.trace_file import trace_document, trace_for

SIZE = 1000


def trace_of_fake(ref: str) -> BootTrace:
    """A boot that reads 8 units at the end and 9 in the middle of 136."""
    recording = TraceRecording()
    recording.note(range(128, 136), 0)
    recording.note(range(60, 69), 1500)
    image = TracedImage(image_id=ref, size=136 * UNIT_BYTES, os_hash_algo="md5", os_hash_value="0f")
    return recording.trace(image, by_guest=True)


class FakeView:
    """Images `one` (whose name two images have), `a/b`, `open`, `strange`, `away`; `holds` counts warm wishes."""

    def __init__(self) -> None:
        self.holds = 0
        self.kept: list[str] = []
        self.imported: list[tuple[str, bytes]] = []
        self.drains = ["a/b", "one"]
        self.drain_stops = False
        self.verify_stops = False
        self.released = trio.Event()
        self.steps_send, self._steps = trio.open_memory_channel[int | Exception](100)

    def status(self) -> dict[str, Any]:
        return {"mountpoint": "/base", "state": "serving", "images": 2, "fetched_bytes": 2048}

    async def wait_known(self) -> None:
        await trio.lowlevel.checkpoint()

    def images(self) -> list[dict[str, Any]]:
        return [self.image("one"), self.image("a/b")]

    def image(self, ref: str) -> dict[str, Any]:
        if ref == "twice":
            raise errors.AmbiguousImageError("twice fits 1 and 2")
        if ref not in {"one", "a/b", "open", "away", "bug"}:
            raise errors.ImageNotFoundError(f"no image {ref!r}")
        return {"id": ref, "name": f"name of {ref}", "size": SIZE, "cached_bytes": 0, "state": "cold"}

    def _progress(self, ref: str, cached: int, state: str = "warming") -> dict[str, Any]:
        return {"image_id": ref, "base_name": "x", "cached_bytes": cached, "size": SIZE, "state": state}

    async def warm(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        self.image(ref)
        if ref == "away":
            raise errors.SourceUnavailableError("Glance is away")
        self.holds += 1
        try:
            yield self._progress(ref, 0)
            while True:
                step = await self._steps.receive()
                if isinstance(step, Exception):
                    raise step
                yield self._progress(ref, step, "complete" if step == SIZE else "warming")
                if step == SIZE:
                    return
        finally:
            self.holds -= 1
            self.released.set()

    async def start_warm(self, ref: str) -> dict[str, Any]:
        self.image(ref)
        self.kept.append(ref)
        return self._progress(ref, 500)

    async def verify(self, ref: str | None) -> AsyncGenerator[dict[str, Any], None]:
        for one in ["a/b", "one"] if ref is None else [ref]:
            self.image(one)
            yield {
                "image_id": one, "size": SIZE, "cached_bytes": SIZE, "checked_bytes": SIZE, "state": "checked",
                "damaged_chunks": int(one == "one"), "refetched_chunks": 0, "error": None,
            }  # fmt: skip
        if not self.verify_stops:
            yield {"state": "ended"}

    async def drain(self) -> AsyncGenerator[dict[str, Any], None]:
        """`one` cannot be had, and the server stops before the end where `drain_stops` is set."""
        for image_id, state, error in (("a/b", "graduated", None), ("one", "failed", "no room")):
            yield {**self._progress(image_id, SIZE, "completing"), "in_use": "open", "error": None}
            if image_id not in self.drains:
                continue
            yield {**self._progress(image_id, SIZE, state), "in_use": "open", "error": error}
        if not self.drain_stops:
            yield {"state": "ended"}

    async def image_map(self, ref: str, *, cells_max: int) -> dict[str, Any]:
        """`one` has something of everything; the others nothing."""
        image = self.image(ref)
        sizes = {"size": 10 << 30, "chunk_bytes": 65536, "cell_bytes": 5 << 20}
        runs = [(2048, 0, 0, 0)]
        if ref == "one":
            runs = [(500, 5 << 20, 0, 0), (500, 0, 5 << 20, 0), (48, 0, 0, 5 << 20), (500, 65536, 0, 0), (500, 0, 0, 0)]
        names = ("present_bytes", "zero_bytes", "fetching_bytes")
        totals = {name: sum(run[0] * run[at] for run in runs) for at, name in enumerate(names, 1)}
        return {
            "image_id": ref, "name": image["name"], "base_name": "x", "state": "partial", "note": None,
            "taken_at": 1_700_000_000, **sizes, **totals, "missing_bytes": sizes["size"] - sum(totals.values()),
            "runs": [dict(zip(("cells", *names), run, strict=True)) for run in runs], "cells_max": cells_max,
        }  # fmt: skip

    async def warm_boot(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        """`one` has a trace that comes, `open` one that does not."""
        await self.trace(ref)
        yield self._progress(ref, 0)
        if ref == "open":
            yield {**self._progress(ref, 0, "failed"), "error": "Glance is away"}
        else:
            yield self._progress(ref, 300, "complete")

    async def traces(self) -> list[dict[str, Any]]:
        return [self._summary("one"), self._summary("open")]

    def _summary(self, ref: str) -> dict[str, Any]:
        trace = trace_of_fake(ref)
        return {
            "image_id": ref, "name": f"name of {ref}", "base_name": "x", "size": trace.image.size,
            "traced_bytes": trace.traced_bytes, "traced_percent": 12.5, "ranges": len(trace.ranges), "seconds": 1.5,
            "boots": 1, "by": "guest",
        }  # fmt: skip

    async def trace(self, ref: str) -> dict[str, Any]:
        self.image(ref)
        if ref not in ("one", "open"):
            raise errors.NoSuchEntryError(f"image {ref}: it has no boot trace")
        return {**self._summary(ref), "trace": trace_document(trace_of_fake(ref))}

    async def put_trace(self, ref: str, data: bytes) -> dict[str, Any]:
        self.image(ref)
        try:
            trace_for(data, trace_of_fake(ref).image)
        except ValueError as exc:
            raise errors.BadTraceError(f"not a boot trace of image {ref}: {exc}") from None
        self.imported.append((ref, data))
        return self._summary(ref)

    async def evict(self, ref: str) -> dict[str, Any]:
        if ref == "open":
            raise errors.ImageBusyError("image open is open")
        if ref == "bug":
            raise ZeroDivisionError
        self.image(ref)
        return {"evicted_bytes": 4096}

    async def detach(self, ref: str, *, force: bool) -> dict[str, Any]:
        if ref == "open" and not force:
            raise errors.ImageBusyError("image open is in use (open)")
        return {"image_id": self.image(ref)["id"], "volume_id": "a volume"}

    def pin(self, ref: str, *, pinned: bool) -> dict[str, Any]:
        return {"image_id": self.image(ref)["id"], "pinned": pinned}
