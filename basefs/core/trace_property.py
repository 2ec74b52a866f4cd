"""Boot traces as one property of their image in Glance, in 2 KB for a Debian boot; pure.

`<version>:<base64url of zlib>` of: 16 bytes of SHA-256 of what the trace is of, then varints (7 bits a byte, the lowest
first): boots, by_guest, number of ranges, and of each range the way from the end of the one before (zigzag), units,
milliseconds after the one before, boots in a row that did not read it. Who may write it is nobody in particular, and
snapshots of instances carry what nova left of their base's: it is read as a hostile file is.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Iterator

from basefs.core.boot_trace import UNIT_BYTES, BootTrace, TracedImage
from basefs.core.trace_file import FORMAT, trace_of
from basefs.core.trace_file import VERSION as FILE_VERSION

PROPERTY = "basefs_boot_trace"
PROPERTY_CHARS_MAX = 8 * 1024
"""A tenth of what Glance's database takes; three times the recorded boot's."""
_VERSION = "1"
_DIGEST_BYTES = 16
_INFLATED_BYTES_MAX = 64 * 1024
_VARINT_BYTES_MAX = 8


def property_of(trace: BootTrace) -> str:
    """The trace as text of at most PROPERTY_CHARS_MAX characters, for which its last ranges may be left out."""
    count = len(trace.ranges)
    while len(text := _text_of(trace, count)) > PROPERTY_CHARS_MAX:
        count -= max(1, count // 16)
    return text


def _text_of(trace: BootTrace, count: int) -> str:
    numbers = [trace.boots, int(trace.by_guest), count]
    end = at_ms = 0
    for part in trace.ranges[:count]:
        way = part.first - end
        numbers += [way * 2 if way >= 0 else -way * 2 - 1, part.count, part.at_ms - at_ms, part.unread]
        end, at_ms = part.first + part.count, part.at_ms
    packed = _identity(trace.image) + b"".join(map(_varint, numbers))
    return f"{_VERSION}:{base64.urlsafe_b64encode(zlib.compress(packed, 9)).decode()}"


def trace_of_property(text: str, image: TracedImage) -> BootTrace:
    """The trace of `image` in a property.

    Raises:
        ValueError: there is none in it, or it is of other bytes; the message says what is wrong.
    """
    version, _, encoded = text.partition(":")
    if version != _VERSION or len(text) > PROPERTY_CHARS_MAX:
        raise ValueError(f"no boot trace of version {_VERSION} and at most {PROPERTY_CHARS_MAX} characters")
    try:
        inflating = zlib.decompressobj()
        packed = inflating.decompress(base64.b64decode(encoded, altchars=b"-_", validate=True), _INFLATED_BYTES_MAX)
    except (binascii.Error, zlib.error, ValueError) as exc:
        raise ValueError(f"no boot trace: {exc}") from None
    if not inflating.eof or inflating.unused_data:
        raise ValueError("a boot trace that was cut off, or is too large")
    if packed[:_DIGEST_BYTES] != _identity(image):
        raise ValueError("a boot trace of other bytes than the image's")
    return trace_of(_document(_numbers(packed[_DIGEST_BYTES:]), image))


def _document(numbers: Iterator[int], image: TracedImage) -> dict[str, object]:
    """What a file would have, which is then checked as a file is."""
    try:
        boots, by_guest, count = [next(numbers) for _ in range(3)]
        ranges, end, at_ms = [], 0, 0
        for _ in range(count):
            way, units, later_ms, unread = [next(numbers) for _ in range(4)]
            first = end + (way // 2 if way % 2 == 0 else -(way + 1) // 2)
            at_ms += later_ms
            ranges.append([first, units, at_ms, unread])
            end = first + units
    except StopIteration:
        raise ValueError("a boot trace that ends too early") from None
    if next(numbers, None) is not None:
        raise ValueError("a boot trace with something behind its end")
    return {
        "format": FORMAT,
        "version": FILE_VERSION,
        "image_id": image.image_id,
        "size": image.size,
        "os_hash_algo": image.os_hash_algo,
        "os_hash_value": image.os_hash_value,
        "unit_bytes": UNIT_BYTES,
        "boots": boots,
        "by_guest": bool(by_guest),
        "ranges": ranges,
    }


def _identity(image: TracedImage) -> bytes:
    what = "\0".join(map(str, (image.image_id, image.size, image.os_hash_algo, image.os_hash_value)))
    return hashlib.sha256(what.encode()).digest()[:_DIGEST_BYTES]


def _varint(number: int) -> bytes:
    packed = bytearray()
    while number > 0x7F:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    packed.append(number)
    return bytes(packed)


def _numbers(packed: bytes) -> Iterator[int]:
    """The varints in `packed`; ValueError where one is longer than any of ours, or is not whole."""
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 7 * _VARINT_BYTES_MAX:
            raise ValueError("a boot trace with a number that is too large")
        if byte < 0x80:
            yield number
            number = shift = 0
    if shift:
        raise ValueError("a boot trace that ends within a number")
