"""A complete, verified image becomes a plain raw file of the lower directory: what nova's own download would have left.

From then on nova owns the file. Who has the image open goes on with the same bytes, read from that file; the cache has
its space back. Steps: the bytes are checked (each chunk by its checksum, as the disk has it); they become a file by
rename, by shared blocks, by copy or by `qemu-img convert`; `DownloadingTemplateImageHandler.hand_over` moves the
readers over; the file gets its name. Killed at any step: the cache still has the image, or the file has its name;
what was half-made is removed at the next start.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from basefs import errors
from basefs.catalog.records import WHOLE, ImageEntry
from basefs.concurrency.single_flight import SingleFlight
from basefs.concurrency.threads import BlockingCalls
from basefs.handlers import parts
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.graduated import GraduatedImages
from basefs.handlers.making import FileMaker, GraduationSettings
from basefs.handlers.parts import ShownFile

log = logging.getLogger(__name__)


@dataclass(slots=True)
class GraduationCounters:
    """Since the server began."""

    images: int = 0
    failures: int = 0
    bytes: int = 0
    """Allocated in the files that were made."""


@dataclass(slots=True, eq=False)
class _Work:
    """One image that is becoming a file."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class Graduator:
    """Makes images files of the lower directory; one at a time an image. Owned by the trio loop."""

    def __init__(
        self,
        handler: DownloadingTemplateImageHandler,
        graduated: GraduatedImages,
        settings: GraduationSettings,
        nursery: trio.Nursery,
        *,
        shown: Callable[[ImageEntry], ShownFile],
        stored: Callable[[ImageEntry], Awaitable[None]],
    ) -> None:
        """`shown(entry)` is what `stat` shows now; `stored(entry)` returns when what changed outlives this server."""
        self._handler = handler
        self._graduated = graduated
        self._settings = settings
        self._stored = stored
        # Apart from the readers' threads: they must not wait behind a copy.
        self._blocking = BlockingCalls("graduation", threads_max=2)
        self._maker = FileMaker(handler, graduated.lower_fd, settings, self._blocking, shown=shown, stored=stored)
        self._flights: SingleFlight[int, None] = SingleFlight(nursery)
        self._under_way: set[_Work] = set()
        self._is_stopped = False
        self._tidied = trio.Event()
        self.counters = GraduationCounters()

    @property
    def is_on(self) -> bool:
        """Whether images become files."""
        return self._settings.is_on

    async def is_lower(self, entry: ImageEntry) -> bool:
        """Whether the lower directory has a file of the image's name, whoever made it.

        Raises:
            LowerFileError: it does not say.
        """
        return await self._graduated.has_name(entry)

    async def graduate(self, entry: ImageEntry) -> None:
        """Make the image a file, if there is none of its name yet; does nothing where `[basefs] graduate = false`.

        Raises:
            BasefsError: why not now; everything is as before.
        Cancellation: ends this wait only.
        """
        if self._is_stopped:
            raise errors.ControlError("basefs is shutting down")
        if self.is_on:
            await self._flights.run(entry.number, lambda: self._graduate(entry))

    async def _graduate(self, entry: ImageEntry) -> None:
        """Runs as a flight: one at a time for an image; cancelled by `stop`."""
        work = _Work()
        self._under_way.add(work)
        try:
            with work.scope:
                await self._tidied.wait()
                await self._make(entry)
        finally:
            self._under_way.discard(work)
            work.done.set()
        if work.scope.cancelled_caught:
            raise errors.ControlError("basefs is shutting down")

    async def _make(self, entry: ImageEntry) -> None:
        begun = trio.current_time()
        try:
            allocated_bytes = None if await self.is_lower(entry) else await self._maker.make(entry)
        except errors.BasefsError as exc:
            if not _is_second(exc):
                self.counters.failures += 1
                log.warning("image %s: it did not become a file of the lower directory: %s", entry.image_id, exc)
                raise
            allocated_bytes = None
        if allocated_bytes is None:
            # Another host that shares the directory came first, or nova itself.
            await self._handler.remove_image(entry)
            return
        self.counters.images += 1
        self.counters.bytes += allocated_bytes
        log.info(
            "image %s: it is a file of the lower directory now, nova's own: %d bytes, %d allocated, in %.1f s",
            entry.image_id, entry.shown_size, allocated_bytes, trio.current_time() - begun,
        )  # fmt: skip

    async def stop(self) -> None:
        """End what is under way, as if it had failed; nothing is begun any more."""
        self._is_stopped = True
        for work in list(self._under_way):
            work.scope.cancel()
            await work.done.wait()

    # --- after servers that were killed ---------------------------------------------------------------------

    async def tidy_up(self, entries: Callable[[], Iterable[ImageEntry]]) -> None:
        """Finish or take back what a killed server was at; nothing is graduated before. Once, at the start."""
        try:
            await self._blocking.run(parts.remove_left_over, self._graduated.lower_fd, self._settings.host)
            stored = await self._handler.stored_numbers()
            for entry in list(entries()):
                if entry.local.is_graduated or entry.number in stored:
                    await self._settle(entry, is_stored=entry.number in stored)
        except (errors.BasefsError, OSError) as exc:
            log.warning("what a killed server left in the lower directory was not tidied up: %s", exc)
        finally:
            self._tidied.set()

    async def _settle(self, entry: ImageEntry, *, is_stored: bool) -> None:
        is_there = await self._graduated.is_there(entry)
        if not is_there:
            self._graduated.gone(entry)
            return
        local = entry.local
        was_whole = local.cached_bytes == entry.size > 0 and local.whole in WHOLE
        if not local.is_graduated and (was_whole or self._graduated.get(entry.number) is not None):
            local.is_graduated = True  # the server was killed between the name and the note of it
            await self._stored(entry)
        if is_stored:
            await self._handler.drop_left_over(entry)


def _is_second(error: errors.BasefsError) -> bool:
    return isinstance(error, errors.LowerFileError) and error.os_error.errno == errno.EEXIST
