"""Boot traces as files, which another node or a damaged disk may have written; pure.

JSON with these members and no others: `format`, `version`, `image_id`, `size`, `os_hash_algo`, `os_hash_value`,
`unit_bytes`, `boots`, `by_guest`, and `ranges`: arrays of first unit, units, milliseconds since the open, boots in a
row that did not read it.
"""

import json
from typing import Any

from basefs.core.boot_trace import (
    BOOTS_MAX,
    MS_MAX,
    RANGES_MAX,
    UNIT_BYTES,
    UNITS_MAX,
    UNREAD_MAX,
    BootTrace,
    TracedImage,
    TraceRange,
)

FORMAT = "basefs boot trace"
VERSION = 1
FILE_BYTES_MAX = 64 * 1024
_SIZE_MAX = 1 << 50
_TEXT_MAX = 255
_MEMBERS = (
    "format", "version", "image_id", "size", "os_hash_algo", "os_hash_value", "unit_bytes", "boots", "by_guest",
    "ranges",
)  # fmt: skip
_RANGE_FIELDS = 4


def trace_document(trace: BootTrace) -> dict[str, Any]:
    """The trace as JSON values."""
    image = trace.image
    return {
        "format": FORMAT,
        "version": VERSION,
        "image_id": image.image_id,
        "size": image.size,
        "os_hash_algo": image.os_hash_algo,
        "os_hash_value": image.os_hash_value,
        "unit_bytes": UNIT_BYTES,
        "boots": trace.boots,
        "by_guest": trace.by_guest,
        "ranges": [[part.first, part.count, part.at_ms, part.unread] for part in trace.ranges],
    }


def trace_bytes(trace: BootTrace) -> bytes:
    """The trace as a file; FILE_BYTES_MAX at most, for which its last ranges may be left out."""
    document = trace_document(trace)
    while len(data := json.dumps(document, separators=(",", ":")).encode()) > FILE_BYTES_MAX:
        del document["ranges"][-max(1, len(document["ranges"]) // 16) :]
    return data + b"\n" if len(data) < FILE_BYTES_MAX else data


def parse_trace(data: bytes) -> BootTrace:
    """The trace in a file.

    Raises:
        ValueError: it is none; the message names the byte or the member that is wrong.
    """
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"it has {len(data)} bytes, a trace has at most {FILE_BYTES_MAX}")
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise ValueError(f"byte {exc.start}: not UTF-8") from None
    except json.JSONDecodeError as exc:
        raise ValueError(f"byte {len(exc.doc[: exc.pos].encode())}: not JSON: {exc.msg}") from None
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"not JSON: {str(exc)[:100]}") from None
    return trace_of(document)


def trace_of(document: object) -> BootTrace:
    """The trace in a document; ValueError as `parse_trace`."""
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # the file is wrong, not the caller
    _check(document.get("format") == FORMAT, f"format: not {FORMAT!r}")
    version = document.get("version")
    _check(version == VERSION and type(version) is int, f"version: {_shown(version)} is not {VERSION}")
    for name in _MEMBERS:
        _check(name in document, f"{name}: missing")
    for name in document:
        _check(name in _MEMBERS, f"{_shown(name)}: unknown member")
    unit_bytes = document["unit_bytes"]
    _check(
        unit_bytes == UNIT_BYTES and type(unit_bytes) is int, f"unit_bytes: {_shown(unit_bytes)} is not {UNIT_BYTES}"
    )
    _check(isinstance(document["by_guest"], bool), "by_guest: not true or false")
    image = TracedImage(
        image_id=_text(document, "image_id"),
        size=_number(document["size"], "size", 1, _SIZE_MAX),
        os_hash_algo=None if document["os_hash_algo"] is None else _text(document, "os_hash_algo"),
        os_hash_value=None if document["os_hash_value"] is None else _text(document, "os_hash_value"),
    )
    boots = _number(document["boots"], "boots", 1, BOOTS_MAX)
    return BootTrace(image=image, boots=boots, by_guest=document["by_guest"], ranges=_ranges_of(document, image))


def _ranges_of(document: dict[str, Any], image: TracedImage) -> tuple[TraceRange, ...]:
    rows = document["ranges"]
    _check(isinstance(rows, list), "ranges: not an array")
    _check(len(rows) <= RANGES_MAX, f"ranges: {len(rows)}, a trace has at most {RANGES_MAX}")
    ranges: list[TraceRange] = []
    seen: set[int] = set()
    earliest = 0
    for at, row in enumerate(rows):
        where = f"ranges[{at}]"
        _check(isinstance(row, list) and len(row) == _RANGE_FIELDS, f"{where}: not an array of {_RANGE_FIELDS} numbers")
        first = _number(row[0], f"{where}[0]", 0, image.units - 1)
        count = _number(row[1], f"{where}[1]", 1, min(UNITS_MAX, image.units - first))
        earliest = _number(row[2], f"{where}[2]", earliest, MS_MAX)
        unread = _number(row[3], f"{where}[3]", 0, UNREAD_MAX - 1)
        _check(seen.isdisjoint(range(first, first + count)), f"{where}: a unit of it was in a range before")
        seen.update(range(first, first + count))
        _check(len(seen) <= UNITS_MAX, f"{where}: more than {UNITS_MAX} units in all")
        ranges.append(TraceRange(first, count, earliest, unread))
    return tuple(ranges)


def trace_for(data: bytes, image: TracedImage) -> BootTrace:
    """The trace of `image` in a file; ValueError as `parse_trace`, also where it is of other bytes."""
    trace = parse_trace(data)
    for name in TracedImage.__slots__:
        theirs, ours = getattr(trace.image, name), getattr(image, name)
        _check(theirs == ours, f"{name}: {_shown(theirs)}, the image has {_shown(ours)}")
    return trace


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def _text(document: dict[str, Any], name: str) -> str:
    value = document[name]
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_MAX or not value.isprintable():
        raise ValueError(f"{name}: {_shown(value)} is no text of 1 to {_TEXT_MAX} characters")
    return value


def _number(value: object, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {_shown(value)} is no whole number from {least} to {most}")
    return value


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
