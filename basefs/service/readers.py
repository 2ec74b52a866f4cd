"""The server's end of its reader processes: answers what they hand on, and tells them which images they may serve.

Invariants:
- A request that was handed on is answered here, on the reader's clone of /dev/fuse, whether the reader lives or not:
  the kernel knows it by that clone only.
- It is begun once: a reader that was killed after it handed a request on, and before it noted that, has a successor
  that hands the same one on again. That is the last one of the connection before, and it comes from a slot.
- A reader gets an image's fds only after a read of it was answered here.
"""

import array
import logging
import mmap
import os
import socket
from collections import deque
from contextlib import suppress

import trio

from basefs import errors
from basefs.cache.reader_table import ReaderTable, Share
from basefs.core.fuse_wire import IN_HEADER, READ_IN, Opcode, Request, request_of
from basefs.core.inodes import image_inode, image_of_handle
from basefs.fuse import forwarded
from basefs.fuse.image_files import ImageFiles
from basefs.fuse.lower import LowerTree
from basefs.fuse.operations import Operations
from basefs.fuse.request_loop import reply
from basefs.reader_layout import (
    ATTRIBUTES,
    CLOSE,
    FILE,
    FORWARDED,
    HIT_BYTES,
    HITS,
    IMAGE,
    KEPT,
    MESSAGE,
    PAGE,
    SLOT_BYTES,
    SLOTS,
    SWEEP,
    TABLE,
    VOLUME,
)

log = logging.getLogger(__name__)

BUFFER_BYTES = 2 * SLOT_BYTES
LENGTH_BYTES = 4
_COUNTED = (HITS, HIT_BYTES, FORWARDED, ATTRIBUTES)


