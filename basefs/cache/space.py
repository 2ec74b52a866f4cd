"""How much room the cache has: what its files hold of the disk, what the disk has free, and both limits.

Everything is counted in allocated blocks (`st_blocks`), so holes cost nothing. Room is asked for *before* a write
and trued up after it, so both limits hold at every moment; what is being written counts twice rather than never.

Any thread may use it; methods that say "thread" ask the disk. No lock that the loop takes is held meanwhile: a disk
that hangs must not stop the loop.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from basefs import errors

BLOCK_BYTES = 4096
SAMPLE_S = 0.25
"""How old the disk's own word on its free space may be when room is given; what was given since is subtracted."""
COUNT_WAIT_S = 10.0
"""How long a write waits for the count of the files that were there at the start (4 ms per 1,000 images)."""
UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """`[basefs] cache_max_bytes` (0: none) and `cache_min_free_bytes` (0: off)."""

    max_bytes: int = 0
    min_free_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """What files may hold by `max_bytes`, less a little for what no write announces.

        That is the extent trees of the files (a block per 340 holes: 1/512 at most) and the write-ahead log of the
        state database between two looks at it.
        """
        return self.max_bytes - self.max_bytes // 512 - 256 * 1024 if self.max_bytes else UNLIMITED


@dataclass(slots=True, eq=False)
class Room:
    """Room that was promised to one transfer and is not yet drawn; `CacheSpace.give_back` must follow."""

    left_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceReport:
    """What `status` shows. `free_bytes` is None until the disk was asked."""

    allocated_bytes: int
    free_bytes: int | None


