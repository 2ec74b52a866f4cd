"""Which chunks to ask for when a reader misses one: a pure function of what is here already.

The run of chunks that are here (or on their way) just before the miss is the history, as in Linux's
context readahead (mm/readahead.c: count_history_pages): it needs no handle, survives a restart and is
shared by all readers of an image. A random reader has no history and gets a small window, a sequential
one gets a window that doubles.

Measured on the recorded Debian boot (865 reads, 42.9 MB distinct at 64 KiB): windows of at least 1 chunk
give 311 requests and 50 MB, of at least 4 chunks 222 requests and 67 MB, of at least 8 chunks 182 requests
and 85 MB. A request costs 5-8 ms whatever its size, 192 KiB more cost 1.6 ms at 1 Gbit/s: 4.
"""

from dataclasses import dataclass

MISSING = 0
"""The byte in a chunk map that says: not here and not on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadaheadPolicy:
    """Bounds of a window, in chunks: 0 < `window_min` <= `window_max`; `ahead_min` starts read-ahead."""

    window_min: int
    window_max: int
    ahead_min: int

    @classmethod
    def for_chunks(cls, chunk_bytes: int, request_bytes_max: int) -> "ReadaheadPolicy":
        """The policy measured above, for chunks of `chunk_bytes`."""
        window_max = max(1, request_bytes_max // chunk_bytes)
        return cls(
            window_min=min(window_max, max(1, 256 * 1024 // chunk_bytes)),
            window_max=window_max,
            ahead_min=max(2, 512 * 1024 // chunk_bytes),
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


def _history(states: bytearray, index: int) -> int:
    """How many neighbouring chunks just before `index` are here or on their way."""
    return index - 1 - states.rfind(b"\0", 0, index)


def window_for_miss(states: bytearray, index: int, wanted: int, policy: ReadaheadPolicy) -> Window:
    """The request for a miss at chunk `index` by a reader who wants `wanted` >= 1 chunks from there.

    `states` has one byte a chunk, MISSING or anything else. The window starts at `index`, holds only
    missing chunks, and is never empty when `states[index]` is MISSING.
    """
    history = _history(states, index)
    length = max(wanted, policy.window_min, 2 * history)
    length = _missing_from(states, index, min(length, policy.window_max))
    return Window(range(index, index + length), _marker(index, length, history, policy))


def window_ahead(states: bytearray, marker: int, policy: ReadaheadPolicy) -> Window | None:
    """The next window for a sequential reader who has come to `marker`; None when there is none to fetch."""
    start = states.find(b"\0", marker, marker + 2 * policy.window_max)
    if start < 0:
        return None
    history = _history(states, start)
    length = _missing_from(states, start, min(max(policy.window_min, 2 * history), policy.window_max))
    return Window(range(start, start + length), _marker(start, length, history, policy))


def _marker(start: int, length: int, history: int, policy: ReadaheadPolicy) -> int | None:
    # The first chunk of the window: the next window is on its way while this one is being read.
    return start if history >= policy.ahead_min and length > 1 else None
