"""Replays a recorded boot: its reads, in order, one at a time, with O_DIRECT as qemu's cache=none does them."""

import contextlib
import json
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

TRACE_PATH = Path(__file__).parent / "debian12-boot.json"

Trace = list[tuple[int, int]]


def load_trace() -> Trace:
    """Return the (offset, length) pairs, in bytes, of one boot of a Debian 12 guest."""
    with open(TRACE_PATH, encoding="ascii") as trace:
        return [(offset, length) for offset, length in json.load(trace)]


def distinct_bytes(trace: Trace, granularity: int) -> int:
    """Return how many bytes the trace touches when data comes in aligned pieces of `granularity`."""
    pieces = {
        piece
        for offset, length in trace
        for piece in range(offset // granularity, (offset + length - 1) // granularity + 1)
    }
    return len(pieces) * granularity


def replay(path: str | os.PathLike[str], trace: Trace) -> float:
    """Return the seconds that all reads of the trace took."""
    begun = time.monotonic()
    for _ in _reads(path, trace):
        pass
    return time.monotonic() - begun


def differences(path: str | os.PathLike[str], original: str | os.PathLike[str], trace: Trace) -> int:
    """Return how many reads of the trace give other bytes than the same read of `original`."""
    with open(original, "rb") as right:
        return sum(
            bytes(data) != os.pread(right.fileno(), length, offset)
            for data, (offset, length) in zip(_reads(path, trace), trace, strict=True)
        )


def _reads(path: str | os.PathLike[str], trace: Trace) -> Iterator[memoryview]:
    with contextlib.ExitStack() as stack:
        buffer = stack.enter_context(mmap.mmap(-1, max(length for _, length in trace)))
        whole = stack.enter_context(memoryview(buffer))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, fd)
        for offset, length in trace:
            with whole[:length] as data:
                read = os.preadv(fd, [data], offset)
                if read != length:
                    raise OSError(f"{read} of {length} bytes at {offset} of {path}")
                yield data
