"""The local bytes of one image: `<inode>.data` (sparse) and `<inode>.map` (the checksums of its chunks).

Invariants:
- A chunk's bytes are written before its checksum, its checksum before its `ready` byte; whoever sees a
  ready byte sees the bytes. Nothing is synced: after a power cut a checksum tells a chunk that is whole
  from one that is not.
- `ready`, one byte a chunk (NOT_READY: not to be served; READY; READY_MARKED: serve, but tell the planner first;
  READY_AGED: serve, but note the use first), is in memory and begins as zeros. A chunk becomes ready only by
  `mark_ready`, after it was written or verified in the life of this server.
- Once the image is shared with readers `ready` is a memfd, and what is not ready any more is told by the generation
  in the table as well, before its bytes change: a reader that looks at both around its read has the bytes of one time.
- Nothing of the cache disk is mapped: a mapped page that the disk cannot give or take (EIO, read-only) is a
  SIGBUS that ends the server, and one that it does not give (a disk that hangs) stops the loop.

Methods that say "thread" block on the disk and are called through `BlockingCalls`; the others touch memory only.
"""

import mmap
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from basefs import errors
from basefs.cache.hit_buffer import HIT_BYTES_MAX, hit_buffer, hit_targets
from basefs.cache.holes import punch_hole
from basefs.cache.reader_table import Entry, ReaderTable, Share
from basefs.core.byte_ranges import runs
from basefs.core.chunk_map import PAGE, SUM_BYTES, SUMS_OFFSET, ChunkMapHeader, checksum, parse_header

NOT_READY, READY, READY_MARKED, READY_AGED = 0, 1, 2, 3

