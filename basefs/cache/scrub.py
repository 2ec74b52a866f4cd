"""The background scrub: every stored chunk of every image is read from the disk and checked, again and again, slowly.

Where it is outlives a restart, roughly: it is noted about once a minute. Counters are of this server's life.
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass

import trio

from basefs import errors
from basefs.cache.image_check import CheckedImages, check_image
from basefs.catalog.records import ImageEntry
from basefs.catalog.store import CatalogStore

log = logging.getLogger(__name__)

START_AFTER_S = 2.0
"""A server that was just started has better things to do."""
NOTE_S = 60.0
PAUSE_S = 0.05
SLEEP_S_MAX = 600.0
"""The wall clock, by which rounds are timed, may jump."""
_KEY = "scrub"


@dataclass(slots=True)
class ScrubCounters:
    """What the scrub did since the server began."""

    bytes: int = 0
    damaged_chunks: int = 0
    rounds: int = 0
    last_round_at: float | None = None
    """When the last full round ended, in seconds since 1970, also one of an earlier server."""


@dataclass(slots=True)
class _Place:
    """Where the scrub is; persisted. `number` 0: between two rounds."""

    number: int = 0
    chunk: int = 0
    round_began_at: float = 0.0
    last_round_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubSettings:
    """At most `bytes_s` (> 0) a second, and a round begins no sooner than `interval_s` after the one before did."""

    bytes_s: int
    interval_s: float


class Scrubber:
    """`run` it in the service nursery."""

    def __init__(
        self,
        images: CheckedImages,
        store: CatalogStore,
        stored: Callable[[], Awaitable[list[ImageEntry]]],
        readers_wait: Callable[[], bool],
        settings: ScrubSettings,
    ) -> None:
        """`stored` gives the images that have a chunk file, by number; `readers_wait`: leave the disk to them."""
        self._images = images
        self._store = store
        self._stored = stored
        self._readers_wait = readers_wait
        self._settings = settings
        self._place = _Place()
        self._noted_at = 0.0
        self.counters = ScrubCounters()

    async def run(self) -> None:
        """Scrub until cancelled. What fails is tried again in the next round."""
        await trio.sleep(START_AFTER_S)
        await self._load()
        while True:
            await self._wait_for_round()
            await self._round()

    async def _wait_for_round(self) -> None:
        """Return when a round is due, or one is to be gone on with."""
        if self._place.number:
            return
        while (left_s := self._place.round_began_at + self._settings.interval_s - time.time()) > 0:
            if left_s > self._settings.interval_s:
                break  # the clock was set back
            await trio.sleep(min(left_s, SLEEP_S_MAX))
        self._place.round_began_at = time.time()

    async def _round(self) -> None:
        for entry in await self._stored():
            if entry.number < self._place.number:
                continue
            chunk = self._place.chunk if entry.number == self._place.number else 0
            self._place.number, self._place.chunk = entry.number, chunk
            try:
                await self._scrub(entry, chunk)
            except errors.BasefsError as exc:
                log.info("scrub: image %s is passed over: %s", entry.image_id, exc)
        self._place.number = self._place.chunk = 0
        self._place.last_round_at = self.counters.last_round_at = time.time()
        self.counters.rounds += 1
        await self._note()

    async def _scrub(self, entry: ImageEntry, from_chunk: int) -> None:
        before_bytes = before_damaged = 0
        async with aclosing(check_image(entry, self._images, from_chunk=from_chunk)) as steps:
            begun = trio.current_time()
            async for step in steps:
                done = step.checked_bytes - before_bytes
                self.counters.bytes += done
                self.counters.damaged_chunks += step.damaged_chunks - before_damaged
                before_bytes, before_damaged = step.checked_bytes, step.damaged_chunks
                self._place.chunk = step.next_chunk
                if trio.current_time() - self._noted_at >= NOTE_S:
                    await self._note()
                begun = max(begun + done / self._settings.bytes_s, trio.current_time())
                await trio.sleep_until(begun)
                while self._readers_wait():  # noqa: ASYNC110  # nobody else is to be told when they are done
                    await trio.sleep(PAUSE_S)

    async def _load(self) -> None:
        try:
            text = (await self._store.values()).get(_KEY, "{}")
            self._place = _Place(**json.loads(text))
        except (errors.CacheError, ValueError, TypeError) as exc:
            log.info("scrub: begins anew: %s", exc)
        self.counters.last_round_at = self._place.last_round_at

    async def _note(self) -> None:
        self._noted_at = trio.current_time()
        try:
            await self._store.upsert([], {_KEY: json.dumps(asdict(self._place))})
        except errors.CacheError as exc:
            log.debug("scrub: where it is cannot be noted: %s", exc)
