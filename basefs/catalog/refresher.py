"""Keeps the index like Glance's list: incremental and full refreshes, and the loop that makes them.

Invariants: at most one refresh of a kind runs at a time; what a list says is stored before it is shown; a
list that cannot be had whole changes nothing; no image is called gone by its absence from a list, but only
by Glance's 404 to its id, right after that Glance gave a whole list.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from basefs import errors
from basefs.catalog.glance_images import ImageMetadata, earlier, is_same_content, record_of
from basefs.catalog.index import CatalogIndex
from basefs.catalog.records import UNCHECKED, ImageEntry, ImageRecord
from basefs.catalog.store import CatalogStore
from basefs.concurrency.outage import Outage
from basefs.concurrency.single_flight import SingleFlight
from basefs.core.names import base_name_of
from basefs.core.retry import backoff_s

log = logging.getLogger(__name__)

REFRESH_INTERVAL_MIN_S = 1.0
SPREAD_S = 2.0
"""After an outage, so that a thousand nodes do not ask for their lists in the same moment."""
OVERLAP_S = 10.0
"""Asked again each time: Glance's API servers have clocks of their own, and a change shows when it is committed."""
_FUTURE_MAX = timedelta(minutes=5)
"""A change dated later than this by our clock is no measure of what was seen."""
_UPDATED_SINCE = "updated_since"
_LISTED_WHOLE_AT = "listed_whole_at"


