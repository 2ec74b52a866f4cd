"""Which chunks to ask for when a reader misses one: a pure function of what is here already.

The run of chunks that are here (or on their way) just before the miss is the history, as in Linux's
context readahead (mm/readahead.c: count_history_pages): it needs no handle, survives a restart and is
shared by all readers of an image. A miss brings at most 1 MiB more than was asked, less on slow links
(`core/link_estimate`). Only a reader who comes to a *marker*, the first chunk of a window that was not
asked for, is sequential: each marker starts the next window, twice as long, before it is missed.

Measured on the recorded Debian boot (865 reads, 42.9 MB distinct at 64 KiB) and on 256 MiB read in order:

    windows of                                        boot: MB, requests    in order: requests, misses
    1 chunk, 2 x history up to 8 MiB, no marker         50       311
    4 chunks, the same                                  67       222
    8 chunks, the same                                  85       182
    4 chunks, 2 x history up to 8 MiB, then markers    108       198           34              33
    4 chunks, 2 x history up to 1 MiB, then markers     73       225           36               1   <- this

A request costs 5-8 ms whatever its size, 192 KiB more cost 1.6 ms at 1 Gbit/s. The sizes of a miss follow the link
(`core/link_estimate`); these were measured with what it says before it has measured anything.
"""

from dataclasses import dataclass

from basefs.core.link_estimate import FetchParameters

MISSING = 0
"""The byte in a chunk map that says: not here and not on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadaheadPolicy:
    """Bounds of windows in chunks: 0 < `window_min` <= `miss_max` <= `window_max`; `history_min` sets a marker."""

    window_min: int
    miss_max: int
    window_max: int
    history_min: int

    @classmethod
    def for_chunks(cls, chunk_bytes: int, request_bytes_max: int, parameters: FetchParameters) -> "ReadaheadPolicy":
        """The policy of these parameters, for chunks of `chunk_bytes`."""
        window_max = max(1, request_bytes_max // chunk_bytes)
        return cls(
            window_min=min(window_max, max(1, parameters.window_bytes // chunk_bytes)),
            miss_max=min(window_max, max(1, parameters.miss_bytes_max // chunk_bytes)),
            window_max=window_max,
            history_min=max(2, 512 * 1024 // chunk_bytes),
        )


@dataclass(frozen=True, slots=True)
class Window:
    """Chunks to fetch in one request, and the one whose first touch starts the next window (or None)."""

    chunks: range
    marker: int | None


def _missing_from(states: bytearray, start: int, chunks_max: int) -> int:
    """How many neighbouring chunks from `start` on are missing, at most `chunks_max`."""
    here = states[start : start + chunks_max]
    return len(here) - len(here.lstrip(b"\0"))


def window_for_miss(states: bytearray, index: int, wanted: int, policy: ReadaheadPolicy) -> Window:
    """The request for a miss at chunk `index` by a reader who wants `wanted` >= 1 chunks from there.

    `states` has one byte a chunk, MISSING or anything else. The window starts at `index`, holds only
    missing chunks, and is never empty when `states[index]` is MISSING.
    """
    history = index - 1 - states.rfind(b"\0", 0, index)
    length = max(wanted, policy.window_min, min(2 * history, policy.miss_max))
    is_sequential = history >= policy.history_min
    if is_sequential:
        length = max(length, 2 * wanted)
    length = _missing_from(states, index, min(length, policy.window_max))
    return Window(range(index, index + length), index + wanted if is_sequential and length > wanted else None)


def window_ahead(states: bytearray, marker: int, previous: int, policy: ReadaheadPolicy) -> Window | None:
    """The next window for a reader at the `marker` of a window of `previous` chunks; None: nothing to fetch."""
    start = states.find(b"\0", marker, marker + 2 * previous + 1)
    if start < 0:
        return None
    length = _missing_from(states, start, min(2 * previous, policy.window_max))
    # Its first chunk: the next window is on its way while this one is being read.
    return Window(range(start, start + length), start)
