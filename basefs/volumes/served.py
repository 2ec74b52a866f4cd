"""A volume that os-brick opens as a library's object (librbd): a helper process has it open and answers reads.

A read is 16 bytes (offset, length) on a stream socket; the answer is its length, or minus an errno, in 8 bytes, and the
bytes. Each socket has one read at a time, and a thread of the helper; there are STREAMS of them.
"""

import contextlib
import errno
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

STREAMS = 4
READ_LIMIT_S = 30.0
"""librbd waits for ever for a cluster that is away; whoever reads goes to Glance."""
REQUEST = struct.Struct("<QQ")
ANSWER = struct.Struct("<q")
READ_BYTES_MAX = 32 << 20


class ServedVolumeBytes:
    """`VolumeBytes` over a helper process; `let_go` ends it."""

    def __init__(self, streams: list[socket.socket], size: int, let_go: Callable[[], None]) -> None:
        self.size = size
        self._streams = streams
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for stream in streams:
            stream.settimeout(READ_LIMIT_S)
            self._free.put(stream)
        self._let_go = let_go
        self._is_broken = False

    def read_now(self, target: list[memoryview], offset: int) -> bool:  # noqa: ARG002  nothing is had without waiting
        """See `VolumeBytes`."""
        return False

    def read(self, offset: int, length: int) -> bytes:
        """See `VolumeBytes`."""
        if offset + length > self.size:
            raise OSError(errno.EIO, f"the volume ends after {self.size} bytes")
        end = offset + length
        starts = range(offset, end, READ_BYTES_MAX)
        return b"".join(self._read_piece(start, min(READ_BYTES_MAX, end - start)) for start in starts)

    def _read_piece(self, offset: int, length: int) -> bytes:
        try:
            stream = self._free.get(timeout=READ_LIMIT_S)
        except queue.Empty:
            raise OSError(errno.ETIMEDOUT, "the volume's helper process does not answer") from None
        try:
            told, data = self._exchange(stream, offset, length)
        except OSError:
            # What comes later on this stream would be the answer to another read.
            self._is_broken = True
            raise
        finally:
            self._free.put(stream)
        if told < 0:
            raise OSError(-told, os.strerror(-told))
        return data

    def _exchange(self, stream: socket.socket, offset: int, length: int) -> tuple[int, bytes]:
        if self._is_broken:
            raise OSError(errno.EIO, "the volume's helper process ended")
        stream.sendall(REQUEST.pack(offset, length))
        (told,) = ANSWER.unpack(_received(stream, ANSWER.size))
        return told, _received(stream, length) if told >= 0 else b""

    def fd_to_hold(self) -> int | None:
        """See `VolumeBytes`."""
        return None

    def close(self) -> None:
        """See `VolumeBytes`; reads that are inside fail."""
        self._is_broken = True
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            stream.close()
        self._let_go()


def _received(stream: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = stream.recv_into(view)
        if not count:
            raise OSError(errno.EIO, "the volume's helper process ended")
        view = view[count:]
    return bytes(data)


def serve(volume: Any) -> tuple[list[socket.socket], int]:  # noqa: ANN401  os-brick has no types
    """For the helper: sockets for the server, each answered by a thread, and the volume's size.

    `volume` is a file-like object, as os-brick's RBDVolumeIOWrapper is.
    """
    volume.seek(0, os.SEEK_END)
    size = int(volume.tell())
    lock = threading.Lock()
    image = getattr(volume, "rbd_image", None)  # reads at an offset, side by side

    def read(offset: int, length: int) -> bytes:
        if image is not None:
            return bytes(image.read(offset, length))
        with lock:
            volume.seek(offset)
            return bytes(volume.read(length))

    theirs = []
    for _ in range(STREAMS):
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        threading.Thread(target=_answer_reads, args=(ours, read), daemon=True).start()
        theirs.append(end)
    return theirs, size


def _answer_reads(stream: socket.socket, read: Callable[[int, int], bytes]) -> None:
    """Ends with the stream."""
    with stream, contextlib.suppress(OSError):
        while True:
            offset, length = REQUEST.unpack(_received(stream, REQUEST.size))
            try:
                data = read(offset, length)
                told = length if len(data) == length else -errno.EIO
            except Exception as exc:  # noqa: BLE001  whatever the library raises is the answer
                code = getattr(exc, "errno", None)
                told = -abs(code) if isinstance(code, int) and code else -errno.EIO
            stream.sendall(ANSWER.pack(told))
            if told >= 0:
                stream.sendall(data)