class CatalogRefresher:
    """Brings Glance's list into a `CatalogIndex` and its `CatalogStore`."""

    def __init__(
        self,
        index: CatalogIndex,
        metadata: ImageMetadata,
        store: CatalogStore,
        nursery: trio.Nursery,
        outage: Outage,
        *,
        refresh_s: float,
        full_refresh_s: float,
    ) -> None:
        self.lists_begun = 0
        """How many lists were asked for so far."""
        self.list_seen = 0
        """Which of them is the latest that was seen: what Glance had when that was begun is known."""
        self.listed_whole_since = float("-inf")
        """Trio's clock when the last full list that was seen was begun."""
        self.refreshed_at: float | None = None
        """Unix time of the last refresh that succeeded, in this life."""
        self._index = index
        self._metadata = metadata
        self._store = store
        self._refresh_s = refresh_s
        self._full_refresh_s = full_refresh_s
        self._flights: SingleFlight[str, None] = SingleFlight(nursery)
        self._taking = trio.Lock()
        self._began_at = float("-inf")
        self._updated_since: str | None = None
        self._listed_whole_at = 0.0
        self._outage = outage
        self._undecided: int | None = None
        self._is_lost = False

    async def load(self) -> None:
        """Bring what was stored into the empty index.

        Raises:
            CacheError: the store cannot be read.
        """
        for entry in await self._store.load():
            self._index.add(entry)
        values = await self._store.values()
        self._updated_since = values.get(_UPDATED_SINCE)
        try:
            self._listed_whole_at = float(values.get(_LISTED_WHOLE_AT, 0))
        except ValueError:
            self._listed_whole_at = 0.0

    async def refresh(self, *, full: bool) -> None:
        """Bring the index up to date; a refresh of the same kind under way is joined.

        Raises:
            SourceForbiddenError, SourceUnavailableError: Glance did not give the list.
            CacheError: the list could not be stored; nothing of it is shown.
        Cancellation: ends this wait only.
        """
        if full:
            await self._flights.run("full", lambda: self._noted(self._full))
        else:
            await self._flights.run("incremental", lambda: self._noted(self._incremental))

    async def run(self) -> None:
        """Refresh for ever, with back-off while that fails. Ends when it is cancelled."""
        attempt = 0
        while True:
            is_full_due = not 0 <= time.time() - self._listed_whole_at < self._full_refresh_s
            try:
                await self.refresh(full=is_full_due)
            except (errors.SourceError, errors.CacheError):
                attempt += 1
                pause_s = backoff_s(attempt, base_s=1.0, cap_s=max(1.0, self._refresh_s), jitter=_jitter())
            else:
                attempt = 0
                pause_s = self._refresh_s * (0.9 + 0.2 * _jitter())
            await self._pause(trio.current_time() + pause_s)

    async def _pause(self, until: float) -> None:
        """Return at `until`, or soon after an outage has ended; not all nodes at once."""
        ended = self._outage.ended
        while trio.current_time() < until and self._outage.ended == ended:
            await self._outage.next_change(until)
        if self._outage.ended > ended:
            await trio.sleep(SPREAD_S * _jitter())

    async def recheck(self, entry: ImageEntry) -> None:
        """Ask Glance about one image: `record` and `is_gone` are then as it says.

        Raises:
            SourceForbiddenError, SourceUnavailableError: Glance did not say; nothing was changed.
            CacheError: its answer could not be stored; nothing was changed.
        """
        await self._flights.run(f"image {entry.image_id}", lambda: self._recheck(entry))

    async def _recheck(self, entry: ImageEntry) -> None:
        try:
            image = await self._metadata.show_image(entry.image_id)
        except errors.ImageNotFoundError:
            self._set_gone(entry, is_gone=True)
        else:
            # One image says nothing of what else changed until then.
            await self._take([image], {}, is_list=False)

    async def _incremental(self) -> None:
        # At most one list a second, however many unknown names are asked for.
        await trio.sleep_until(self._began_at + REFRESH_INTERVAL_MIN_S)
        self._began_at = trio.current_time()
        since = earlier(self._updated_since, OVERLAP_S) if self._updated_since else None
        await self._list(since)

    async def _full(self) -> None:
        began_at, began_at_unix = trio.current_time(), time.time()
        known = [entry for entry in self._index.entries() if not entry.is_gone]
        images = await self._list(None)
        listed = {image.get("id") for image in images}
        for entry in known:
            if entry.image_id not in listed and not entry.is_gone:
                await self._recheck(entry)
        await self._take([], {_LISTED_WHOLE_AT: str(began_at_unix)})
        self.listed_whole_since = max(self.listed_whole_since, began_at)
        self._listed_whole_at = began_at_unix

    async def _list(self, updated_since: str | None) -> list[Mapping[str, Any]]:
        self.lists_begun += 1
        number = self.lists_begun
        images = await self._metadata.list_images(updated_since=updated_since)
        await self._take(images, {})
        self.list_seen = max(self.list_seen, number)
        return images

    async def _take(
        self, images: Iterable[Mapping[str, Any]], values: Mapping[str, str], *, is_list: bool = True
    ) -> None:
        """Store what is new and changed, then show it: numbers are never given out twice, not even by kill -9."""
        records = [record for image in images if (record := record_of(image)) is not None]
        async with self._taking:
            changed = {record.image_id: record for record in records if self._is_news(record)}
            updated_since = _newest(self._updated_since, records) if is_list else self._updated_since
            if updated_since is not None and updated_since != self._updated_since:
                values = {**values, _UPDATED_SINCE: updated_since}
            if not changed and not values:
                return
            numbers = await self._store.upsert(list(changed.values()), values)
            self._updated_since = updated_since
            for image_id, record in changed.items():
                self._put(record, numbers[image_id])

    def _is_news(self, record: ImageRecord) -> bool:
        entry = self._index.by_id(record.image_id)
        if entry is None:
            return True
        # A full list takes long: what an incremental one has shown meanwhile is newer than its first pages.
        return record.updated_at >= entry.record.updated_at and (entry.is_gone or record != entry.record)

    def _put(self, record: ImageRecord, number: int) -> None:
        entry = self._index.by_id(record.image_id)
        if entry is None:
            self._index.add(ImageEntry(number=number, base_name=base_name_of(record.image_id), record=record))
            return
        was_refused = entry.verdict.state == "refused"
        is_checked_again = was_refused and record.status != entry.record.status
        is_other = not is_same_content(entry.record, record) or is_checked_again
        entry.record = record  # before anybody is told of a change: its size is the record's
        if is_other:
            entry.verdict = UNCHECKED
            entry.local.whole = "unknown"  # also of one that is quarantined: it may have been mended
            self._store.touch(entry)
        self._set_gone(entry, is_gone=False)

    def _set_gone(self, entry: ImageEntry, *, is_gone: bool) -> None:
        if entry.is_gone != is_gone:
            entry.is_gone = is_gone
            self._store.touch(entry)
            log.info("image %s (%s): %s", entry.image_id, entry.base_name, "gone from Glance" if is_gone else "back")

    async def _noted(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """`refresh()`, with one record when Glance gets lost and one when it is back."""
        try:
            await refresh()
        except (errors.SourceError, errors.CacheError) as exc:
            if not self._is_lost and not self._is_told_elsewhere(exc):
                self._is_lost = True
                log.warning("the image catalog cannot be refreshed, known images stay: %s", exc)
            raise
        self.refreshed_at = time.time()
        self._undecided = None
        if self._is_lost:
            self._is_lost = False
            log.info("the image catalog is refreshed again")

    def _is_told_elsewhere(self, error: errors.BasefsError) -> bool:
        """An outage tells of itself, and what looks like one may be: until a probe has decided."""
        if not isinstance(error, errors.SourceUnavailableError) or not error.may_be_away:
            return False
        if self._undecided is None:
            self._undecided = self._outage.decided
        return error.is_outage or self._outage.decided == self._undecided


def _newest(updated_since: str | None, records: Iterable[ImageRecord]) -> str | None:
    """The newest of Glance's times, without those of a clock far ahead of ours."""
    newest_allowed = (datetime.now(UTC) + _FUTURE_MAX).strftime("%Y-%m-%dT%H:%M:%SZ")
    times = [record.updated_at for record in records if earlier(record.updated_at, 0) is not None]
    seen = [text for text in times if text <= newest_allowed]
    return max([*seen, *([updated_since] if updated_since else [])], default=None)


def _jitter() -> float:
    return random.random()  # noqa: S311  spreads load, keeps no secret
