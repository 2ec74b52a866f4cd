"""What the head of an answer with image bytes must say, and how fast its body must come."""

import time

import requests

from basefs import errors
from basefs.core.byte_ranges import parse_content_range

PACE_S = 10.0
PACE_BYTES_MIN = 16 * 1024
"""A body that brings less than this in PACE_S seconds is given up and asked for again."""


class Pace:
    """Gives a body up that drips: it would keep a request slot, and the readers behind it, for hours."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._received = 0

    def came(self, length: int) -> None:
        """So many bytes came.

        Raises:
            SourceUnavailableError: too few did, for too long.
        """
        self._received += length
        now = time.monotonic()
        if now - self._began < PACE_S:
            return
        if self._received < PACE_BYTES_MIN:
            raise errors.SourceUnavailableError(f"{self._what}: {self._received} bytes in {now - self._began:.0f} s")
        self._began, self._received = now, 0


def content_length(response: requests.Response, what: str) -> int | None:
    """Content-Length, None when the end of the body is marked otherwise."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise errors.SourceCorruptError(f"{what}: the body is encoded although we asked for identity")
    text = response.headers.get("Content-Length")
    if text is None or response.headers.get("Transfer-Encoding") is not None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise errors.SourceCorruptError(f"{what}: Content-Length is {text[:40]!r}")
    return int(text)


def check_content_range(response: requests.Response, what: str, size: int, offset: int, length: int) -> None:
    """Return if the 206 says that exactly the asked-for bytes come.

    Raises:
        RangeNotHonouredError: it does not.
        SourceCorruptError: it is about an image of another size.
    """
    text = response.headers.get("Content-Range", "")
    try:
        came = parse_content_range(text)
    except ValueError as exc:
        raise errors.RangeNotHonouredError(f"{what}: a 206 without a usable Content-Range: {exc}") from exc
    if came.total is not None and came.total != size:
        raise errors.SourceCorruptError(f"{what}: the store has {came.total} bytes, the image's metadata say {size}")
    if (came.first, came.last) != (offset, offset + length - 1):
        raise errors.RangeNotHonouredError(f"{what}: bytes {came.first} to {came.last} came instead")
