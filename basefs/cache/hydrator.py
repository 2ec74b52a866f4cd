"""Completes the images that are in use, in the background: has them brought, verified, and made files of their own.

What is due: images that are open, pinned, the base of an overlay, or wanted by nova's pre-cache call, as long as
that lasts; `hydrate_delay_s` after their first use, which a restart does not begin anew; not those that the lower
directory has under their name, nor those that are linked to a volume. How they are brought is the warmer's affair.
What fails is tried again later: at once after an outage, else with growing pauses; an operator is told once.

`run` looks at all images (one pass, nothing awaited) when it is woken, and rests after that for LOOK_PAUSES times as
long as the look took: at most 1/50 of the loop's time, 1 s at 10,000 images, nothing to speak of at 10.
Owned by the trio loop.
"""

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import trio

from basefs import errors
from basefs.cache.warmer import Warmer
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.concurrency.guarded import guarded
from basefs.concurrency.outage import Outage
from basefs.core.retry import backoff_s
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

LOOK_PAUSES, LOOK_PAUSE_S = 50, 1.0
"""Opens may come by the hundred a second, and a look at 10,000 images takes some 20 ms. A pause of a second after each
look, as it was, cost an image wanted just then as long as its first GiB takes to come."""
ACTIVE_MAX = 64
"""Images that are being completed at a time: each has its chunk file open. The others wait for their turn."""
LOWER_AGAIN_S = 60.0
"""So often the lower directory is asked again for an image that it has."""
RETRY_BASE_S, RETRY_CAP_S = 10.0, 600.0
TOLD_AGAIN_S = 86400.0


class Graduation(Protocol):
    """Makes a complete image a file of the lower directory."""

    async def is_lower(self, entry: ImageEntry) -> bool:
        """Whether the lower directory has a file of the image's name: nothing is to be completed then."""
        ...

    async def graduate(self, entry: ImageEntry) -> None:
        """Every byte is here, and `whole` is verified or no_hash.

        Raises:
            BasefsError: why not now; it is tried again later.
        """
        ...


class HydratedImages(Protocol):
    """The images of the node."""

    def entries(self) -> Collection[ImageEntry]:
        """All that are known. Nothing is awaited while they are looked at."""
        ...

    def why_in_use(self, entry: ImageEntry) -> list[str]:
        """Why the image is in use, in an operator's words; empty when it is not."""
        ...

    def is_linked(self, entry: ImageEntry) -> bool:
        """Whether the image's bytes are had without being brought: from a volume, which it has or is about to have."""
        ...

    async def check(self, entry: ImageEntry) -> None:
        """Return if the image may be brought here.

        Raises:
            BasefsError: it may not, or that cannot be found out now.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HydrationSettings:
    """`hydrate_concurrency_max` > 0 is `is_on`; without it only what is wanted by nova's pre-cache call is brought."""

    is_on: bool
    delay_s: float


