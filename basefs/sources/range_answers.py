"""The body of a 206, after it was found to be exactly what was asked for. For threads."""

from collections.abc import Callable, Iterator

import requests

from basefs import errors
from basefs.sources.bodies import check_content_range, content_length
from basefs.sources.body_pieces import Body

UNSIZED_BYTES_MAX = 16 * 1024 * 1024
"""A 206 that does not tell its length is counted in memory before delivery; larger ones are refused."""


def pieces_of_206(
    response: requests.Response,
    what: str,
    *,
    who: str,
    size: int,
    offset: int,
    length: int,
    piece_bytes: int,
    came: Callable[[int], None],
) -> Iterator[memoryview]:
    """Exactly `[offset, offset + length)` of an object of `size` bytes, see `Body.pieces`; `who` answered.

    Raises:
        RangeNotHonouredError: the head, or a body of untold length, says that something else comes.
        SourceCorruptError: the head contradicts itself, or the object has another size.
        SourceUnavailableError: the body ended early, or came too slowly.
    """
    check_content_range(response, what, size, offset, length)
    stated = content_length(response, what)
    if stated is None:
        yield from _counted(response, what, who, length, piece_bytes, came)
        return
    if stated > length:
        raise errors.RangeNotHonouredError(f"{what}: {who} sends {stated} bytes under a 206")
    if stated < length:
        raise errors.SourceCorruptError(f"{what}: {who} sends {stated} bytes, its Content-Range says {length}")
    yield from Body(response, what, came).pieces(length, piece_bytes)


def _counted(
    response: requests.Response, what: str, who: str, length: int, piece_bytes: int, came: Callable[[int], None]
) -> Iterator[memoryview]:
    """The body of a 206 that does not tell its length, once it was counted."""
    if length > UNSIZED_BYTES_MAX:
        raise errors.RangeNotHonouredError(f"{what}: {who} does not tell the length of its 206")
    body = Body(response, what, came)
    counted = memoryview(body.all(length))
    if body.has_more():
        raise errors.RangeNotHonouredError(f"{what}: {who} sends more than these under a 206")
    for start in range(0, length, piece_bytes):
        yield counted[start : start + piece_bytes]
