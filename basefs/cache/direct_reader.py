"""Chunks as they are on the disk, past the page cache, which neither hides a damage then nor is thrown away."""

import errno
import mmap
import os
import struct

from basefs import errors
from basefs.cache.chunk_file import ChunkFile
from basefs.core.byte_ranges import runs
from basefs.core.chunk_map import PAGE, checksum

READ_BYTES_MAX = 1 << 20


def damaged_on_disk(file: ChunkFile, indexes: list[int]) -> list[int]:
    """Those of `indexes` (ascending) whose bytes on the disk do not fit their checksum, or are not given (thread).

    One without a checksum is absent, not damaged. Where the file system has no O_DIRECT it is read as usual.

    Raises:
        CacheError: the file cannot be opened.
    """
    try:
        fd = _open(file)
    except OSError as exc:
        raise errors.CacheError(f"cache file of {file.header.image_id}: {exc}") from exc
    try:
        step = max(1, READ_BYTES_MAX // file.header.chunk_bytes)
        with mmap.mmap(-1, step * file.header.chunk_bytes) as buffer, memoryview(buffer) as view:
            damaged = []
            for run in runs(indexes):
                for start in range(run.start, run.stop, step):
                    damaged += _damaged(file, fd, view, range(start, min(start + step, run.stop)))
            return damaged
    finally:
        os.close(fd)


def _open(file: ChunkFile) -> int:
    # By its link in /proc: a file of its own, also of one that was unlinked.
    path = f"/proc/self/fd/{file.data_fd}"
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _damaged(file: ChunkFile, fd: int, view: memoryview, chunks: range) -> list[int]:
    step = file.header.chunk_bytes
    start = chunks.start * step
    length = min(chunks.stop * step, file.size) - start
    try:
        sums = file.sums(chunks.start, len(chunks))
        # Whole pages are asked for; the end of the file makes it short.
        read = os.preadv(fd, [view[: -(-length // PAGE) * PAGE]], start)
    except (OSError, struct.error):
        read = -1
    if read < length:
        if len(chunks) == 1:
            return list(chunks)
        return [index for chunk in chunks for index in _damaged(file, fd, view, range(chunk, chunk + 1))]
    found = {}
    for index, wanted in zip(chunks, sums, strict=True):
        at = (index - chunks.start) * step
        found[index] = not wanted or wanted == checksum(view[at : min(at + step, length)], file.seed)
    return [index for index, is_right in found.items() if not is_right]