class ReaderLink:
    """One reader, from its connection to its end. It owns its socket and `slots_fd`."""

    def __init__(self, number: int, sock: socket.socket, clone_fd: int, slots_fd: int) -> None:
        self.number = number
        self.sock = sock
        self.clone_fd = clone_fd
        self.last_unique = 0
        self.ended = trio.Event()
        self._counters = memoryview(mmap.mmap(slots_fd, PAGE, prot=mmap.PROT_READ)).cast("Q")
        os.close(slots_fd)
        self._begun_with = [self._counters[word] for word in _COUNTED]
        self._told: dict[int, int] = {}
        self._files: set[int] = set()
        self._due: deque[bytes] = deque()
        """What the socket did not take yet; sent with the next ones."""

    def counts(self) -> list[int]:
        """Hits, their bytes, requests handed on and attributes told, since it was connected to this server."""
        now = [self._counters[word] for word in _COUNTED]
        return [count - before for count, before in zip(now, self._begun_with, strict=True)]

    def tell_table(self, table: ReaderTable) -> None:
        """Say where it is to look; before anything else."""
        self._send(MESSAGE.pack(TABLE, 0, 0, 0, 0, 0, 0), [table.fd])

    def tell_image(self, share: Share) -> None:
        """Let it serve the image; once is enough."""
        if self._told.get(share.number) != share.serial:
            kind = IMAGE if share.lease_fd < 0 else VOLUME
            message = MESSAGE.pack(
                kind, share.chunk_shift, image_inode(share.number), share.entry, share.serial, share.size,
                share.cluster_bits,
            )  # fmt: skip
            fds = [fd for fd in (share.lease_fd, share.data_fd, share.ready_fd, share.map_fd) if fd >= 0]
            if self._send(message, fds):
                self._told[share.number] = share.serial

    def tell_file(self, handle: int, fd: int) -> None:
        """Let it read through an open lower file; once is enough."""
        if handle not in self._files and self._send(MESSAGE.pack(FILE, 0, handle, 0, 0, 0, 0), [fd]):
            self._files.add(handle)

    def tell_close(self, handle: int) -> None:
        """Have it close a lower file, whose space may be waited for."""
        if handle in self._files:
            self._files.remove(handle)
            self._tell_surely(MESSAGE.pack(CLOSE, 0, handle, 0, 0, 0, 0))

    def tell_sweep(self) -> None:
        """Have it close what was revoked."""
        self._tell_surely(MESSAGE.pack(SWEEP, 0, 0, 0, 0, 0, 0))

    def _tell_surely(self, message: bytes) -> None:
        if message not in self._due:
            self._due.append(message)
        while self._due and self._send(self._due[0], []):
            self._due.popleft()

    def _send(self, message: bytes, fds: list[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([message], rights, socket.MSG_DONTWAIT)
        except OSError:  # It is full, or gone: it serves less then, and looks at the table all the same.
            return False
        return True

    def close(self) -> None:
        """It is not heard any more; what it had handed on is still answered."""
        self.sock.close()
        self.ended.set()


class Readers:
    """All readers of this server. `connect` comes from the keeper's channel; the rest happens in `run`."""

    def __init__(
        self, operations: Operations, images: ImageFiles, lower: LowerTree, table: ReaderTable, *, requests_max: int
    ) -> None:
        """`requests_max` are worked on at a time; what comes beside them waits."""
        self._operations = operations
        self._images = images
        self._lower = lower
        self._table = table
        self.room = trio.Semaphore(requests_max)
        self._arrived, self._arrivals = trio.open_memory_channel[ReaderLink](float("inf"))
        self._links: dict[int, ReaderLink] = {}
        self._clones: dict[int, int] = {}
        self._last_uniques: dict[int, int] = {}
        self._ended_counts = [0] * len(_COUNTED)
        table.revoked = self._sweep
        lower.when_released(self._released)

    def connect(self, number: int, fds: list[int]) -> None:
        """A reader is there: its socket, its clone of /dev/fuse and its slots, all ours from here."""
        sock = socket.socket(fileno=fds[0])
        sock.setblocking(False)
        # One clone a number, which all readers of that number had: kept, for what they handed on outlives them.
        clone_fd = self._clones.setdefault(number, fds[1])
        if clone_fd != fds[1]:
            os.close(fds[1])
        self._arrived.send_nowait(ReaderLink(number, sock, clone_fd, fds[2]))

    @property
    def is_none(self) -> bool:
        """Whether no reader is connected."""
        return not self._links

    async def run(self) -> None:
        """Ends when it is cancelled: what is not answered then waits for the next server."""
        async with trio.open_nursery() as nursery:
            async for link in self._arrivals:
                nursery.start_soon(self._serve, link, nursery)

    def counts(self) -> dict[str, int]:
        """What readers did since this server began: `hits`, `hit_bytes`, `forwarded`, `attributes`; and `readers`."""
        each = [self._ended_counts, *(link.counts() for link in self._links.values())]
        sums = [sum(column) for column in zip(*each, strict=True)]
        return {
            "readers": len(self._links),
            **dict(zip(("hits", "hit_bytes", "forwarded", "attributes"), sums, strict=True)),
        }

    def _released(self, handle: int) -> None:
        for link in self._links.values():
            link.tell_close(handle)

    def _sweep(self) -> None:
        for link in self._links.values():
            link.tell_sweep()

    async def _serve(self, link: ReaderLink, nursery: trio.Nursery) -> None:
        """Ends with the reader."""
        before = self._links.get(link.number)
        if before is not None:
            # What it had handed on is read to the end: the successor begins with what was not.
            await before.ended.wait()
        self._links[link.number] = link
        link.tell_table(self._table)
        try:
            await self._hear(link, nursery, done_before=self._last_uniques.get(link.number, 0))
        finally:
            self._last_uniques[link.number] = link.last_unique
            self._ended_counts = [sum(pair) for pair in zip(self._ended_counts, link.counts(), strict=True)]
            if self._links.get(link.number) is link:
                del self._links[link.number]
            link.close()

    async def _hear(self, link: ReaderLink, nursery: trio.Nursery, *, done_before: int) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        filled = 0
        kept = -1
        """Requests to come that may have been handed on before; -1: it did not say yet."""
        while True:
            await trio.lowlevel.wait_readable(link.sock)
            try:
                received = link.sock.recv_into(buffer[filled:])
            except BlockingIOError:
                continue
            except OSError:
                return
            if not received:
                return  # What came of a last request in part is handed on by the successor as a whole.
            filled += received
            at = 0
            if kept < 0 and filled >= KEPT.size:
                kept, at = _kept_of(link, buffer), KEPT.size
            while kept >= 0 and filled - at >= LENGTH_BYTES:
                length = int.from_bytes(buffer[at : at + LENGTH_BYTES], "little")
                if not IN_HEADER.size <= length <= SLOT_BYTES:
                    raise errors.InternalError(f"reader {link.number} handed on a request of {length} bytes")
                if filled - at < length:
                    break
                request = request_of(memoryview(bytes(buffer[at : at + length])))
                at += length
                link.last_unique = request.unique
                is_done = kept > 0 and request.unique == done_before
                kept = max(0, kept - 1)
                if not is_done:
                    await self.room.acquire()
                    nursery.start_soon(self._answer, link, request)
            buffer[: filled - at] = bytes(buffer[at:filled])
            filled -= at

    async def _answer(self, link: ReaderLink, request: Request) -> None:
        try:
            # Nothing may be awaited between the last step of an answer and the reply (fuse/open_table.py).
            reply(link.clone_fd, await forwarded.answer(self._operations, request))
            if request.opcode == Opcode.READ:
                with suppress(errors.BasefsError):  # it was told to whoever read
                    await self._offer(link, request)
        finally:
            self.room.release()

    async def _offer(self, link: ReaderLink, request: Request) -> None:
        handle, offset, size, *_ = READ_IN.unpack_from(request.body)
        found = image_of_handle(handle)
        if found is None:
            fd = self._lower.shared_fd(handle)
            if fd is not None:
                link.tell_file(handle, fd)
        else:
            share = await self._images.share(found[0], self._table, offset, size)
            if share is not None:
                link.tell_image(share)


def _kept_of(link: ReaderLink, buffer: memoryview) -> int:
    (kept,) = KEPT.unpack_from(buffer)
    if kept > SLOTS:
        raise errors.InternalError(f"reader {link.number} has {kept} requests in {SLOTS} slots")
    return int(kept)