class Hydrator:
    """`run` it in the service nursery; `wake` it when uses have changed."""

    def __init__(
        self,
        images: HydratedImages,
        warmer: Warmer,
        graduation: Graduation,
        settings: HydrationSettings,
        outage: Outage,
        changed: Callable[[ImageEntry], None],
        *,
        now_ns: Callable[[], int] = time.time_ns,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`changed(entry)` has the entry stored.

        `now_ns` is the wall clock, by which first uses are noted, `timer` the one by which looks are timed.
        """
        self._images = images
        self._warmer = warmer
        self._graduation = graduation
        self._settings = settings
        self._outage = outage
        self._changed = changed
        self._now_ns = now_ns
        self._timer = timer
        self._woken = trio.Event()
        self._active: dict[int, trio.CancelScope] = {}
        self._not_before: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        self._finished: set[int] = set()
        self._graduating = trio.Lock()
        self._told = ConditionLog(log, repeat_s=TOLD_AGAIN_S, clock=trio.current_time)

    def wake(self) -> None:
        """Something was opened, closed, pinned, wanted or evicted, or overlays were looked at."""
        self._woken.set()

    async def complete(self, entry: ImageEntry) -> None:
        """Bring and verify all of the image now, without delay and limit of rate.

        `entry.local.cached_bytes` tells the progress.

        Raises:
            BasefsError: why it cannot be had.
        Cancellation: at any time; it goes on at the common pace if the image is in use.
        """
        async with self._warmer.hold(entry) as warming:
            await warming.done.wait()
        if warming.error is not None:
            raise warming.error

    async def run(self) -> None:
        """Complete what is due, for ever. Ends when it is cancelled, and with it what it has begun."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_outage)
            while True:
                self._woken = trio.Event()
                began = self._timer()
                next_at = self._look(nursery)
                await trio.sleep(min(LOOK_PAUSE_S, LOOK_PAUSES * (self._timer() - began)))
                with trio.move_on_at(next_at):
                    await self._woken.wait()

    async def _watch_outage(self) -> None:
        """After an outage nothing is put off because of it. Ends when it is cancelled."""
        while True:
            ended = self._outage.ended
            await self._outage.next_change(math.inf)
            if self._outage.ended > ended:
                self._not_before.clear()
                self._failures.clear()
            self.wake()

    # --- what is due ------------------------------------------------------------------------------------

    def _look(self, nursery: trio.Nursery) -> float:
        """Begin what is due and not begun, stop what is not due any more; when to look again at the latest."""
        now, next_at = trio.current_time(), math.inf
        due: list[ImageEntry] = []
        for entry in self._images.entries():
            if self._is_to_complete(entry):
                at = max(self._due_at(entry, now), self._not_before.get(entry.number, -math.inf))
                if at <= now:
                    due.append(entry)
                else:
                    next_at = min(next_at, at)
            elif entry.number in self._failures:
                self._forget(entry)  # used anew it is a new matter
        numbers = {entry.number for entry in due}
        for number, scope in self._active.items():
            if number not in numbers:
                scope.cancel()
        if not self._outage.is_on:
            self._begin([entry for entry in due if entry.number not in self._active], nursery)
        return next_at

    def _begin(self, due: list[ImageEntry], nursery: trio.Nursery) -> None:
        due.sort(key=lambda entry: entry.local.used_at_ns or 0)
        for entry in due[: ACTIVE_MAX - len(self._active)]:
            scope = self._active[entry.number] = trio.CancelScope()
            nursery.start_soon(self._complete, entry, scope)

    def _is_to_complete(self, entry: ImageEntry) -> bool:
        local = entry.local
        is_all_here = entry.size > 0 and local.cached_bytes == entry.size
        if not entry.size or local.whole == "quarantined" or entry.verdict.state == "refused":
            return False
        if self._images.is_linked(entry):
            return False
        if not is_all_here:
            self._finished.discard(entry.number)
            if entry.is_gone or entry.record.status != "active":
                return False  # it cannot be had any more
        if is_all_here and local.whole in WHOLE and entry.number in self._finished:
            return False
        if local.is_wanted:
            return True
        is_wrong = local.whole == "refetching"
        return (self._settings.is_on or is_wrong) and bool(self._images.why_in_use(entry))

    def _due_at(self, entry: ImageEntry, now: float) -> float:
        """Trio's clock when the delay after the first use is over; what was asked for by name has none."""
        local = entry.local
        if local.is_wanted or local.whole == "refetching" or local.used_at_ns is None:
            return now
        left_s = local.used_at_ns / 1e9 + self._settings.delay_s - self._now_ns() / 1e9
        return now if left_s > self._settings.delay_s else now + left_s  # more: the clock was set back

    # --- completing one image ---------------------------------------------------------------------------

    async def _complete(self, entry: ImageEntry, scope: trio.CancelScope) -> None:
        """Ends when it is done or put off; cancelled when the image is not due any more."""
        try:
            with (
                guarded(log, "image %s: bug in a transfer", entry.image_id, foreseen=(errors.BasefsError,)) as guard,
                scope,
            ):
                if await self._graduation.is_lower(entry):
                    self._not_before[entry.number] = trio.current_time() + LOWER_AGAIN_S
                    return
                await self._bring(entry)
                await self._finish(entry)
            if guard.bug is not None:
                self._not_before[entry.number] = trio.current_time() + RETRY_CAP_S
        except errors.BasefsError as exc:
            self._put_off(entry, exc)
        finally:
            del self._active[entry.number]
            self.wake()

    async def _bring(self, entry: ImageEntry) -> None:
        await self._images.check(entry)
        # What was found wrong is fetched again as fast as it can be: guests may wait for it.
        async with self._warmer.hold(entry, urgent=entry.local.whole == "refetching") as warming:
            await warming.done.wait()
        if warming.error is not None:
            raise warming.error

    async def _finish(self, entry: ImageEntry) -> None:
        is_in_use = bool(self._images.why_in_use(entry))
        if entry.local.is_wanted:
            entry.local.is_wanted = False  # it was had; else caches that are too small would bring it again and again
            self._changed(entry)
        if is_in_use:
            async with self._graduating:
                await self._graduation.graduate(entry)
        self._forget(entry)
        self._finished.add(entry.number)

    def _put_off(self, entry: ImageEntry, error: errors.BasefsError) -> None:
        failures = self._failures[entry.number] = self._failures.get(entry.number, 0) + 1
        pause_s = backoff_s(failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, jitter=0.5)
        self._not_before[entry.number] = trio.current_time() + pause_s
        if isinstance(error, errors.SourceUnavailableError | errors.ControlError):
            log.debug("image %s is not completed now: %s", entry.image_id, error)
        else:
            self._told.begins(
                (entry.number, type(error)), logging.INFO, "image %s is in use and not completed, trying again: %s",
                entry.image_id, error,
            )  # fmt: skip

    def _forget(self, entry: ImageEntry) -> None:
        self._failures.pop(entry.number, None)
        self._not_before.pop(entry.number, None)
