"""The one buffer of all reads that are answered at once, of images and of lower files, and of large answers of images.

pyfuse3 copies the reply into the kernel before any other task can run, and filling a kept buffer saves the allocation
and page faults of a fresh `bytes`. So what is in it is valid until the next await, and only the trio loop touches it.
"""

import mmap

_STEP = 4096
HIT_BYTES_MAX = 1 << 20
"""The largest read the kernel sends (FUSE max_pages 256)."""

# Page-aligned: at 16 bytes past a page, as malloc gives it, the kernel's copy of 1 MiB took 480 us instead of 45 (a
# hazard of `rep movsb`).
hit_buffer = memoryview(mmap.mmap(-1, HIT_BYTES_MAX))
hit_targets: dict[int, list[memoryview]] = {
    size: [hit_buffer[:size]] for size in range(_STEP, HIT_BYTES_MAX + _STEP, _STEP)
}
"""What preadv(2) is to fill, by the sizes that are asked for nearly always: a slice takes longer than a look-up."""


def hit_target(size: int) -> list[memoryview]:
    """The buffer as preadv(2) takes it, for `size` <= HIT_BYTES_MAX bytes: valid until the next await."""
    return hit_targets.get(size) or [hit_buffer[:size]]


def in_whole_pages(data: bytes) -> bytes | memoryview:
    """An answer, for the kernel to copy out of whole pages: in the buffer if it is large. Valid until the next await.

    /dev/fuse takes a lock and looks a page up for each page that it copies from, two for each one that it fills.
    """
    if not _STEP < len(data) <= HIT_BYTES_MAX:
        return data
    target = hit_target(len(data))[0]
    target[:] = data
    return target
