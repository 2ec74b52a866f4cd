"""Images whose bytes are known without a copy: each 4 KiB block that a trace touches tells its image and its offset."""

import struct
from collections.abc import Iterable
from pathlib import Path

BLOCK_BYTES = 4096

Trace = list[tuple[int, int]]


def block(number: int, offset: int) -> bytes:
    """The block at `offset`, a multiple of BLOCK_BYTES, of image `number`; no two are the same."""
    return struct.pack("<QQ", number + 1, offset) * (BLOCK_BYTES // 16)


def expected(number: int, offset: int, length: int) -> bytes:
    """The bytes `[offset, offset + length)` of image `number`, where the trace touched every block of them."""
    first = offset - offset % BLOCK_BYTES
    blocks = b"".join(block(number, at) for at in range(first, offset + length, BLOCK_BYTES))
    return blocks[offset - first : offset - first + length]


def touched(trace: Trace) -> Iterable[int]:
    """The offsets of the blocks that the trace touches, each once, in order."""
    blocks = {
        at // BLOCK_BYTES
        for offset, length in trace
        for at in range(offset - offset % BLOCK_BYTES, offset + length, BLOCK_BYTES)
    }
    return (number * BLOCK_BYTES for number in sorted(blocks))


def write_image(path: Path, number: int, trace: Trace, size: int) -> None:
    """Write image `number` of `size` bytes as a sparse file."""
    with open(path, "wb") as out:
        out.truncate(size)
        for offset in touched(trace):
            out.seek(offset)
            out.write(block(number, offset))
