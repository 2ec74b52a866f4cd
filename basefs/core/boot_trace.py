"""A boot trace: which stored bytes of an image its first openers read, in order and with time; pure.

A trace is of *units* of 64 KiB of stored bytes, so it fits every chunk size and view: the recorded Debian boot touched
43 MB of them, 65 MB at 256 KiB. It tells what to fetch first and is trusted for nothing else.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

UNIT_BYTES = 64 * 1024
UNITS_MAX = 4096
"""256 MiB; what comes after that is no boot any more (boot sets of VM images: 25 to 200 MB)."""
RANGES_MAX = 2048
"""A range takes at most 31 bytes of the file: less than 64 KiB in all. The recorded boot has 279."""
BOOTS_MAX = 1_000_000
MS_MAX = 86_400_000
SAME_MS = 50
"""Units that follow each other in place and in time are one range, which has the time of its first one."""
COPY_BYTES_MIN = 32 << 20
"""What is read beyond that in one piece, and nearly nothing else, is the beginning of a copy: readahead and hydration
bring that with 0.6 ms of Glance's processor a MiB, the small requests of a replay took 1.35. A boot that reads an
initrd of that size reads other things, too."""
UNREAD_MAX = 3
"""A unit that so many boots in a row did not read is dropped."""


@dataclass(frozen=True, slots=True)
class TraceRange:
    """`count` > 0 units from unit `first` on, first touched `at_ms` after the open.

    `unread`: boots in a row that did not read it, 0 <= unread < UNREAD_MAX.
    """

    first: int
    count: int
    at_ms: int
    unread: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedImage:
    """The very bytes that a trace is of. `size` in bytes, stored."""

    image_id: str
    size: int
    os_hash_algo: str | None
    os_hash_value: str | None

    @property
    def units(self) -> int:
        """Units of the image; the last one may be short."""
        return -(-self.size // UNIT_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootTrace:
    """What was read of `image` by `boots` boots. No unit is in two ranges; they ascend in time.

    `by_guest`: a guest read it; else some other program.
    """

    image: TracedImage
    boots: int
    by_guest: bool
    ranges: tuple[TraceRange, ...]

    @property
    def traced_bytes(self) -> int:
        """Bytes in the trace, exactly (the image's last unit may be short)."""
        units = sum(part.count for part in self.ranges)
        last = self.image.units - 1
        has_last = any(part.first + part.count > last for part in self.ranges)
        return units * UNIT_BYTES - (self.image.units * UNIT_BYTES - self.image.size if has_last else 0)

    @property
    def is_copy(self) -> bool:
        """Whether this is no boot: most of the image was read, or one long piece of it and little else."""
        longest = begin = stop = 0
        for unit in sorted(self.units()):
            begin, stop = (begin if unit == stop else unit), unit + 1
            longest = max(longest, (stop - begin) * UNIT_BYTES)
        is_one_piece = longest > COPY_BYTES_MIN and longest > self.traced_bytes * 7 // 8
        return is_one_piece or self.traced_bytes > self.image.size // 2

    def units(self) -> Iterator[int]:
        """Every unit, in order."""
        for part in self.ranges:
            yield from range(part.first, part.first + part.count)


class TraceRecording:
    """The first touches of one boot."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def __len__(self) -> int:
        """Units that were touched."""
        return len(self._seen)

    @property
    def is_full(self) -> bool:
        """Whether nothing more will be noted."""
        return len(self._seen) >= UNITS_MAX

    def note(self, units: Iterable[int], at_ms: int) -> None:
        """These units were touched then; `at_ms` never goes back."""
        for unit in units:
            if self.is_full:
                return
            self._seen.setdefault(unit, min(at_ms, MS_MAX))

    def clear(self) -> None:
        """Begin anew."""
        self._seen.clear()

    def trace(self, image: TracedImage, *, by_guest: bool) -> BootTrace:
        """The trace of this one boot."""
        ranges = _ranges((unit, at_ms, 0) for unit, at_ms in self._seen.items())
        return BootTrace(image=image, boots=1, by_guest=by_guest, ranges=ranges)


def _ranges(units: Iterable[tuple[int, int, int]]) -> tuple[TraceRange, ...]:
    """Units with their time and `unread`, in order, as at most RANGES_MAX ranges; what comes later is left out."""
    ranges: list[TraceRange] = []
    for unit, at_ms, unread in itertools.islice(units, UNITS_MAX):
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and unit == last.first + last.count
            and unread == last.unread
            and at_ms - last.at_ms <= SAME_MS
        ):
            ranges[-1] = replace(last, count=last.count + 1)
        elif len(ranges) == RANGES_MAX:
            break
        else:
            ranges.append(TraceRange(unit, 1, at_ms, unread))
    return tuple(ranges)


def merged(old: BootTrace | None, new: BootTrace) -> BootTrace:
    """What is known after one more boot: the union, each unit with the earliest time at which any boot read it.

    A unit that UNREAD_MAX boots in a row did not read is left out. Guests' boots and other programs' reads are not
    mixed: the guest's trace stays, or takes the other's place. One of another image counts for nothing.
    """
    if old is None or old.image != new.image or (new.by_guest and not old.by_guest):
        return new
    if old.by_guest and not new.by_guest:
        return old
    known = {unit: (part.at_ms, part.unread) for part in old.ranges for unit in _units_of(part)}
    read = {unit: part.at_ms for part in new.ranges for unit in _units_of(part)}
    units = [
        (unit, min(at_ms, read[unit]), 0) if unit in read else (unit, at_ms, unread + 1)
        for unit, (at_ms, unread) in known.items()
        if unit in read or unread + 1 < UNREAD_MAX
    ]
    units += [(unit, at_ms, 0) for unit, at_ms in read.items() if unit not in known]
    units.sort(key=lambda found: found[1])  # stable: what came together keeps its order
    return replace(new, boots=min(old.boots + 1, BOOTS_MAX), ranges=_ranges(units))


def _units_of(part: TraceRange) -> range:
    return range(part.first, part.first + part.count)