class CacheSpace:
    """The accountant of one cache directory: `<cache_dir>/chunks/<inode>.{data,map}` and the state database."""

    def __init__(
        self,
        cache_dir: Path,
        chunks_dir: Path,
        limits: CacheLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._cache_dir = cache_dir
        self._chunks_dir = chunks_dir
        self._clock = clock
        self._counted = threading.Event()
        self._settling = threading.Lock()  # held while a file is measured: the last word on it is the newest
        self._lock = threading.Lock()  # held for numbers only
        self._files: dict[int, int] = {}  # by inode number: allocated bytes of both files
        self._forgotten: set[int] = set()  # until counted
        self._used = 0
        self._database = 0
        self._reserved = 0
        self._promised = 0
        self._granted = 0  # all that was ever reserved
        self._free: int | None = None
        self._free_when_granted = 0
        self._sampled_at = -UNLIMITED * 1.0
        self.written_bytes = 0
        """All that was ever written; the evictor's clock."""

    # --- asking -----------------------------------------------------------------------------------------

    def headroom(self) -> int:
        """Bytes that may still be reserved; negative when a limit is broken (somebody else filled the disk)."""
        with self._lock:
            return self._headroom()

    def _headroom(self) -> int:
        if not self._counted.is_set():
            return UNLIMITED  # the write itself waits for the count
        waiting = self._reserved + self._promised
        room = self.limits.usable_bytes - self._database - self._used - waiting
        return min(room, self._room_by_disk() - self._promised)

    def _room_by_disk(self) -> int:
        if not self.limits.min_free_bytes or self._free is None:
            return UNLIMITED
        return self._free - (self._granted - self._free_when_granted) - self.limits.min_free_bytes

    @property
    def capacity(self) -> int:
        """What the cache may hold altogether as things stand; UNLIMITED without limits."""
        with self._lock:
            return min(self.limits.usable_bytes, max(0, self._used + self._headroom()))

    def allocated(self, inode: int) -> int:
        """What the files of one image hold of the disk, as last seen."""
        with self._lock:
            return self._files.get(inode, 0)

    def report(self) -> SpaceReport:
        """The numbers as last seen."""
        with self._lock:
            return SpaceReport(allocated_bytes=self._used + self._database, free_bytes=self._free)

    # --- room -------------------------------------------------------------------------------------------

    def promise(self, length: int) -> Room | None:
        """Room for writes of `length` bytes to come (see `transfer_cost`), if there is any; they draw from it."""
        with self._lock:
            if self._headroom() < length:
                return None
            self._promised += length
            return Room(length)

    def give_back(self, room: Room) -> None:
        """The transfer is over."""
        with self._lock:
            self._promised -= room.left_bytes
            room.left_bytes = 0

    def reserve(self, length: int, room: Room) -> bool:
        """Whether `length` bytes may be written now (thread); if so, `settle` must follow, whatever happens."""
        if not self._counted.wait(COUNT_WAIT_S):
            return False
        if self._clock() - self._sampled_at > SAMPLE_S:
            self.sample()
        return self._reserve(length, room)

    def _reserve(self, length: int, room: Room) -> bool:
        length = _cost(length)
        with self._lock:
            drawn = min(length, room.left_bytes)
            room.left_bytes -= drawn
            self._promised -= drawn
            # What was promised is there, by `max_bytes`; only the disk may have been filled by somebody else since.
            # (A file that is measured while another write to it goes on counts that twice for a moment.)
            if (self._room_by_disk() if drawn == length else self._headroom()) < length:
                return False
            self._reserved += length
            self._granted += length
            return True

    def settle(self, inode: int, length: int, measure: Callable[[], int]) -> None:
        """A write of `length` bytes that were reserved (0: none were) is over; `measure` says what the files hold.

        Thread. A disk that does not say leaves the old number; the next write to the file mends it.
        """
        with self._settling:
            try:
                allocated: int | None = measure()
            except errors.CacheError:
                allocated = None
            with self._lock:
                if length:
                    self._reserved -= _cost(length)
                    self.written_bytes += length
                if allocated is not None:
                    self._used += allocated - self._files.get(inode, 0)
                    self._files[inode] = allocated
                    self._forgotten.discard(inode)

    def forget(self, inode: int) -> None:
        """The files of this image are gone."""
        with self._settling, self._lock:
            self._used -= self._files.pop(inode, 0)
            if not self._counted.is_set():
                self._forgotten.add(inode)

    # --- asking the disk --------------------------------------------------------------------------------

    def sample(self) -> None:
        """Ask the disk for its free space, and for the size of the state database (thread).

        Does nothing where the disk does not answer: then its last word counts.
        """
        with self._lock:
            # What is being written now may or may not be in the disk's answer: it counts as not.
            granted = self._granted - self._reserved
        try:
            disk = os.statvfs(self._cache_dir)
            database = sum(_allocated(path) for path in self._cache_dir.glob("state.sqlite*"))
        except OSError:
            return
        with self._lock:
            self._free = disk.f_bavail * disk.f_frsize
            self._free_when_granted = granted
            self._database = database
            self._sampled_at = self._clock()

    def count(self) -> None:
        """Count what is there (thread); two stats an image. Writes wait for it.

        Raises:
            CacheError: the directory cannot be read; nothing may be written then.
        """
        found: dict[int, int] = {}
        try:
            with os.scandir(self._chunks_dir) as entries:
                for entry in entries:
                    stem = entry.name.partition(".")[0]
                    if stem.isdecimal():
                        found[int(stem)] = found.get(int(stem), 0) + _allocated(Path(entry.path))
        except OSError as exc:
            raise errors.CacheError(f"cache directory {self._chunks_dir}: {exc}") from exc
        self.sample()
        with self._lock:
            for inode, allocated in found.items():
                if inode not in self._files and inode not in self._forgotten:
                    self._files[inode] = allocated
                    self._used += allocated
            self._forgotten.clear()
            self._counted.set()


def transfer_cost(length: int) -> int:
    """Room that a transfer of `length` bytes in pieces of at least a chunk needs: for each piece a block of the map."""
    return length + 16 * BLOCK_BYTES + length // 128


def _cost(length: int) -> int:
    """What a write of `length` bytes may allocate: its blocks, and one of the map for the checksums."""
    return (-(-length // BLOCK_BYTES) + 1) * BLOCK_BYTES


def _allocated(path: Path) -> int:
    try:
        return 512 * os.lstat(path).st_blocks
    except FileNotFoundError:
        return 0
