"""Brings whole images in the background, and has them verified: on request, and for the hydrator.

A warming has holders: *urgent* ones (commands that wait), who have it go on as fast as Glance gives it, and others (the
hydrator), for whom it goes on at the common pace. It may be kept: it goes on, urgently, whatever happens to who asked.
It ends when the image is complete and verified, when it fails for good, or when the last holder of one that is not
kept leaves. Whatever its urgency, it begins no transfer while a reader waits for one.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchServices
from basefs.cache.image_fetcher import ImageFetcher
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.concurrency.guarded import guarded

log = logging.getLogger(__name__)

WORKERS = 3
"""Requests in flight per urgent warming: 2-4 reach what one Glance gives (rig.md 2.6)."""
HASHES_BESIDE = len(os.sched_getaffinity(0)) > 2
"""Whether a hash, which keeps a processor busy, takes nothing from a transfer as fast as Glance can be: there are two
at work then, Glance's not counted."""


@dataclass(slots=True, eq=False)
class Warming:
    """One image's warming; `error` is set when it failed for good, `is_stopped` when that was asked for."""

    entry: ImageEntry
    is_kept: bool = False
    urgent_holders: int = 0
    other_holders: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: errors.BasefsError | None = None
    is_stopped: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    add_worker: Callable[[bool], None] | None = None
    """Starts one more worker, urgent or not; None while none is at work."""
    came: trio.Event = field(default_factory=trio.Event)
    """Something was brought that is not hashed yet."""
    is_over: trio.Event = field(default_factory=trio.Event)
    """The image is complete, or cannot be."""

    @property
    def is_urgent(self) -> bool:
        """Whether it is to go on as fast as it can."""
        return self.is_kept or self.urgent_holders > 0


