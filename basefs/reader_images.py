"""The images that a reader may serve, as its server told it. Stdlib only."""

import array
import mmap
import os
import socket

from basefs.reader_layout import (
    GENERATION,
    HIT_BYTES_MAX,
    IMAGE,
    MESSAGE,
    READY,
    SERIAL,
    SWEEP,
    TABLE,
    TABLE_BYTES,
)

FDS_MAX = 2
CHUNK_BYTES_MIN = 4096
_ALL_READY = bytes([READY]) * (HIT_BYTES_MAX // CHUNK_BYTES_MIN + 2)
_preadv = os.preadv
_NOWAIT = os.RWF_NOWAIT


class Image:
    """The local bytes of one image, and what says whether they may be served."""

    def __init__(self, table: memoryview, entry: int, serial: int, size: int, shift: int, fds: list[int]) -> None:
        """`entry` is the entry's first word in `table`; `fds` are the image's bytes and its `ready`."""
        self.size = size
        self._table = table
        self._serial_word, self._generation_word = entry + SERIAL, entry + GENERATION
        self._serial = serial
        self._shift = shift
        self._fd, ready_fd = fds
        self._ready = memoryview(mmap.mmap(ready_fd, 0, prot=mmap.PROT_READ))
        os.close(ready_fd)

    @property
    def is_revoked(self) -> bool:
        """Whether it is not to be served any more."""
        return bool(self._table[self._serial_word] != self._serial)

    def read_into(self, target: memoryview, offset: int, end: int) -> bool:
        """Read `[offset, end)`, which is in the image, into `target` of that length; whether those are its bytes."""
        table, ready = self._table, self._ready
        generation = table[self._generation_word]
        first, last = offset >> self._shift, (end - 1 >> self._shift) + 1
        wanted = _ALL_READY[: last - first]
        if table[self._serial_word] != self._serial or ready[first:last] != wanted:
            return False
        try:
            if _preadv(self._fd, [target], offset, _NOWAIT) != end - offset:
                return False
        except OSError:  # not in memory, or the disk fails: the server's affair
            return False
        # The kernel's locks around reading, writing and punching order this look after ours at the bytes.
        return bool(
            ready[first:last] == wanted
            and table[self._generation_word] == generation
            and table[self._serial_word] == self._serial
        )

    def close(self) -> None:
        """Give everything back: an image that was removed must not keep its place on the disk."""
        os.close(self._fd)


class Images:
    """Those that the server told us of, by inode."""

    def __init__(self) -> None:
        self.by_inode: dict[int, Image] = {}
        self._table: memoryview | None = None
        self._table_id = (-1, -1)

    def hear(self, server: socket.socket) -> bool:
        """Take the messages of the server that are there; False when it is gone."""
        while True:
            try:
                data, fds = _receive(server)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if len(data) < MESSAGE.size:
                return False
            kind, shift, inode, entry, serial, size, _ = MESSAGE.unpack(data)
            if kind == TABLE:
                self._use_table(fds.pop())
            elif kind == IMAGE and self._table is not None and len(fds) == FDS_MAX:
                self._forget(inode)
                self.by_inode[inode] = Image(self._table, entry, serial, size, shift, fds)
                fds = []
            elif kind == SWEEP:
                for revoked in [inode for inode, image in self.by_inode.items() if image.is_revoked]:
                    self._forget(revoked)
            for fd in fds:
                os.close(fd)

    def _use_table(self, fd: int) -> None:
        """The same one as before goes on; what another one says of older images is nothing."""
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._table_id:
            for inode in list(self.by_inode):
                self._forget(inode)
            self._table_id = (status.st_dev, status.st_ino)
            self._table = memoryview(mmap.mmap(fd, TABLE_BYTES, prot=mmap.PROT_READ)).cast("Q")
        os.close(fd)

    def _forget(self, inode: int) -> None:
        image = self.by_inode.pop(inode, None)
        if image is not None:
            image.close()


def _receive(server: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its fds."""
    fds = array.array("i")
    data, ancillary, _, _ = server.recvmsg(
        MESSAGE.size, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)
