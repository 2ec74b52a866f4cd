"""A reader: answers reads of what is here and attributes of images, hands on every other request. Stdlib only.

`python -m basefs.reader JSON` with the number of the keeper's socket; over that come a clone of /dev/fuse and slots.

Invariants:
- Nothing here waits but the one `epoll`: a request that cannot be handed on now is kept in its slot.
- A slot is freed after its request was answered or handed on as a whole, so at most one request was both handed on
  and kept when a reader is killed; the server knows it by its `unique`.
- A read is answered only if table and `ready` say so before and after the bytes were read, with one generation.
- A read of compressed clusters is put off until what else is there was dealt with, for it takes 20 times as long as
  another; one such read is done between two looks at `/dev/fuse`, and beyond PUT_OFF_MAX they are handed on.
- Attributes are answered as the last server that could change them told them; it tells them before it answers a change.
- Requests that are kept while there is no server go to the next one, but for those that the kernel resends to it.
"""

import contextlib
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys
from collections import deque
from typing import NoReturn

from basefs import reader_inflate
from basefs.reader_images import Image, Images, LowerFile
from basefs.reader_layout import (
    ATTRIBUTES,
    FORWARDED,
    HIT_BYTES,
    HIT_BYTES_MAX,
    HITS,
    KEPT,
    LAYOUT,
    PAGE,
    SLOT_BYTES,
    SLOTS,
    SLOTS_BYTES,
)

_HEAD = struct.Struct("<IIQ")
"""Of a request: length, opcode, unique."""
_READ_IN = struct.Struct("<QQI")
"""Of a read: handle, offset, size."""
_READ_AT = 40
_REPLY = struct.Struct("<IiQ")
_GETATTR, _READ, _FLUSH, _INTERRUPT, _FORGETS = 3, 15, 25, 36, (2, 42)
_INODE_AT = 16
BURST = 32
"""Requests that are answered between two looks at the sockets."""
PUT_OFF_MAX = 4
"""Reads of compressed clusters that wait here to be inflated; the server, on another processor, has the rest. With 16 a
read took a quarter less processor time, and there were a tenth fewer of them at queue depth 16 (DESIGN, Readers)."""
PUT_OFF_A_BURST = 4
"""Of those one burst takes no more, and one is done before the next: other readers may be idle."""
MESSAGE_BYTES_MAX = 4096
PLACE_FDS = 3
"""Clone, slots, lock."""
_RELEASE_BYTES_MIN = 64 * 1024
"""A slot that had as much gives its memory back."""
GONE = (errno.ENODEV, errno.ECONNABORTED)
"""What /dev/fuse says when the session is over."""
PASSING = (errno.EINTR, errno.ENOENT)
"""A request was withdrawn while we read it."""