# Names of this module: two look-ups fewer a read.
_hit_buffer, _hit_targets = hit_buffer, hit_targets
_preadv = os.preadv
_NOWAIT = os.RWF_NOWAIT
_ALL_READY = bytes([READY]) * (HIT_BYTES_MAX // (16 * 1024) + 2)
_AGED = bytes(READY_AGED if value == READY else value for value in range(256))


def data_path(directory: Path, inode: int) -> Path:
    """Where the stored bytes of the image with this inode are."""
    return directory / f"{inode}.data"


def map_path(directory: Path, inode: int) -> Path:
    """Where the chunk map of the image with this inode is."""
    return directory / f"{inode}.map"


def remove_files(directory: Path, inode: int) -> None:
    """Forget an image's local bytes (thread). The map goes first: data without a map are nothing."""
    for path in (map_path(directory, inode), data_path(directory, inode)):
        path.unlink(missing_ok=True)


class ChunkFile:
    """An open pair of data and map file. Build it with `open_chunk_file`."""

    def __init__(self, header: ChunkMapHeader, data_fd: int, map_fd: int) -> None:
        self.header = header
        self.size = header.size
        self.data_fd = data_fd
        self._map_fd = map_fd
        self._shift = header.chunk_bytes.bit_length() - 1
        self.seed = header.seed()
        self._ready = memoryview(bytearray(header.chunks))
        self._share: tuple[Share, Entry] | None = None
        self._zeros = bytes(header.chunk_bytes)
        self._writing = threading.Lock()  # the kernel lets one write at a time, and the others spin for their turn

    def hit(self, offset: int, size: int) -> memoryview | bytes | None:
        """The bytes of `[offset, offset + size)` up to the end of the image, if they can be had at once.

        None when a chunk is not ready, a marker asks for the planner, or a page is not in memory. The
        answer is valid until the next await. 0 <= offset; never raises.
        """
        try:
            end = offset + size
            if end > self.size:
                end = self.size
                size = end - offset
                if size <= 0:
                    return b""
            first = offset >> self._shift
            last = (end - 1) >> self._shift
            if first == last:
                if self._ready[first] != READY:
                    return None
            elif size > HIT_BYTES_MAX or self._ready[first : last + 1] != _ALL_READY[: last + 1 - first]:
                return None
            target = _hit_targets.get(size) or [_hit_buffer[:size]]
            # Inline: 6 us against 64 us through a thread. RWF_NOWAIT: a cold page must not stop the loop.
            if _preadv(self.data_fd, target, offset, _NOWAIT) == size:
                return target[0]
        except (OSError, ValueError):  # a cold page; a file that was closed meanwhile
            pass
        return None

    def hit_into(self, offset: int, target: memoryview) -> bool:
        """As `hit` for `[offset, offset + len(target))`, all of it in the image, into `target`; whether it is there."""
        try:
            size = len(target)
            first = offset >> self._shift
            last = (offset + size - 1) >> self._shift
            if size > HIT_BYTES_MAX or self._ready[first : last + 1] != _ALL_READY[: last + 1 - first]:
                return False
            return _preadv(self.data_fd, [target], offset, _NOWAIT) == size
        except (OSError, ValueError):
            return False

    def is_ready(self, index: int) -> bool:
        """Whether chunk `index` may be served."""
        return self._ready[index] != NOT_READY

    def is_marked(self, index: int) -> bool:
        """Whether the first touch of chunk `index` is to be told to the planner."""
        return self._ready[index] == READY_MARKED

    def mark_ready(self, index: int, *, marker: bool = False, aged: bool = False) -> None:
        """Let chunk `index` be served; its bytes and checksum are in place."""
        self._ready[index] = READY_MARKED if marker else READY_AGED if aged else READY

    def mark_not_ready(self, index: int) -> None:
        """Stop serving chunk `index`."""
        self._ready[index] = NOT_READY
        if self._share is not None:
            self._share[1].lost()

    def mark_none_ready(self) -> None:
        """Stop serving every chunk."""
        self._ready[:] = bytes(len(self._ready))
        if self._share is not None:
            self._share[1].lost()

    def age_all(self) -> None:
        """Have the next touch of each chunk take the slow path once, which notes it as recently used."""
        self._ready[:] = bytes(self._ready).translate(_AGED)

    def share(self, number: int, table: ReaderTable, *, cluster_bits: int = 0, shown_bytes: int = 0) -> Share | None:
        """What readers serve the image with, until `close`; None when the table is full.

        From the first call on `ready` is in memory that they see. With `cluster_bits` they are shown a disk of
        `shown_bytes`, by a cluster map that begins as UNKNOWN.
        """
        if self._share is None and (entry := table.list(number)) is not None:
            ready_fd, shared = _shared_memory("basefs-ready", self.header.chunks)
            shared[:] = self._ready
            self._ready = shared
            map_fd, cluster_map = -1, None
            if cluster_bits:
                words = -(-shown_bytes >> cluster_bits)
                map_fd, memory = _shared_memory("basefs-clusters", 8 * words)
                cluster_map = memory.cast("Q")
            share = Share(
                number=number,
                entry=entry.word,
                serial=entry.serial,
                size=shown_bytes if cluster_bits else self.size,
                chunk_shift=self._shift,
                data_fd=self.data_fd,
                ready_fd=ready_fd,
                cluster_bits=cluster_bits,
                map_fd=map_fd,
                cluster_map=cluster_map,
            )
            self._share = share, entry
        return None if self._share is None else self._share[0]

    def forget_clusters(self) -> None:
        """What the cluster map says may be wrong: readers know of no cluster."""
        if self._share is not None:
            share, entry = self._share
            if share.cluster_map is not None:
                share.cluster_map[:] = memoryview(bytes(8 * len(share.cluster_map))).cast("Q")
            entry.lost()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `[offset, offset + length)` from the disk (thread).

        Raises:
            CacheError: the disk gave an error or fewer bytes.
        """
        try:
            data = os.pread(self.data_fd, length, offset)
        except OSError as exc:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {exc}") from exc
        if len(data) != length:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {len(data)} of {length} bytes at {offset}")
        return data

    def verify(self, first: int, count: int) -> list[memoryview | None]:
        """The bytes of `count` chunks from `first` on, each None where they do not fit its checksum (thread).

        A chunk that the disk does not give is a None, too.
        """
        start = first * self.header.chunk_bytes
        try:
            data = memoryview(self.read(start, min(start + count * self.header.chunk_bytes, self.size) - start))
            sums = self.sums(first, count)
        except (errors.CacheError, OSError, struct.error):
            return [None] if count == 1 else [self.verify(first + at, 1)[0] for at in range(count)]
        step = self.header.chunk_bytes
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        return [
            chunk if wanted == checksum(chunk, self.seed) else None for chunk, wanted in zip(chunks, sums, strict=True)
        ]

    def checked_at_once(self, first: int, count: int) -> memoryview | None:
        """The bytes of `count` chunks from `first` on if they are in memory and fit their checksums; see `hit`."""
        start = first * self.header.chunk_bytes
        length = min(start + count * self.header.chunk_bytes, self.size) - start
        if length > HIT_BYTES_MAX:
            return None
        data, sums, seed, step = _hit_buffer[:length], bytearray(SUM_BYTES * count), self.seed, self.header.chunk_bytes
        try:
            read = _preadv(self.data_fd, [data], start, _NOWAIT)
            if read != length or _preadv(self._map_fd, [sums], SUMS_OFFSET + SUM_BYTES * first, _NOWAIT) != len(sums):
                return None
        except OSError:  # a cold page, or a file system that cannot tell
            return None
        found = [checksum(data[at : at + step], seed) for at in range(0, length, step)]
        return data if struct.pack(f"<{count}Q", *found) == sums else None

    def sums(self, first: int, count: int) -> tuple[int, ...]:
        """The checksums of `count` chunks from `first` on, 0 for one that is absent (thread).

        Raises:
            OSError, struct.error: the disk did not give them.
        """
        return struct.unpack(f"<{count}Q", os.pread(self._map_fd, SUM_BYTES * count, SUMS_OFFSET + SUM_BYTES * first))

    def has(self, chunks: range, data: memoryview) -> bool:
        """Whether the checksums of `chunks` are those of `data`, which is as long as they are (thread)."""
        step = self.header.chunk_bytes
        found = tuple(checksum(data[at : at + step], self.seed) for at in range(0, len(data), step))
        try:
            return found == self.sums(chunks.start, len(chunks))
        except (OSError, struct.error):
            return False

    def write_piece(self, offset: int, piece: bytes | memoryview) -> None:
        """Store the whole chunks in `piece` at chunk-aligned `offset`, then their checksums (thread).

        Raises:
            CacheError: the disk did not take them; none of them counts.
        """
        chunk_bytes = self.header.chunk_bytes
        view = memoryview(piece)
        chunks = [view[at : at + chunk_bytes] for at in range(0, len(view), chunk_bytes)]
        sums = [checksum(chunk, self.seed) for chunk in chunks]
        try:
            if self._has_zero_chunk(chunks):
                for at, chunk in enumerate(chunks):
                    self._write_chunk(offset + at * chunk_bytes, chunk)
            else:
                with self._writing:
                    _write_all(self.data_fd, view, offset)
            packed = struct.pack(f"<{len(sums)}Q", *sums)
            _write_all(self._map_fd, memoryview(packed), SUMS_OFFSET + SUM_BYTES * (offset // chunk_bytes))
        except OSError as exc:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {exc}") from exc

    def _has_zero_chunk(self, chunks: list[memoryview]) -> bool:
        # (The last chunk may be short; it is rarely the only one of zeros.)
        return any(not chunk[0] and chunk == self._zeros for chunk in chunks)

    def _write_chunk(self, offset: int, chunk: memoryview) -> None:
        # A chunk of zeros becomes a hole: images are mostly zeros, and disks for caches are small.
        if chunk == self._zeros[: len(chunk)]:
            try:
                punch_hole(self.data_fd, offset, len(chunk))
            except OSError:
                _write_all(self.data_fd, chunk, offset)
        else:
            _write_all(self.data_fd, chunk, offset)

    def clear(self, indexes: Iterable[int]) -> None:
        """Forget the checksums of these chunks (thread). They count no more, also after a restart."""
        try:
            for index in indexes:
                _write_all(self._map_fd, memoryview(bytes(SUM_BYTES)), SUMS_OFFSET + SUM_BYTES * index)
        except OSError as exc:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {exc}") from exc

    def drop(self, indexes: Sequence[int]) -> None:
        """Forget these chunks and free their blocks (thread); ascending. Nobody may read or write them meanwhile.

        Raises:
            CacheError: some may be left; none counts whose checksum is gone, and those that are left are whole.
        """
        step = self.header.chunk_bytes
        try:
            for run in runs(indexes):
                _write_all(self._map_fd, memoryview(bytes(SUM_BYTES * len(run))), SUMS_OFFSET + SUM_BYTES * run.start)
                punch_hole(self.data_fd, run.start * step, len(run) * step)
        except OSError as exc:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {exc}") from exc

    def allocated_bytes(self) -> int:
        """What both files hold of the disk, in allocated blocks (thread).

        Raises:
            CacheError: the disk gave an error.
        """
        try:
            return 512 * (os.fstat(self.data_fd).st_blocks + os.fstat(self._map_fd).st_blocks)
        except OSError as exc:
            raise errors.CacheError(f"cache file of {self.header.image_id}: {exc}") from exc

    def close(self) -> None:
        """Give the fds back. Nobody may use the object afterwards, but for `hit`, which then has nothing."""
        fds = [self.data_fd, self._map_fd]
        if self._share is not None:
            share, entry = self._share
            self._share = None
            entry.revoke()
            fds += [fd for fd in (share.ready_fd, share.map_fd) if fd >= 0]
        self._ready.release()
        for fd in fds:
            with suppress(OSError):  # what a bad disk has to say; the fd is gone all the same
                os.close(fd)


def _shared_memory(name: str, size: int) -> tuple[int, memoryview]:
    """The fd of a memfd of zeros, and its memory."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd, memoryview(mmap.mmap(fd, size))


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def open_chunk_file(directory: Path, inode: int, wanted: ChunkMapHeader) -> tuple[ChunkFile, bytearray]:
    """The local bytes of an image, made if there are none, and which chunks have a checksum (thread).

    A map that is damaged, of another version, or of another image or size is begun anew; a map with
    another `chunk_bytes` is used as it is.

    Raises:
        CacheError: the cache disk does not take them.
    """
    data_fd = map_fd = -1
    try:
        map_fd = os.open(map_path(directory, inode), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        header = usable_header(map_fd, wanted)
        # A map without data: the data became the image's file in the lower directory (`handlers/graduation.py`).
        if header is None or not data_path(directory, inode).exists():
            header = wanted
            data_path(directory, inode).unlink(missing_ok=True)
            _format_map(map_fd, header)
        data_fd = os.open(data_path(directory, inode), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(data_fd).st_size < header.size:
            os.ftruncate(data_fd, header.size)
        return ChunkFile(header, data_fd, map_fd), stored_states(map_fd, header)
    except (OSError, ValueError) as exc:
        for fd in (data_fd, map_fd):
            if fd >= 0:
                os.close(fd)
        raise errors.CacheError(f"cache directory {directory}: {exc}") from exc


def usable_header(map_fd: int, wanted: ChunkMapHeader) -> ChunkMapHeader | None:
    """The header of a map file, if that is of the image and size wanted; its `chunk_bytes` may differ (thread)."""
    try:
        header = parse_header(os.pread(map_fd, PAGE, 0))
    except ValueError:
        return None
    fits = header.image_id == wanted.image_id and header.size == wanted.size
    return header if fits and os.fstat(map_fd).st_size == header.map_bytes else None


def stored_states(map_fd: int, header: ChunkMapHeader) -> bytearray:
    """One byte a chunk, 1 where there is a checksum, 0 elsewhere (thread)."""
    states = bytearray(header.chunks)
    step = 1 << 16
    for start in range(0, header.chunks, step):
        count = min(step, header.chunks - start)
        raw = os.pread(map_fd, SUM_BYTES * count, SUMS_OFFSET + SUM_BYTES * start)
        if raw.strip(b"\0"):
            sums = struct.unpack(f"<{len(raw) // SUM_BYTES}Q", raw)
            states[start : start + len(sums)] = bytes(1 if value else 0 for value in sums)
    return states


def _format_map(map_fd: int, header: ChunkMapHeader) -> None:
    # The header last: a map that was begun and not finished is no map.
    os.ftruncate(map_fd, 0)
    os.ftruncate(map_fd, header.map_bytes)
    _write_all(map_fd, memoryview(header.pack()), 0)
