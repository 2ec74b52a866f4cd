"""Byte-range arithmetic and the two HTTP headers that carry ranges (RFC 9110, section 14)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """What a 206 says it carries: bytes `first`..`last`, both included, of `total` (None: not told)."""

    first: int
    last: int
    total: int | None


def parse_content_range(text: str) -> ContentRange:
    """The parts of a Content-Range header.

    Raises:
        ValueError: not of the form `bytes A-B/T` with A <= B < T.
    """
    match = _CONTENT_RANGE.match(text)
    if match is None:
        raise ValueError(f"not a Content-Range: {text[:80]!r}")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if first > last or (total is not None and last >= total):
        raise ValueError(f"impossible Content-Range: {text[:80]!r}")
    return ContentRange(first, last, total)


def range_header(offset: int, length: int) -> str:
    """The Range header for exactly `[offset, offset + length)`; offset >= 0, length > 0."""
    return f"bytes={offset}-{offset + length - 1}"


def chunk_span(offset: int, length: int, chunk_bytes: int) -> range:
    """Indexes of the chunks that `[offset, offset + length)` touches; empty for length 0."""
    if length <= 0:
        return range(0)
    return range(offset // chunk_bytes, (offset + length - 1) // chunk_bytes + 1)


def runs(indexes: Iterable[int]) -> Iterator[range]:
    """Ascending indexes as maximal runs of neighbours."""
    start = stop = None
    for index in indexes:
        if stop is None or index != stop:
            if start is not None and stop is not None:
                yield range(start, stop)
            start = index
        stop = index + 1
    if start is not None and stop is not None:
        yield range(start, stop)


def longest_zero_run(states: bytes | bytearray) -> range:
    """Where the longest run of zero bytes is, the first one of several as long; empty where there is none.

    A search by halves for its length, so that all loops are in C: 2-8 ms for the 327,680 chunks of 20 GiB, where a
    regular expression took 30 ms for a map with every other chunk missing.
    """
    low, high = 0, states.count(0)
    while low < high:
        middle = (low + high + 1) // 2
        if states.find(bytes(middle)) >= 0:
            low = middle
        else:
            high = middle - 1
    start = states.find(bytes(low)) if low else 0
    return range(start, start + low)
