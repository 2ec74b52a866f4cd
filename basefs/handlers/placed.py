"""Images that are read in place: from Glance's own file, where that is on this host, too.

Invariants: a file is read from only after its size and first bytes were compared, and after its fd is in escrow, so the
next server goes on with it; what it does not give is read elsewhere in the same call (`handlers/linked`). `want` and
`image` wait for nothing. Owned by the trio loop.
"""

import logging
import os
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.concurrency.guarded import guarded
from basefs.concurrency.threads import BlockingCalls
from basefs.core.escrow import Escrow, HeldFd
from basefs.core.location_kinds import kind_of
from basefs.core.retry import backoff_s
from basefs.handlers.comparing import Comparison
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.lending import Lending
from basefs.handlers.linked import LinkedImage, VolumeSource
from basefs.handlers.uses import ImageUses
from basefs.observability import ConditionLog
from basefs.sources.file_locations import FileLocations
from basefs.views.choice import Views
from basefs.views.stored import ByteSource
from basefs.volumes.bytes import FdVolumeBytes

log = logging.getLogger(__name__)

PREFIX = "placed/"
"""Keys in escrow: with the image number."""
OPEN_LIMIT_S = 15.0
RETRY_BASE_S, RETRY_CAP_S = 5.0, 600.0
REFUSED_AGAIN_S = 600.0
OPEN_THREADS_MAX = 4
PENDING_FAILURES_MAX = 3
"""An image whose file failed so often in a row is completed like any other."""
END_LIMIT_S = 1.0

