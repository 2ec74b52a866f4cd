"""A source that serves images from memory and misbehaves on command; passes the contract suite of ImageSource."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from basefs import errors
from basefs.sources.base import Deliver, Digest, ProbeResult, SourceKind


@dataclass
class MemorySource:
    images: dict[str, bytes]
    ranged: bool = True
    requests: int = 0
    received_bytes: int = 0
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    faults: list[errors.BasefsError | None] = field(default_factory=list)
    """Popped per request: raised after `fault_after_pieces` pieces were delivered."""
    fault_after_pieces: int = 0
    hold: trio.Event | None = None
    """While set, requests wait for it before the first byte."""
    in_thread: bool = True
    before_piece: Callable[[int], None] | None = None
    lie_at: int = 0
    lies: int = 0
    """So many times the byte at `lie_at` is delivered wrong."""

    def _data(self, image_id: str) -> bytes:
        try:
            return self.images[image_id]
        except KeyError:
            raise errors.ImageNotFoundError(f"no image {image_id}") from None

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        self.requests += 1
        data = self._data(image_id)
        self._raise_next()
        kind: SourceKind = "ranged" if self.ranged else "streamed"
        header = data[: min(size, header_bytes)]
        self.received_bytes += len(header)
        return ProbeResult(kind=kind, reason="memory", header=header)

    def _raise_next(self) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        self.requests += 1
        self.calls.append(("range", offset, length))
        data = self._data(image_id)
        if self.hold is not None:
            await self.hold.wait()
        if not self.ranged:
            raise errors.RangeNotHonouredError("memory says 400")
        fault = self.faults.pop(0) if self.faults else None
        assert offset + length <= len(data) == size
        await trio.to_thread.run_sync(
            self._deliver, data[offset : offset + length], offset, piece_bytes, fault, deliver
        )

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        self.requests += 1
        self.calls.append(("stream", 0, size))
        data = self._data(image_id)
        if self.hold is not None:
            await self.hold.wait()
        fault = self.faults.pop(0) if self.faults else None
        lies = self.lies
        whole = await trio.to_thread.run_sync(self._deliver, data, 0, piece_bytes, fault, deliver)
        is_right = (
            lies == self.lies and digest is not None and hashlib.new(digest.algorithm, data).hexdigest() == digest.value
        )
        if whole and digest is not None and not is_right:
            raise errors.SourceHashError(f"hash is wrong: {digest.algorithm}")

    def _deliver(
        self, data: bytes, offset: int, piece_bytes: int, fault: errors.BasefsError | None, deliver: Deliver
    ) -> bool:
        starts = range(0, len(data), piece_bytes)
        memory = bytearray(piece_bytes)
        for at, start in enumerate(starts):
            if fault is not None and at == min(self.fault_after_pieces, len(starts) - 1):
                raise fault
            trio.from_thread.check_cancelled()
            piece = data[start : start + piece_bytes]
            lie = self.lie_at - offset - start
            if self.lies and 0 <= lie < len(piece):
                self.lies -= 1
                piece = piece[:lie] + bytes([piece[lie] ^ 0xFF]) + piece[lie + 1 :]
            if self.before_piece is not None:
                self.before_piece(offset + start)
            self.received_bytes += len(piece)
            with memoryview(memory) as lent, lent[: len(piece)] as view:
                view[:] = piece
                goes_on = deliver(offset + start, view)
                view[:] = b"\xa5" * len(piece)  # whoever kept the piece sees it
            if not goes_on:
                return False
        return True