class Reader:
    """One clone of /dev/fuse from the start of this process to its end."""

    def __init__(self, *, clone_fd: int, slots_fd: int, keeper_fd: int) -> None:
        self._clone = clone_fd
        memory = mmap.mmap(slots_fd, SLOTS_BYTES)
        self._memory = memory
        whole = memoryview(memory)
        self._counters = whole[:PAGE].cast("Q")
        self._slots = [whole[PAGE + at * SLOT_BYTES : PAGE + (at + 1) * SLOT_BYTES] for at in range(SLOTS)]
        self._uniques = [slot[8:16].cast("Q") for slot in self._slots]
        for slot in self._slots:
            # Touched, so that the kernel's copy of a small request never waits for a page: a SIGKILL there fails it.
            slot[0] = slot[0]
        self._held = [at for at in range(SLOTS) if self._uniques[at][0]]
        """Slots whose requests wait to be handed on, in order; the first may be on its way (`_sent`)."""
        self._free = [at for at in range(SLOTS - 1, -1, -1) if not self._uniques[at][0]]
        self._sent = 0
        self._put_off: deque[int] = deque()
        """Slots of reads that want clusters inflated, in order."""
        self._images = Images()
        self._answer = memoryview(mmap.mmap(-1, PAGE + HIT_BYTES_MAX))
        self._keeper: socket.socket | None = socket.socket(fileno=keeper_fd)
        self._server: socket.socket | None = None
        self._epoll = select.epoll()
        self._epoll.register(keeper_fd, select.EPOLLIN)
        self._takes = False
        self._is_stopping = False

    def run(self) -> NoReturn:
        """Serve until the session or our use is over: ends the process."""
        while True:
            is_idle = not self._free or self._is_stopping or self._burst()
            if self._put_off:
                self._read_packed(self._put_off.popleft())
                is_idle = False
            self._set_takes(bool(self._free) and not self._is_stopping)
            for fd, _ in self._epoll.poll(-1 if is_idle else 0):
                if self._keeper is not None and fd == self._keeper.fileno():
                    self._hear_keeper(self._keeper)
                elif self._server is not None and fd == self._server.fileno():
                    self._hear_server(self._server)
            if (self._is_stopping and not self._held and not self._put_off) or (
                self._keeper is None and self._server is None
            ):
                sys.exit(0)

    def _set_takes(self, takes: bool) -> None:
        if takes != self._takes:
            self._takes = takes
            if takes:
                # Exclusive: one of the readers is woken for a request, not all.
                self._epoll.register(self._clone, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            else:
                self._epoll.unregister(self._clone)

    # --- requests ---------------------------------------------------------------------------------------

    def _burst(self) -> bool:
        """Deal with the requests that are there, BURST at most; True when no more are there or can be taken."""
        free, slots, clone = self._free, self._slots, self._clone
        images, files, put_off = self._images.by_inode, self._images.by_handle, self._put_off
        put_off_enough = len(put_off) + PUT_OFF_A_BURST
        for _ in range(BURST):
            if not free or len(put_off) == put_off_enough:
                return not free
            at = free[-1]
            slot = slots[at]
            try:
                os.readv(clone, [slot])
            except BlockingIOError:
                return True
            except OSError as exc:
                if exc.errno in GONE:
                    sys.exit(0)
                if exc.errno not in PASSING:
                    raise
                continue
            length, opcode, unique = _HEAD.unpack_from(slot)
            if opcode == _READ:
                handle, offset, size = _READ_IN.unpack_from(slot, _READ_AT)
                image = images.get(handle >> 1) or files.get(handle)
                if image is not None and self._hit(image, unique, offset, size):
                    self._uniques[at][0] = 0
                    continue
                if image is not None and len(put_off) < PUT_OFF_MAX and _is_packed(image, offset, size):
                    put_off.append(free.pop())
                    continue
            elif (opcode == _GETATTR and self._attributes(slot, unique)) or (
                opcode == _FLUSH and self._flush(slot, unique)
            ):
                self._uniques[at][0] = 0
                continue
            free.pop()
            if opcode == _INTERRUPT:
                self._release(at, length)
            else:
                self._held.append(at)
                self._hand_on()
        return False

    def _hit(self, image: Image | LowerFile, unique: int, offset: int, size: int) -> bool:
        """Answer a read from an image's local bytes; False: it is not ours to answer."""
        end = offset + size
        if end > image.size:
            end = image.size
            size = end - offset
        if size <= 0 or size > HIT_BYTES_MAX:
            return False
        target = self._answer[PAGE : PAGE + size]
        if not image.read_into(target, offset, end):
            return False
        self._reply(unique, target)
        counters = self._counters
        counters[HITS] += 1
        counters[HIT_BYTES] += size
        return True

    def _read_packed(self, at: int) -> None:
        """Answer a read that was put off, or hand it on."""
        length, _, unique = _HEAD.unpack_from(self._slots[at])
        handle, offset, size = _READ_IN.unpack_from(self._slots[at], _READ_AT)
        # Looked up anew: the image may have been closed, and its fd be another file's.
        image = self._images.by_inode.get(handle >> 1)
        if (
            image is not None
            and _is_packed(image, offset, size)
            and image.bring(offset, min(offset + size, image.size))
            and self._hit(image, unique, offset, size)
        ):
            self._release(at, length)
        else:
            self._held.append(at)
            self._hand_on()

    def _attributes(self, slot: memoryview, unique: int) -> bool:
        """Answer what the server, while there is one, or the last one would say of an image's attributes."""
        cells = self._images.cells
        attributes = None if cells is None else cells.get(int.from_bytes(slot[_INODE_AT : _INODE_AT + 8], "little"))
        if attributes is None:
            return False
        self._reply(unique, attributes)
        self._counters[ATTRIBUTES] += 1
        return True

    def _flush(self, slot: memoryview, unique: int) -> bool:
        """Answer the close(2) of an image, which changes nothing: its RELEASE does, and is the server's.

        Only an image's handle, without its lowest bit, is its inode (core/inodes.py).
        """
        inode, handle = (int.from_bytes(slot[at : at + 8], "little") for at in (_INODE_AT, _READ_AT))
        if handle >> 1 != inode:
            return False
        self._reply(unique, b"")
        return True

    def _reply(self, unique: int, body: bytes | memoryview) -> None:
        _REPLY.pack_into(self._answer, 0, _REPLY.size + len(body), 0, unique)
        # ENOENT: withdrawn, or handed out again. Any other error has ended the request in the kernel.
        with contextlib.suppress(OSError):
            os.writev(self._clone, [self._answer[: _REPLY.size], body])

    def _release(self, at: int, length: int) -> None:
        self._uniques[at][0] = 0
        self._free.append(at)
        if length >= _RELEASE_BYTES_MIN:
            self._memory.madvise(mmap.MADV_REMOVE, PAGE + at * SLOT_BYTES, SLOT_BYTES)

    # --- the server -------------------------------------------------------------------------------------

    def _hand_on(self) -> None:
        """Give the server what is held, in order, as far as its socket takes it."""
        server, held = self._server, self._held
        while server is not None and held:
            at = held[0]
            (length,) = struct.unpack_from("<I", self._slots[at])
            try:
                self._sent += server.send(self._slots[at][self._sent : length], socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                self._lose_server()
                return
            if self._sent == length:
                self._sent = 0
                del held[0]
                self._counters[FORWARDED] += 1
                self._release(at, length)
        if server is not None:
            self._epoll.modify(server, select.EPOLLIN | (select.EPOLLOUT if held else 0))

    def _lose_server(self) -> None:
        """It is gone. Images stay: who comes next revokes them before it changes their bytes."""
        if self._server is not None:
            self._epoll.unregister(self._server)
            self._server.close()
            self._server = None
            # What was sent in part was read by nobody.
            self._sent = 0

    def _new_server(self, fd: int) -> None:
        """From now on this one; the kernel has resent by now what it resends."""
        self._lose_server()
        self._images.new_server()
        # With what is handed on: the kernel may have resent them.
        self._held += self._put_off
        self._put_off.clear()
        self._server = socket.socket(fileno=fd)
        self._epoll.register(fd, select.EPOLLIN)
        # By their `unique`: what was resent before, and not handed on since, has the same one as we took it with then.
        kept = {self._uniques[at][0]: at for at in self._held if self._is_ours(at)}
        for at in set(self._held) - set(kept.values()):
            self._release(at, SLOT_BYTES)
        self._held = list(kept.values())
        with contextlib.suppress(OSError):  # a new connection takes that much, unless it is cut already
            self._server.send(KEPT.pack(len(self._held)), socket.MSG_DONTWAIT)
        self._hand_on()

    def _is_ours(self, at: int) -> bool:
        """Whether the kernel waits for our answer to the request in this slot: not, once it was handed out again.

        Asked by an answer to an interrupt of it, which changes nothing (fs/fuse/dev.c: fuse_dev_do_write). What needs
        no answer is handed out once: a forget that is lost would keep an unlinked file's space taken.
        """
        _, opcode, unique = _HEAD.unpack_from(self._slots[at])
        if opcode in _FORGETS:
            return True
        try:
            os.write(self._clone, _REPLY.pack(_REPLY.size, -errno.EINTR, unique | 1))
        except OSError:
            return False
        return True

    def _hear_server(self, server: socket.socket) -> None:
        if not self._images.hear(server):
            self._lose_server()
        elif self._held:
            self._hand_on()

    # --- the keeper -------------------------------------------------------------------------------------

    def _hear_keeper(self, keeper: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(keeper, MESSAGE_BYTES_MAX, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            # Served on until the server is gone, too; the next keeper ends us before that.
            self._epoll.unregister(keeper)
            keeper.close()
            self._keeper = None
            return
        message = json.loads(data)
        kind = message.get("type")
        if kind == "ping":
            self._send_keeper({"type": "pong", "n": message.get("n")})
        elif kind == "server" and fds:
            self._new_server(fds[0])
        elif kind == "stop":
            self._is_stopping = True

    def _send_keeper(self, message: dict[str, object]) -> None:
        if self._keeper is not None:
            with contextlib.suppress(OSError):
                self._keeper.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)


def _is_packed(image: Image | LowerFile, offset: int, size: int) -> bool:
    return image.is_packed(offset, min(offset + size, image.size))


def main() -> None:
    """Entry point of `python -m basefs.reader`."""
    arguments = json.loads(sys.argv[1])
    keeper_fd = int(arguments["keeper_fd"])
    reader_inflate.use_zlib_ng(arguments.get("libraries"))
    with socket.socket(fileno=os.dup(keeper_fd)) as keeper:
        keeper.send(json.dumps({"type": "ready", "layout": LAYOUT}).encode())
        # The lock's fd says what we belong to (keeper_predecessors).
        _, fds, _, _ = socket.recv_fds(keeper, MESSAGE_BYTES_MAX, PLACE_FDS)
    if len(fds) != PLACE_FDS:
        sys.exit(0)  # The keeper is gone.
    os.set_blocking(keeper_fd, False)
    Reader(clone_fd=fds[0], slots_fd=fds[1], keeper_fd=keeper_fd).run()


if __name__ == "__main__":
    main()