PlaceState = Literal["none", "opening", "in place", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceFinder:
    """How an image's file is found. `has_before(image_id)`: the operator's order has another source, which works."""

    files: FileLocations
    locations: Callable[[str], Awaitable[Sequence[str]]]
    has_before: Callable[[str], bool]
    require_verified: bool


@dataclass(slots=True, kw_only=True, eq=False)
class _Place:
    """One image's. `image` is what it is read from, set exactly in the state `in place`."""

    entry: ImageEntry
    state: PlaceState = "none"
    reason: str | None = None
    source: VolumeSource | None = None
    image: LinkedImage | None = None
    failures: int = 0
    retry_at: float = float("-inf")
    is_running: bool = False

    def set(self, state: PlaceState, reason: str | None = None) -> None:
        self.state, self.reason = state, reason


class PlacedImages:
    """All of the node. `restore` first; tasks run in `nursery`."""

    def __init__(
        self,
        finder: PlaceFinder,
        downloading: DownloadingTemplateImageHandler,
        comparison: Comparison,
        views: Views,
        uses: ImageUses,
        escrow: Escrow,
        nursery: trio.Nursery,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._finder = finder
        self._downloading = downloading
        self._comparison = comparison
        self._views = views
        self._uses = uses
        self._escrow = escrow
        self._nursery = nursery
        self._jitter = jitter
        self._threads = BlockingCalls("files in place", threads_max=OPEN_THREADS_MAX)
        self._places: dict[int, _Place] = {}
        self._told = ConditionLog(log, clock=trio.current_time)
        self.breaks = 0
        """Reads that a file failed, since the server began."""
        self.changed: Callable[[], None] = lambda: None
        """Called when an image begins or ends to be read in place."""

    # --- what others see --------------------------------------------------------------------------------

    def image(self, entry: ImageEntry) -> LinkedImage | None:
        """What the image is read from, if that is its file."""
        place = self._places.get(entry.number)
        return None if place is None or entry.local.is_graduated else place.image

    def is_placed(self, entry: ImageEntry) -> bool:
        """Whether the image is read from its file, or is about to be: there is no need to bring its bytes."""
        place = self._places.get(entry.number)
        if place is None or entry.local.is_graduated:
            return False
        return place.image is not None or (place.is_running and place.failures <= PENDING_FAILURES_MAX)

    def report(self, entry: ImageEntry) -> list[dict[str, Any]]:
        """How the image stands, as `SourceChoice.report` has it; nothing while nobody looked."""
        place = self._places.get(entry.number)
        if place is None or place.state == "none":
            return []
        return [{"source": "file", "endpoint": "", "state": place.state, "reason": place.reason, "received_bytes": 0}]

    def count(self) -> int:
        """How many images are read in place."""
        return sum(1 for place in self._places.values() if place.image is not None)

    # --- wishes -----------------------------------------------------------------------------------------

    def want(self, entry: ImageEntry) -> None:
        """The image is in use: read it in place, if that is possible."""
        place = self._places.setdefault(entry.number, _Place(entry=entry))
        if place.image is None and not entry.local.is_graduated and trio.current_time() >= place.retry_at:
            self._start(place)

    def look(self, entry: ImageEntry) -> None:
        """The image may be in use no more: its file is closed then."""
        place = self._places.get(entry.number)
        if place is not None and (entry.local.is_graduated or not self._uses.why_in_use(entry)):
            self._leave(place)

    def distrust(self, entry: ImageEntry) -> None:
        """Something of the image was found to be wrong. Is it the image as a whole, its file is wrong, too."""
        place = self._places.get(entry.number)
        if place is not None and place.image is not None and (reason := self._forbidden(entry)) is not None:
            self._leave(place)
            self._refuse(place, reason)

    # --- begin and end ----------------------------------------------------------------------------------

    async def restore(self, held: Sequence[HeldFd], entries: Collection[ImageEntry]) -> None:
        """Read on from what the servers before had open and checked; the fds are ours from here."""
        by_key = {f"{PREFIX}{entry.number}": entry for entry in entries}
        for one in held:
            entry = by_key.get(one.key)
            if entry is None or self._forbidden(entry) is not None or os.fstat(one.fd).st_size < entry.size:
                if self._downloading.reader_table is not None:
                    self._downloading.reader_table.revoke_inherited(int(one.key.removeprefix(PREFIX)))
                os.close(one.fd)
                await self._escrow.drop(one.key)
                continue
            place = self._places.setdefault(entry.number, _Place(entry=entry))
            self._serve(place, self._source(place, FdVolumeBytes(one.fd)))
        for entry in entries:
            if self._uses.has_open(entry):
                self.want(entry)

    async def close(self) -> None:
        """Close what is open here. The next server goes on with what is in escrow, the keeper's end drops that."""
        with trio.move_on_after(END_LIMIT_S):
            for place in self._places.values():
                if place.source is not None:
                    await place.source.close()

    # --- one image --------------------------------------------------------------------------------------

    def _start(self, place: _Place) -> None:
        if not place.is_running:
            place.is_running = True
            self._nursery.start_soon(self._run, place)

    async def _run(self, place: _Place) -> None:
        """Ends when the image is read in place, or is not to be, or nobody uses it; cancelled with the service."""
        try:
            with guarded(log, "bug in reading image %s in place", place.entry.image_id) as guard:
                while True:
                    await trio.sleep_until(place.retry_at)
                    await self._open(place)
                    if place.state != "failed" or not self._uses.why_in_use(place.entry):
                        break
            if guard.bug is not None:
                self._refuse(place, f"internal error: {type(guard.bug).__name__}")
        finally:
            place.is_running = False
            self.changed()

    async def _open(self, place: _Place) -> None:
        place.set("opening")
        try:
            with trio.fail_after(OPEN_LIMIT_S):
                await self._take_over(place)
        except errors.NoVolumeError as exc:
            self._refuse(place, str(exc))
            log.info("image %s is not read in place: %s", place.entry.image_id, exc)
        except (errors.BasefsError, trio.TooSlowError) as exc:
            self._fail(place, str(exc) or f"its file system did not answer within {OPEN_LIMIT_S:g} s")
        else:
            place.failures = 0

    async def _take_over(self, place: _Place) -> None:
        """Find, open, compare and hold the file, and move the readers over.

        Raises:
            NoVolumeError: there is none that may be read; the message is the reason.
            BasefsError: that cannot be found out now, or it was not opened.
        """
        entry = place.entry
        if (reason := self._forbidden(entry)) is not None:
            raise errors.NoVolumeError(reason)
        location = await self._location(entry)
        if self._finder.has_before(entry.image_id):
            raise errors.NoVolumeError("a source before it in source_order has the image")
        try:
            fd = await self._threads.run(partial(self._finder.files.open, location, size=entry.size))
        except (errors.StoreGoneError, errors.SourceForbiddenError, errors.SourceCorruptError) as exc:
            raise errors.NoVolumeError(str(exc)) from exc
        opened = FdVolumeBytes(fd)
        source = self._source(place, opened)
        try:
            await self._comparison.check(entry, source, opened.size, what="its file")
            await self._escrow.hold(f"{PREFIX}{entry.number}", "", fd)
        except OSError as exc:
            await source.close()
            raise errors.VolumeError(f"its file cannot be held for the next server: {exc.strerror}") from exc
        except BaseException:
            self._nursery.start_soon(source.close)
            raise
        self._serve(place, source)
        log.info("image %s is read from its file in place from now on", entry.image_id)

    async def _location(self, entry: ImageEntry) -> str:
        reason = "Glance tells no file location of it"
        for location in await self._finder.locations(entry.image_id):
            if kind_of(location) == "file":
                refusal = self._finder.files.refusal(entry.image_id, location)
                if refusal is None:
                    return location
                reason = refusal
        raise errors.NoVolumeError(reason)

    def _forbidden(self, entry: ImageEntry) -> str | None:
        """Why the image is not read in place, whatever file it has."""
        local = entry.local
        if self._finder.require_verified:
            return "require_verified is set, and the bytes of a file are not compared with a hash"
        if local.whole in ("refetching", "quarantined") or local.glance_only:
            return "its bytes did not have the hash that Glance tells"
        if entry.is_gone or entry.record.status != "active":
            return "Glance does not give it any more"
        if 0 < entry.size == local.cached_bytes:
            return "all of it is here"
        return None

    def _source(self, place: _Place, opened: FdVolumeBytes) -> VolumeSource:
        async def otherwise() -> ByteSource:
            return (await self._downloading.downloaded_image(place.entry)).fetcher

        return VolumeSource(place.entry, opened, otherwise, partial(self._broke, place))

    def _serve(self, place: _Place, source: VolumeSource) -> None:
        table = self._downloading.reader_table
        if table is not None:
            # Without a lease: nothing is detached, and whoever removes the file waits for nobody.
            source.lend(Lending(place.entry.number, table))
        place.source, place.image = source, LinkedImage(place.entry, source, self._views)
        place.set("in place")

    def _broke(self, place: _Place, why: str) -> None:
        """A read from the file failed. The readers go elsewhere from here."""
        if place.image is None:
            return
        self.breaks += 1
        self._leave(place)
        self._fail(place, f"its file failed: {why}")
        self._start(place)

    def _leave(self, place: _Place) -> None:
        """Begin no read in the file any more, and close it."""
        source, place.source, place.image = place.source, None, None
        if source is not None:
            source.stop()
            place.set("none")
            self._nursery.start_soon(self._give_back, place, source)
            self.changed()

    async def _give_back(self, place: _Place, source: VolumeSource) -> None:
        """Ends when no thread is in the file any more, which takes as long as one hangs there."""
        await source.close()
        if place.source is None:
            await self._escrow.drop(f"{PREFIX}{place.entry.number}")

    def _refuse(self, place: _Place, reason: str) -> None:
        place.retry_at = trio.current_time() + REFUSED_AGAIN_S
        place.set("refused", reason)

    def _fail(self, place: _Place, reason: str) -> None:
        place.failures += 1
        pause_s = backoff_s(place.failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=self._jitter())
        place.retry_at = trio.current_time() + pause_s
        place.set("failed", reason)
        self._told.begins(
            place.entry.number, logging.WARNING,
            "image %s is not read in place, but from its next source, trying again: %s", place.entry.image_id, reason,
        )  # fmt: skip
