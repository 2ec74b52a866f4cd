"""The images that a reader may serve, as its server told it. Stdlib only."""

import array
import mmap
import os
import socket
from collections.abc import Callable

from basefs.reader_attributes import AttributeCells
from basefs.reader_inflate import Inflater
from basefs.reader_layout import (
    CLOSE,
    FILE,
    GENERATION,
    HIT_BYTES_MAX,
    IMAGE,
    MESSAGE,
    PACKED,
    PACKED_BYTES_MAX,
    READY,
    SERIAL,
    SWEEP,
    TABLE,
    TABLE_BYTES,
    UNKNOWN,
    VOLUME,
    ZEROS,
    packed_place,
)

FDS_MAX = 3
CHUNK_BYTES_MIN = 4096
INFLATE_BYTES_MAX = 128 * 1024
"""Reads of compressed clusters up to what guests read ahead are inflated here: three clusters of 64 KiB at most."""
_ALL_READY = bytes([READY]) * (HIT_BYTES_MAX // CHUNK_BYTES_MIN + 2)
_zeros = memoryview(mmap.mmap(-1, HIT_BYTES_MAX, prot=mmap.PROT_READ))
_packed = memoryview(mmap.mmap(-1, PACKED_BYTES_MAX))
_preadv = os.preadv
_NOWAIT = os.RWF_NOWAIT


class Image:
    """The local bytes of one image, and what says whether they may be served."""

    def __init__(
        self,
        table: memoryview,
        entry: int,
        serial: int,
        size: int,
        shift: int,
        fds: list[int],
        cluster_bits: int,
        inflater: Inflater,
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
        self._mask = (1 << cluster_bits) - 1
        self._inflater = inflater
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
        """As `read_into`, for the disk whose clusters the map tells of. Compressed ones must have been brought."""
        # Before the map: what that said in an earlier generation may be wrong.
        generation = self._table[self._generation_word]
        bits, mask = self._bits, self._mask
        if offset >> bits == end - 1 >> bits:
            return self._read_piece_into(target, self._clusters[offset >> bits], offset & mask, generation)
        at = 0
        for word, begin, length in self._pieces(offset, end):
            if not self._read_piece_into(target[at : at + length], word, begin, generation):
                return False
            at += length
        return bool(self._table[self._generation_word] == generation and self._table[self._serial_word] == self._serial)

    def _pieces(self, offset: int, end: int) -> list[tuple[int, int, int]]:
        """What `[offset, end)` of the disk is made of: words, and which bytes from there; neighbours are one piece."""
        bits, mask = self._bits, self._mask
        pieces: list[tuple[int, int, int]] = []
        plain_end = 0
        while offset < end:
            begin = offset & mask
            length = min(mask + 1 - begin, end - offset)
            word = self._clusters[offset >> bits]
            if ZEROS < word == plain_end:
                first, at, before = pieces.pop()
                pieces.append((first, at, before + length))
            else:
                pieces.append((word, begin, length))
            plain_end = word + begin + length if ZEROS < word < PACKED else 0
            offset += length
        return pieces

    def _read_piece_into(self, target: memoryview, word: int, begin: int, generation: int) -> bool:
        """Read from byte `begin` on of the cluster, or of the neighbours, that `word` tells of; see `read_into`."""
        if ZEROS < word < PACKED:
            return self._read_place_into(target, word + begin, generation)
        if word == UNKNOWN:
            return False
        if word == ZEROS:
            target[:] = _zeros[: len(target)]
            return bool(
                self._table[self._generation_word] == generation and self._table[self._serial_word] == self._serial
            )
        cluster = self._inflater.kept(self._serial, generation, word)
        if cluster is None:
            return False
        target[:] = memoryview(cluster)[begin : begin + len(target)]
        # `ready`, too: it says whose use is to be noted.
        return self._may_serve(*packed_place(word, self._bits), generation)

    def is_packed(self, offset: int, end: int) -> bool:
        """Whether `bring` may help `read_into` for this range: not to be asked where `read_into` has done it."""
        if not offset < end <= offset + INFLATE_BYTES_MAX or self._inflater.is_slow(self._serial):
            return False
        words = self._clusters[offset >> self._bits : (end - 1 >> self._bits) + 1] if self._bits else ()
        return UNKNOWN not in words and any(word >= PACKED for word in words)

    def bring(self, offset: int, end: int) -> bool:
        """Inflate what is compressed of a range that `is_packed`; False when that is the server's affair."""
        for cluster in range(offset >> self._bits, (end - 1 >> self._bits) + 1):
            generation = self._table[self._generation_word]
            word = self._clusters[cluster]
            if word >= PACKED and self._inflater.kept(self._serial, generation, word) is None:
                host, length = packed_place(word, self._bits)
                packed = _packed[:length]
                if not length or not self._read_place_into(packed, host, generation):
                    return False
                self._inflater.inflate(self._serial, generation, word, packed, self._mask + 1)
        return True

    def _read_file_into(self, target: memoryview, offset: int, end: int) -> bool:
        """As `read_into`, for an image that has become a file, every byte of which is there."""
        try:
            is_whole = _preadv(self._fd, [target], offset, _NOWAIT) == end - offset
        except OSError:
            return False
        return is_whole and not self.is_revoked

    def _read_stored_into(self, target: memoryview, offset: int, end: int) -> bool:  # noqa: ARG002
        """As `read_into`, for what is shown as it is stored."""
        return self._read_place_into(target, offset, self._table[self._generation_word])

    def _read_place_into(self, target: memoryview, place: int, generation: int) -> bool:
        """As `read_into`, for the stored bytes from `place` on, if they are those of this generation."""
        size = len(target)
        if not self._may_serve(place, size, generation):
            return False
        try:
            if _preadv(self._fd, [target], place, _NOWAIT) != size:
                return False
        except OSError:  # not in memory, or the disk fails: the server's affair
            return False
        # The kernel's locks around reading, writing and punching order this look after ours at the bytes.
        return self._may_serve(place, size, generation)

    def _may_serve(self, place: int, size: int, generation: int) -> bool:
        """Whether `ready` and table say that these stored bytes are the image's, and were in this generation."""
        table, ready = self._table, self._ready
        first, last = place >> self._shift, place + size - 1 >> self._shift
        if first == last < len(ready):
            # One chunk, as nearly always: a comparison of slices takes 0.3 us more.
            is_ready = ready[first] == READY
        else:
            is_ready = ready[first : last + 1] == _ALL_READY[: last + 1 - first]
        return bool(
            is_ready and table[self._generation_word] == generation and table[self._serial_word] == self._serial
        )

    def close(self) -> None:
        """Give everything back: an image that was removed must not keep its place on the disk, a volume be detached."""
        self._inflater.forget(self._serial)
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

    def is_packed(self, offset: int, end: int) -> bool:  # noqa: ARG002
        """See `Image.is_packed`: nothing is."""
        return False

    def close(self) -> None:
        """Give the fd back."""
        os.close(self._fd)


class Images:
    """Those that the server told us of, by inode; and open lower files, by handle."""

    def __init__(self) -> None:
        self.by_inode: dict[int, Image] = {}
        self.by_handle: dict[int, LowerFile] = {}
        self._inflater = Inflater()
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
                image = Image(self._table, entry, serial, size, shift, fds, cluster_bits, self._inflater)
                image.lease_fd = lease_fd
                self.by_inode[inode] = image
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
