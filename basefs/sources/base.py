"""What every source of image bytes promises. One contract suite (`tests/contract`) runs on all of them.

A source delivers bytes in pieces while the request is still under way, so that a waiter wakes as soon
as *its* bytes are down. Pieces are delivered in the fetch thread; a receiver must be thread-safe.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

SourceKind = Literal["ranged", "streamed"]

Deliver = Callable[[int, memoryview], bool]
"""`deliver(offset, piece)`: takes the piece at `offset`; False asks the source to stop and close.

The piece is valid during the call only: the next one comes into the same memory.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """What Glance says the whole image hashes to: hashlib's name of the algorithm, and hex."""

    algorithm: str
    value: str

    def is_of(self, hasher: "Hasher") -> bool:
        """Whether that is what was hashed."""
        return hasher.hexdigest() == self.value.lower()


class Hasher(Protocol):
    """One of hashlib's objects."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Hash `data`, too. Releases the GIL for more than 2 KiB."""
        ...

    def hexdigest(self) -> str:
        """The hash of all that, in lower-case hex."""
        ...


def new_hasher(algorithm: str) -> Hasher | None:
    """A hasher; None where this Python has no such algorithm, or its hash has no length of its own."""
    try:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
    except ValueError:
        return None
    return hasher if hasher.digest_size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """How an image can be read, why, and its first bytes."""

    kind: SourceKind
    reason: str
    header: bytes


class ImageSource(Protocol):
    """Reads image bytes from Glance, or a store behind it. All methods may be called from many tasks at once.

    Every method raises ImageNotFoundError, SourceForbiddenError, SourceUnavailableError or
    SourceCorruptError, nothing else. Cancellation: the call waits until its thread notices (the
    connection is closed at the next piece), so it belongs in the service nursery, never in a request.
    """

    @property
    def requests(self) -> int:
        """GETs of image bytes sent so far (retries count)."""
        ...

    @property
    def received_bytes(self) -> int:
        """Body bytes taken from the wire so far, whether used or not."""
        ...

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        """Ask for the first `min(header_bytes, size)` bytes by Range and see how Glance answers.

        `size` > 0 is what the metadata say. `header` in the result has exactly that many bytes; where
        Glance does not honour the range it is read off the start of a plain GET, which is then closed.
        """
        ...

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """Deliver exactly `[offset, offset + length)` in order.

        Each piece has `piece_bytes` bytes, the last one maybe fewer. 0 <= offset, 0 < length,
        offset + length <= size. Nothing is delivered before status, Content-Range and length are found
        right; a failure later leaves a right prefix delivered.

        Raises:
            RangeNotHonouredError: the store does not answer ranges (any more).
        """
        ...

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        """Deliver the whole image from byte 0 in order by one plain GET, and check its length and `digest`.

        Returns early, without a check, when `deliver` says False. A body that ends early is a
        SourceUnavailableError; one that is too long is a SourceCorruptError, one that hashes wrongly
        a SourceHashError, raised after its pieces were delivered: the receiver drops them.
        """
        ...
