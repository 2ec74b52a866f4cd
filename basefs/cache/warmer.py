"""Brings whole images at background priority: for `basefs image warm` and for nova's pre-cache call.

A warming has holders (commands that wait) or is kept (goes on whatever happens to who asked). It ends when
the image is complete, when it fails for good, or when the last holder of one that is not kept leaves.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from basefs import errors
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import ImageEntry

log = logging.getLogger(__name__)

WORKERS = 3
"""Requests in flight per warming: 2-4 reach what one Glance gives (517 MiB/s at 4 MiB, rig.md 2.6)."""
REQUEST_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class Warming:
    """One image's warming; `error` is set when it failed for good."""

    entry: ImageEntry
    is_kept: bool = False
    holders: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: errors.BasefsError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Warmer:
    """All warmings; at most one an image. Owned by the trio loop."""

    def __init__(self, nursery: trio.Nursery, open_image: Callable[[ImageEntry], Awaitable[ImageFetcher]]) -> None:
        self._nursery = nursery
        self._open_image = open_image
        self._warmings: dict[int, Warming] = {}

    def is_warming(self, entry: ImageEntry) -> bool:
        """Whether the image is being brought."""
        return entry.number in self._warmings

    def keep(self, entry: ImageEntry) -> Warming:
        """Warm the image, whoever goes away."""
        warming = self._begin(entry)
        warming.is_kept = True
        return warming

    @asynccontextmanager
    async def hold(self, entry: ImageEntry) -> AsyncIterator[Warming]:
        """Warm the image while the body runs, and longer if somebody else wants it."""
        warming = self._begin(entry)
        warming.holders += 1
        try:
            yield warming
        finally:
            warming.holders -= 1
            if not warming.holders and not warming.is_kept:
                warming.scope.cancel()

    def cancel(self, entry: ImageEntry) -> None:
        """Stop warming the image, whoever wants it."""
        warming = self._warmings.get(entry.number)
        if warming is not None:
            warming.scope.cancel()

    def _begin(self, entry: ImageEntry) -> Warming:
        warming = self._warmings.get(entry.number)
        if warming is None:
            warming = self._warmings[entry.number] = Warming(entry)
            self._nursery.start_soon(self._run, warming)
        return warming

    async def _run(self, warming: Warming) -> None:
        """Ends when the warming does; cancelled by its scope or with the service."""
        fetcher = None
        try:
            with warming.scope:
                fetcher = await self._open_image(warming.entry)
                async with trio.open_nursery() as nursery:
                    for _ in range(WORKERS):
                        nursery.start_soon(self._work, warming, fetcher, nursery.cancel_scope)
            if warming.scope.cancelled_caught:
                warming.error = errors.ControlError(f"warming of image {warming.entry.image_id} was stopped")
        except errors.BasefsError as exc:
            warming.error = exc
        finally:
            if fetcher is not None and warming.scope.cancelled_caught:
                fetcher.stop_unwanted()
            del self._warmings[warming.entry.number]
            warming.done.set()
            log.info("image %s: warming ended: %s", warming.entry.image_id, warming.error or "complete")

    async def _work(self, warming: Warming, fetcher: ImageFetcher, all_work: trio.CancelScope) -> None:
        """Ends when nothing is missing, or with a failure that waiting does not mend."""
        while True:
            try:
                if not await fetcher.fetch_background(REQUEST_BYTES):
                    return
            except (errors.SourceUnavailableError, errors.SourceCorruptError):
                await fetcher.wait_retry()
            except errors.BasefsError as exc:
                warming.error = exc
                all_work.cancel()
                return
