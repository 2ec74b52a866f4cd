"""The images that a reader may serve, as its server told it. Stdlib only."""

import array
import mmap
import os
import socket
from collections.abc import Callable

from basefs.reader_attributes import AttributeCells
from basefs.reader_layout import (
    CLOSE,
    FILE,
    GENERATION,
    HIT_BYTES_MAX,
    IMAGE,
    MESSAGE,
    READY,
    SERIAL,
    SWEEP,
    TABLE,
    TABLE_BYTES,
    UNKNOWN,
    VOLUME,
    ZEROS,
)

FDS_MAX = 3
CHUNK_BYTES_MIN = 4096
_ALL_READY = bytes([READY]) * (HIT_BYTES_MAX // CHUNK_BYTES_MIN + 2)
_zeros = memoryview(mmap.mmap(-1, HIT_BYTES_MAX, prot=mmap.PROT_READ))
_preadv = os.preadv
_NOWAIT = os.RWF_NOWAIT


class Image:
    """The local bytes of one image, and what says whether they may be served."""

    def __init__(
        self, table: memoryview, entry: int, serial: int, size: int, shift: int, fds: list[int], cluster_bits: int = 0
    ) -> None:
        """`entry` is the entry's first word in `table`; `fds` as in the message IMAGE, ours from here."""
        self.size = size
        self._table = table
        self._serial_word, self._generation_word = entry + SERIAL, entry + GENERATION
        self._serial = serial
        self._shift = shift
        self._fd = fds[0]
        self.lease_fd = -1
        memories = [memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) for fd in fds[1:]]
        self._ready = memories[0] if memories else memoryview(b"")
        self._bits = cluster_bits
        self._clusters = memories[-1].cast("Q") if cluster_bits else self._ready
        self.read_into: Callable[[memoryview, int, int], bool] = (
            self._read_clusters_into if cluster_bits else self._read_stored_into if memories else self._read_file_into
        )
        """Read `[offset, end)`, which is in the image, into a target of that length; whether those are its bytes."""
        for fd in fds[1:]:
            os.close(fd)

    @property
    def is_revoked(self) -> bool:
        """Whether it is not to be served any more."""
        return bool(self._table[self._serial_word] != self._serial)

    def _read_clusters_into(self, target: memoryview, offset: int, end: int) -> bool:
        """As `read_into`, for the disk whose clusters the map tells of."""
        generation = self._table[self._generation_word]
        at = 0
        for place, length in self._pieces(offset, end):
            piece = target[at : at + length]
            if place == ZEROS:
                piece[:] = _zeros[:length]
            elif place == UNKNOWN or not self._read_stored_into(piece, place, place + length):
                return False
            at += length
        return bool(self._table[self._generation_word] == generation and self._table[self._serial_word] == self._serial)

    def _pieces(self, offset: int, end: int) -> list[tuple[int, int]]:
        """Places and lengths of what `[offset, end)` of the disk is made of; neighbours in the file are one piece."""
        bits, mask = self._bits, (1 << self._bits) - 1
        pieces: list[tuple[int, int]] = []
        while offset < end:
            length = min(mask + 1 - (offset & mask), end - offset)
            place = self._clusters[offset >> bits]
            place += offset & mask if place > ZEROS else 0
            if pieces and place > ZEROS and sum(pieces[-1]) == place and pieces[-1][0] > ZEROS:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + length
            else:
                pieces.append((place, length))
            offset += length
        return pieces

    def _read_file_into(self, target: memoryview, offset: int, end: int) -> bool:
        """As `read_into`, for an image that has become a file, every byte of which is there."""
        try:
            is_whole = _preadv(self._fd, [target], offset, _NOWAIT) == end - offset
        except OSError:
            return False
        return is_whole and not self.is_revoked

    def _read_stored_into(self, target: memoryview, offset: int, end: int) -> bool:
        """As `read_into`, for what is shown as it is stored."""
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
        """Give everything back: an image that was removed must not keep its place on the disk, a volume be detached."""
        os.close(self._fd)
        if self.lease_fd >= 0:
            os.close(self.lease_fd)


class LowerFile:
    """An open file of the lower directory. Whatever is not in memory as a whole is the server's, its end, too."""

    size = 1 << 63

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_into(self, target: memoryview, offset: int, end: int) -> bool:
        """Read `[offset, end)` into `target` of that length; whether all of it was there."""
        try:
            return _preadv(self._fd, [target], offset, _NOWAIT) == end - offset
        except OSError:
            return False

    def close(self) -> None:
        """Give the fd back."""
        os.close(self._fd)


class Images:
    """Those that the server told us of, by inode; and open lower files, by handle."""

    def __init__(self) -> None:
        self.by_inode: dict[int, Image] = {}
        self.by_handle: dict[int, LowerFile] = {}
        self.cells: AttributeCells | None = None
        """What the table says of attributes; None while there is no table."""
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
            kind, shift, inode, entry, serial, size, cluster_bits = MESSAGE.unpack(data)
            if kind == TABLE:
                self._use_table(fds.pop())
            elif kind == FILE and fds:
                self._close_file(inode)
                self.by_handle[inode] = LowerFile(fds.pop())
            elif kind == CLOSE:
                self._close_file(inode)
            elif kind in (IMAGE, VOLUME) and self._table is not None and len(fds) > (kind == VOLUME):
                lease_fd = fds.pop(0) if kind == VOLUME else -1
                self._forget(inode)
                image = self.by_inode[inode] = Image(self._table, entry, serial, size, shift, fds, cluster_bits)
                image.lease_fd = lease_fd
                fds = []
            elif kind == SWEEP:
                for revoked in [inode for inode, image in self.by_inode.items() if image.is_revoked]:
                    self._forget(revoked)
            for fd in reversed(fds):  # a lease after its volume
                os.close(fd)

    def new_server(self) -> None:
        """Lower files are told anew: this one does not know what the last one told, and so what to have closed."""
        for handle in list(self.by_handle):
            self._close_file(handle)

    def _close_file(self, handle: int) -> None:
        file = self.by_handle.pop(handle, None)
        if file is not None:
            file.close()

    def _use_table(self, fd: int) -> None:
        """The same one as before goes on; what another one says of older images is nothing."""
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._table_id:
            for inode in list(self.by_inode):
                self._forget(inode)
            self._table_id = (status.st_dev, status.st_ino)
            self._table = memoryview(mmap.mmap(fd, TABLE_BYTES, prot=mmap.PROT_READ)).cast("Q")
            self.cells = AttributeCells(self._table)
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