class Warmer:
    """All warmings; at most one an image. Owned by the trio loop."""

    def __init__(
        self,
        services: FetchServices,
        open_image: Callable[[ImageEntry], AbstractAsyncContextManager[ImageFetcher]],
    ) -> None:
        """`open_image(entry)` gives the image's fetcher, and closes it again where nobody else uses it."""
        self._services = services
        self._open_image = open_image
        self._warmings: dict[int, Warming] = {}
        self._is_stopped = False

    def is_warming(self, entry: ImageEntry) -> bool:
        """Whether the image is being brought on request."""
        warming = self._warmings.get(entry.number)
        return warming is not None and warming.is_urgent

    def is_hydrating(self, entry: ImageEntry) -> bool:
        """Whether the image is being brought, because it is in use."""
        warming = self._warmings.get(entry.number)
        return warming is not None and not warming.is_urgent

    @property
    def hydrating(self) -> int:
        """Images that are being brought because they are in use."""
        return sum(not warming.is_urgent for warming in self._warmings.values())

    def keep(self, entry: ImageEntry) -> Warming:
        """Warm the image, whoever goes away."""
        warming = self._begin(entry)
        if not warming.is_urgent:
            self._add_workers(warming, urgent=True)
        warming.is_kept = True
        return warming

    @asynccontextmanager
    async def hold(self, entry: ImageEntry, *, urgent: bool = True) -> AsyncIterator[Warming]:
        """Warm the image while the body runs, and longer if somebody else wants it."""
        warming = self._begin(entry)
        if not (warming.is_urgent if urgent else warming.other_holders):
            self._add_workers(warming, urgent=urgent)
        if urgent:
            warming.urgent_holders += 1
        else:
            warming.other_holders += 1
        try:
            yield warming
        finally:
            if urgent:
                warming.urgent_holders -= 1
            else:
                warming.other_holders -= 1
            if not warming.is_urgent and not warming.other_holders:
                warming.scope.cancel()

    def cancel(self, entry: ImageEntry) -> None:
        """Stop warming the image, whoever wants it."""
        warming = self._warmings.get(entry.number)
        if warming is not None:
            warming.scope.cancel()

    async def stop(self) -> None:
        """Stop all warmings, and return when they have ended; none may be begun any more."""
        self._is_stopped = True
        for warming in list(self._warmings.values()):
            warming.scope.cancel()
            await warming.done.wait()

    def _begin(self, entry: ImageEntry) -> Warming:
        warming = self._warmings.get(entry.number)
        if warming is None or warming.scope.cancel_called:  # one that is ending is of no use to who comes now
            warming = Warming(entry)
            if self._is_stopped:
                warming.is_stopped, warming.error = True, errors.ControlError("basefs is shutting down")
                warming.done.set()
                return warming
            self._warmings[entry.number] = warming
            self._services.nursery.start_soon(self._run, warming)
        return warming

    async def _run(self, warming: Warming) -> None:
        """Ends when the warming does; cancelled by its scope or with the service."""
        try:
            with (
                guarded(
                    log, "image %s: bug in a transfer", warming.entry.image_id, foreseen=(errors.BasefsError,)
                ) as guard,
                warming.scope,
            ):
                async with self._open_image(warming.entry) as fetcher:
                    await self._complete(warming, fetcher)
            if guard.bug is not None:
                warming.error = errors.InternalError(f"warming of image {warming.entry.image_id} failed")
            elif warming.scope.cancelled_caught:
                warming.is_stopped = True
                warming.error = errors.ControlError(f"warming of image {warming.entry.image_id} was stopped")
        except errors.BasefsError as exc:
            warming.error = exc
        finally:
            if self._warmings.get(warming.entry.number) is warming:
                del self._warmings[warming.entry.number]
            warming.done.set()
            level = logging.INFO if warming.is_urgent or warming.error is None else logging.DEBUG
            log.log(level, "image %s: warming ended: %s", warming.entry.image_id, warming.error or "complete")

    async def _complete(self, warming: Warming, fetcher: ImageFetcher) -> None:
        try:
            with fetcher.held():
                fetcher.trace.replay_asked()
                await fetcher.trace.wait_replayed()  # what a boot reads comes first
                while await fetcher.whole.settle() not in WHOLE:
                    await self._bring(warming, fetcher)
        except trio.Cancelled:
            fetcher.stop_unwanted()
            raise

    # --- workers ----------------------------------------------------------------------------------------

    async def _bring(self, warming: Warming, fetcher: ImageFetcher) -> None:
        """Have workers of both kinds, as there are holders, until the image is complete or cannot be."""
        async with trio.open_nursery() as nursery:
            warming.add_worker = partial(nursery.start_soon, partial(self._work, warming, fetcher))
            if warming.is_urgent:
                self._add_workers(warming, urgent=True)
            if warming.other_holders:
                self._add_workers(warming, urgent=False)
            nursery.start_soon(self._follow, warming, fetcher)
            await warming.is_over.wait()
            warming.add_worker = None
            nursery.cancel_scope.cancel()
        warming.is_over = trio.Event()
        if warming.error is not None:
            raise warming.error

    def _add_workers(self, warming: Warming, *, urgent: bool) -> None:
        if warming.add_worker is not None:
            for _ in range(WORKERS if urgent else self._services.pace.concurrency_max):
                warming.add_worker(urgent)

    async def _work(self, warming: Warming, fetcher: ImageFetcher, urgent: bool) -> None:
        """Ends when nothing is missing, when nobody wants it any more, or with a failure that waiting does not mend."""
        try:
            while not fetcher.is_complete and (warming.is_urgent if urgent else warming.other_holders):
                try:
                    await (self._fetch(fetcher) if urgent else self._fetch_in_turn(fetcher))
                    warming.came.set()
                except (errors.SourceUnavailableError, errors.SourceCorruptError):
                    await fetcher.wait_retry()
        except errors.BasefsError as exc:
            warming.error = exc
        if warming.error is not None or fetcher.is_complete:
            warming.is_over.set()

    async def _follow(self, warming: Warming, fetcher: ImageFetcher) -> None:
        """Have what came hashed while more comes, unless that takes from what brings it. Cancelled with the workers."""
        is_of_use = True
        while is_of_use:
            await warming.came.wait()
            warming.came = trio.Event()
            if HASHES_BESIDE or not self._services.pace.is_fast:
                is_of_use = await fetcher.whole.follow()

    async def _fetch(self, fetcher: ImageFetcher) -> None:
        await fetcher.fetch_background(self._services.pace.request_size.bytes)

    async def _fetch_in_turn(self, fetcher: ImageFetcher) -> None:
        async with self._services.pace.turn() as turn:
            turn.moved_bytes = await fetcher.fetch_background(turn.bytes_max)
            self._services.counters.hydrated_bytes += turn.moved_bytes
