"""The images that nova may ask for, by base name: what is known at once, what is not by asking Glance.

A SHA-1 cannot be turned back into an id, so an unknown name is answered by refreshing the list. "Unknown" is
not "absent": while Glance cannot be asked, a name never seen is an error, and a name seen before is served
from what was stored.
"""

import logging
from collections.abc import Collection

import cachetools
import trio

from basefs import errors
from basefs.catalog.glance_images import ImageMetadata
from basefs.catalog.index import CatalogIndex
from basefs.catalog.records import ImageEntry
from basefs.catalog.refresher import CatalogRefresher
from basefs.catalog.store import CatalogStore
from basefs.concurrency.outage import Outage
from basefs.core.names import is_base_name

log = logging.getLogger(__name__)

ABSENT_FOR_S = 5.0
_ABSENT_MAX = 10_000
FULL_AFTER_MISS_S = 60.0
"""Sharing an image with us changes no `updated_at` (tried on Glance 33), so a name that an incremental list does
not show may still be there: a full list decides, unless there was one within this time."""


class Catalog:
    """All known images; the front of `CatalogIndex` and `CatalogRefresher`. Owned by the trio loop."""

    def __init__(
        self,
        metadata: ImageMetadata,
        store: CatalogStore,
        nursery: trio.Nursery,
        *,
        refresh_s: float,
        full_refresh_s: float,
        lookup_deadline_s: float,
        outage: Outage | None = None,
    ) -> None:
        self._outage = outage or Outage()
        self._index = CatalogIndex()
        self._store = store
        self._refresher = CatalogRefresher(
            self._index,
            metadata,
            store,
            nursery,
            self._outage,
            refresh_s=refresh_s,
            full_refresh_s=full_refresh_s,
        )
        self._lookup_deadline_s = lookup_deadline_s
        # Names and not-active images that Glance was asked about a moment ago.
        self._asked: cachetools.TTLCache[str, None] = cachetools.TTLCache(
            _ABSENT_MAX, ABSENT_FOR_S, timer=trio.current_time
        )

    # --- what is known -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Images known, gone ones too."""
        return len(self._index)

    def entries(self) -> Collection[ImageEntry]:
        """All images, in the order in which they became known. Do not await while iterating."""
        return self._index.entries()

    def by_base_name(self, base_name: str) -> ImageEntry | None:
        """The image with this base name, if it is known."""
        return self._index.by_base_name(base_name)

    def by_id(self, image_id: str) -> ImageEntry | None:
        """The image with this id, if it is known."""
        return self._index.by_id(image_id)

    def by_number(self, number: int) -> ImageEntry | None:
        """The image with this number, if it is known."""
        return self._index.by_number(number)

    def find(self, text: str) -> ImageEntry:
        """The image with this id, base name or unique name, as an operator types it.

        Raises:
            ImageNotFoundError: none is known.
            AmbiguousImageError: the name fits several images; the message lists their ids.
        """
        return self._index.find(text)

    @property
    def refreshed_at(self) -> float | None:
        """Unix time of the last refresh that succeeded, in this life."""
        return self._refresher.refreshed_at

    # --- what Glance says ----------------------------------------------------------------------------

    async def load(self) -> None:
        """Bring what was stored into the empty catalog.

        Raises:
            CacheError: the store cannot be read.
        """
        await self._refresher.load()

    async def run(self) -> None:
        """Refresh for ever, with back-off while that fails. Ends when it is cancelled."""
        await self._refresher.run()

    async def refresh(self, *, full: bool = False) -> None:
        """Bring the catalog up to date with Glance; a full refresh also notices images that are gone.

        Raises:
            SourceForbiddenError, SourceUnavailableError: Glance did not give the list; nothing was changed.
            CacheError: the list could not be stored; nothing of it is shown.
        Cancellation: ends this wait only; a refresh under way goes on.
        """
        await self._refresher.refresh(full=full)

    async def wait_known(self) -> None:
        """Return when something is known: at once but on a node that knows no image yet, which waits for Glance's list.

        `lookup_deadline_s` at most; a list that cannot be had ends the wait, too.
        """
        if len(self) or self.refreshed_at is not None:
            return
        with trio.move_on_after(self._lookup_deadline_s):
            try:
                await self.refresh(full=True)
            except (errors.SourceError, errors.CacheError) as exc:
                log.debug("no image is known yet: %s", exc)

    async def recheck(self, entry: ImageEntry) -> None:
        """Ask Glance about one image: `record` and `is_gone` are then as it says.

        Raises:
            SourceForbiddenError, SourceUnavailableError: Glance did not say; nothing was changed.
            CacheError: its answer could not be stored; nothing was changed.
        """
        await self._refresher.recheck(entry)

    async def resolve(self, base_name: str) -> ImageEntry | None:
        """The image behind a name; None if Glance has none. A known, active one is answered at once.

        Else Glance is asked within `lookup_deadline_s` (not at all while an outage is on), at most once a second for
        all unknown names together, and
        not for what it was asked about less than 5 s ago. The answer may be an entry that is not active, or gone:
        then Glance was asked, or could not be.

        Raises:
            SourceUnavailableError: the name was never seen and Glance cannot be asked.
            CacheError: the name was never seen, and what Glance said could not be stored.
        Cancellation: ends this wait only; a refresh under way goes on.
        """
        entry = self._index.by_base_name(base_name)
        if entry is not None and entry.record.status == "active" and not entry.is_gone:
            return entry
        if not is_base_name(base_name) or base_name in self._asked:
            return entry
        try:
            with trio.fail_after(self._lookup_deadline_s):
                if entry is None:
                    await self._ask(base_name)
                else:
                    # By its id: a list of changes does not name what a proxy's 404 made us call gone.
                    await self._refresher.recheck(entry)
        except (errors.SourceError, errors.CacheError, trio.TooSlowError) as exc:
            if entry is not None or (entry := self._index.by_base_name(base_name)) is not None:
                return entry
            if isinstance(exc, errors.CacheError):
                raise
            reason = exc if isinstance(exc, errors.SourceError) else f"no answer in {self._lookup_deadline_s:g} s"
            text = f"Glance cannot be asked about {base_name}: {reason}"
            raise errors.SourceUnavailableError(text, is_outage=self._outage.is_on) from exc
        self._asked[base_name] = None
        return self._index.by_base_name(base_name)

    async def _ask(self, base_name: str) -> None:
        """Return when a list that was begun after this call was seen, or the name is there."""
        self._outage.check()  # at once, not when it is this list's turn
        asked_at, begun_before = trio.current_time(), self._refresher.lists_begun
        while self._refresher.list_seen <= begun_before:
            await self._refresher.refresh(full=False)
        entry = self._index.by_base_name(base_name)
        if entry is None and self._refresher.listed_whole_since < asked_at - FULL_AFTER_MISS_S:
            await self._refresher.refresh(full=True)

    # --- what happened here --------------------------------------------------------------------------

    def touch(self, entry: ImageEntry) -> None:
        """Note that the entry's verdict, local state or `is_gone` changed: it is stored within about a second."""
        self._store.touch(entry)

    async def forget(self, entry: ImageEntry) -> None:
        """Drop an image that is gone and of which nothing is here any more. Its number is not used again.

        Raises:
            CacheError: it was not dropped from the store, and not from here.
        """
        await self._store.forget(entry.number)
        if self._index.by_number(entry.number) is entry:
            self._index.remove(entry)
