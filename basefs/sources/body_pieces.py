"""The body of an answer in pieces, each taken off the connection into the same page-aligned memory. For threads.

A body of a known length goes past urllib3, whose `read1` makes an object of each read, which had to be cut and joined.
Page-aligned, for the kernel copies 1 MiB out of other memory ten times as slowly (`cache/hit_buffer.py`).
"""

import mmap
from collections.abc import Callable, Iterator

import requests
import trio

from basefs import errors
from basefs.concurrency.exchange import Answer
from basefs.sources.bodies import Pace
from basefs.sources.http_errors import translated

READ_BYTES_MAX = 256 * 1024
"""Asked of urllib3 at a time, for a body that does not tell its length."""


class Body:
    """The bytes that are still to come of one answer. `came` is told of each read's bytes, 0 at the end."""

    def __init__(self, response: requests.Response, what: str, came: Callable[[int], None]) -> None:
        self._what = what
        self._came = came
        self._raw = response.raw
        answer = getattr(response.raw, "_original_response", None)  # as requests does for its cookies
        # Nobody may have read from it by urllib3, and nobody may afterwards: that keeps lengths of its own.
        is_sized = isinstance(answer, Answer) and answer.length is not None and not answer.chunked
        self._answer = answer if is_sized else None

    def pieces(self, length: int, piece_bytes: int) -> Iterator[memoryview]:
        """The next `length` bytes, in pieces of `piece_bytes`; a torn piece is not delivered.

        A piece is valid until the next one is asked for.

        Raises:
            SourceUnavailableError: the body ended before that, or came too slowly.
        """
        memory = memoryview(mmap.mmap(-1, min(piece_bytes, length)))
        pace = Pace(self._what)
        done = 0
        while done < length:
            piece = memory[: length - done]
            at = 0
            with translated(self._what):
                while at < len(piece):
                    came = self._read(piece[at:])
                    if not came:
                        text = f"{self._what}: the body ended after {done + at} of {length} bytes"
                        raise errors.SourceUnavailableError(text, may_be_away=True)
                    at += came
                    pace.came(came)
            # Lets a cancelled flight go before the next piece; the connection is closed on the way out.
            trio.from_thread.check_cancelled()
            yield piece
            done += len(piece)
        if self._answer is not None and self._answer.isclosed():
            self._raw.release_conn()  # all of it came: the next request may have the connection

    def all(self, length: int) -> bytes:
        """The next `length` bytes at once; see `pieces`."""
        return b"".join(bytes(piece) for piece in self.pieces(length, length))

    def has_more(self) -> bool:
        """Whether another byte comes, which is lost then; waits for it."""
        with translated(self._what):
            return self._read(memoryview(bytearray(1))) > 0

    def _read(self, target: memoryview) -> int:
        """How many bytes came into `target`, after waiting for the first; 0 at the end."""
        if self._answer is None:
            data = self._raw.read1(min(len(target), READ_BYTES_MAX), decode_content=False)
            came = len(data)
            target[:came] = data
        else:
            came = self._answer.read_some_into(target)
        self._came(came)
        return came
