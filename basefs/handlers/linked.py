"""Images that are read from an attached volume; what that does not give is read through Glance, in the same read.

Invariants: once `stop` was called no read begins in the volume; it is closed when no thread is inside, and detached
when no reader process has it open, either (`lending`).
A read that hangs in the volume is left behind in its thread, VOLUME_THREADS_MAX of them an image: then, as after an
error, the image is told to be broken, and new reads do not begin there. Owned by the trio loop.
"""

from collections.abc import Awaitable, Callable

import trio

from basefs.cache.hit_buffer import HIT_BYTES_MAX, hit_target
from basefs.cache.reader_table import ReaderTable, Share
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.handlers.base import Patience, PreparedImage
from basefs.handlers.lending import Lending
from basefs.handlers.viewed import ViewedImage
from basefs.views.choice import Views
from basefs.views.stored import ByteSource, StoredView
from basefs.volumes.base import VolumeBytes

HANG_S = 5.0
"""A volume that answers no read for so long hangs. Longer than a path of multipath takes to fail over (1-3 s); half of
what a reader with the default `other_io_deadline_s` waits is left for Glance."""
VOLUME_THREADS_MAX = 8
"""Cold reads of one volume at a time, and threads that may hang in it."""
_PROBE_BYTES = 4096

_closing = BlockingCalls("volumes' end", threads_max=4)


class VolumeSource:
    """The stored bytes of an image (`ByteSource`): `opened`, which is its own from here, cut at the image's size."""

    def __init__(
        self,
        entry: ImageEntry,
        opened: VolumeBytes,
        otherwise: Callable[[], Awaitable[ByteSource]],
        broke: Callable[[str], None],
    ) -> None:
        """`otherwise()` has the same bytes by another way; `broke(why)` is told each time the volume fails a read."""
        self.size = entry.size
        self._opened = opened
        self._otherwise = otherwise
        self._broke = broke
        self._threads = BlockingCalls(f"volume of {entry.image_id}", threads_max=VOLUME_THREADS_MAX)
        self._read_now: Callable[[list[memoryview], int], bool] = opened.read_now
        self._is_stopped = False
        self._lending: Lending | None = None
        self._answered_at = trio.current_time()
        self.hit: Callable[[int, int], memoryview | bytes | None] = self._hit
        self.hit_into: Callable[[int, memoryview], bool] = self._hit_into

    def _hit(self, offset: int, size: int) -> memoryview | bytes | None:
        """See `PreparedImage.hit`; None when a page is not in memory, or once it is stopped."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if size > HIT_BYTES_MAX:
            return None
        target = hit_target(size)
        return target[0] if self._read_now(target, offset) else None

    def _hit_into(self, offset: int, target: memoryview) -> bool:
        """See `ChunkFile.hit_into`."""
        return self._read_now([target], offset)

    async def read(self, offset: int, length: int, *, deadline_s: float, patient: bool) -> bytes | memoryview:
        """See `ImageFetcher.read`, which has the last word."""
        until = trio.current_time() + deadline_s
        data = await self.volume_read(offset, length, limit_s=min(HANG_S, deadline_s / 2))
        if data is not None:
            return data
        other = await self._otherwise()
        left_s = max(0.0, until - trio.current_time())
        return await other.read(offset, length, deadline_s=left_s, patient=patient)

    async def volume_read(self, offset: int, length: int, *, limit_s: float) -> bytes | None:
        """As `read`, from the volume alone; None when it did not give the bytes within `limit_s`."""
        hit = self._hit(offset, length)
        if hit is not None:
            return bytes(hit)
        if self._is_stopped:
            return None
        where = f"bytes {offset}-{offset + length - 1}"
        try:
            data = await self._threads.run_within(limit_s, self._opened.read, offset, length)
        except OSError as exc:
            self._broke(f"{where}: {exc.strerror or exc}")
            return None
        except trio.TooSlowError:
            # One that only waits for its turn, on a volume that answers others, says nothing of the volume.
            if trio.current_time() - self._answered_at >= limit_s:
                self._broke(f"{where}: no answer within {limit_s:g} s")
            return None
        self._answered_at = trio.current_time()
        return data

    def lend(self, lending: Lending | None) -> None:
        """Let readers answer what is in memory, too; to be called when the volume was compared and is in escrow."""
        self._lending = lending

    def share(self, offset: int, size: int) -> Share | None:
        """See `PreparedImage.share`, for what shows the stored bytes."""
        fd = self._opened.fd_to_hold()
        if self._lending is None or self._is_stopped or fd is None:
            return None
        # What cannot say that it is in memory (NFS, librbd) would be handed on, and cost a call more each time.
        if not self._lending.is_lent and self._hit(offset, min(size, _PROBE_BYTES)) is None:
            return None
        return self._lending.share(fd, self.size)

    def stop(self) -> None:
        """Begin no read in the volume any more: they go the other way from here.

        A reader that is at one throws away what it reads; `VolumeLeases` knows when none has the volume open.
        """
        self._is_stopped = True
        self._read_now = _nothing
        if self._lending is not None:
            self._lending.revoke()

    async def close(self) -> None:
        """Stop, and give the volume back once no thread is inside, which takes as long as one hangs there."""
        self.stop()
        await self._threads.take_all_turns()
        await _closing.run(self._opened.close)


class LinkedImage(ViewedImage):
    """The image's view over its volume."""

    def __init__(self, entry: ImageEntry, source: VolumeSource, views: Views) -> None:
        super().__init__(views.of(entry, source))
        self.source = source

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:  # noqa: ARG002 (the lending has it)
        """See `PreparedImage.share`. A disk in a qcow2 is the server's."""
        return self.source.share(offset, size) if isinstance(self._view, StoredView) else None


class ReopeningImage:
    """An image whose volume is about to be had again: its reads wait for that, a bounded while, then go on wherever."""

    def __init__(
        self,
        entry: ImageEntry,
        reopened: Callable[[], Awaitable[None]],
        next_image: Callable[[ImageEntry], Awaitable[PreparedImage]],
    ) -> None:
        """`reopened()` returns when there is no need to wait any more; then `next_image` is another one."""
        self._entry = entry
        self._reopened = reopened
        self._next_image = next_image
        self.hit: Callable[[int, int], memoryview | bytes | None] = _no_hit

    @property
    def size(self) -> int:
        """See `PreparedImage.size`."""
        return self._entry.shown_size

    def share(self, table: ReaderTable, offset: int, size: int) -> Share | None:  # noqa: ARG002 (what comes next may have one)
        """See `PreparedImage.share`."""
        return None

    async def read(self, offset: int, size: int, patience: Patience) -> bytes | memoryview:
        """See `PreparedImage.read`."""
        begun = trio.current_time()
        with trio.move_on_after(patience.deadline_s / 2):
            await self._reopened()
        image = await self._next_image(self._entry)
        left_s = max(0.0, begun + patience.deadline_s - trio.current_time())
        return await image.read(offset, size, Patience(deadline_s=left_s, is_guest=patience.is_guest))


def _nothing(_target: list[memoryview], _offset: int) -> bool:
    return False


def _no_hit(_offset: int, _size: int) -> None:
    return None
