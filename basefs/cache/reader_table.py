"""Which images reader processes may serve by themselves: a table in memory that they look at before and after a read.

It outlives the server (the keeper has its fd), and readers go on with what it says while there is no server. So each
server begins with the entries of the one before it, and revokes an image's before it opens the image's chunk file:
nothing changes the bytes of a chunk file but through one that was opened. Owned by the trio loop; nothing here awaits.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from basefs.reader_layout import (
    GENERATION,
    NUMBER,
    SERIAL,
    TABLE_BYTES,
    TABLE_ENTRIES,
    TABLE_HEADER_WORDS,
    TABLE_WORDS,
)

KEY = "readers"
"""Under which the table is left with the keeper."""
MAGIC = 0x0BA5EF50_00000002
"""With the version."""
_MAGIC, _LAST_SERIAL = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a reader needs to serve an image; the fds stay the image's."""

    number: int
    entry: int
    serial: int
    size: int
    chunk_shift: int
    data_fd: int
    ready_fd: int
    cluster_bits: int = 0
    map_fd: int = -1
    cluster_map: memoryview | None = None
    """Words of 8 bytes, one a cluster; see `reader_layout`."""
    lease_fd: int = -1
    """Of a volume: what a reader has open for as long as it has the volume open."""


def new_table() -> int:
    """The fd of an empty table."""
    fd = os.memfd_create("basefs-readers", os.MFD_CLOEXEC)
    os.ftruncate(fd, TABLE_BYTES)
    os.pwrite(fd, MAGIC.to_bytes(8, "little"), 0)
    return fd


class Entry:
    """One image's place in the table, from its listing to `revoke`."""

    def __init__(self, table: "ReaderTable", word: int, serial: int) -> None:
        self._table = table
        self.word = word
        self.serial = serial

    def lost(self) -> None:
        """Something is not ready any more; to be called after `ready` says so, before its bytes change."""
        self._table.words[self.word + GENERATION] += 1

    def revoke(self) -> None:
        """No reader serves the image from here on."""
        self._table.revoke(self.word)


class ReaderTable:
    """The table behind `fd`, which it keeps. `revoked` is called after each revocation."""

    def __init__(self, fd: int) -> None:
        """Raises ValueError if `fd` is no table of ours."""
        if os.fstat(fd).st_size != TABLE_BYTES:
            raise ValueError("it has another size")
        self.fd = fd
        self.words = memoryview(mmap.mmap(fd, TABLE_BYTES)).cast("Q")
        """Words of 8 bytes are stored and read as a whole."""
        if self.words[_MAGIC] != MAGIC:
            raise ValueError("it is of another kind or version")
        self.revoked: Callable[[], None] = _nothing
        self._free: list[int] = []
        self._inherited: dict[int, list[int]] = {}
        for at in range(TABLE_ENTRIES - 1, -1, -1):
            word = TABLE_HEADER_WORDS + at * TABLE_WORDS
            number = self.words[word + NUMBER]
            if number:
                self._inherited.setdefault(number, []).append(word)
            else:
                self._free.append(word)

    def list(self, number: int) -> Entry | None:
        """Let readers serve the image; None when the table is full."""
        if not self._free:
            return None
        word, words = self._free.pop(), self.words
        words[_LAST_SERIAL] += 1
        serial = words[_LAST_SERIAL]
        # The number first: an entry that has a serial and no number could be revoked by nobody.
        words[word + NUMBER] = number
        words[word + SERIAL] = serial
        return Entry(self, word, serial)

    def revoke(self, word: int) -> None:
        """The entry at this word says no from here on, to whoever was told of it."""
        self.words[word + SERIAL] = 0
        self.words[word + NUMBER] = 0
        self._free.append(word)
        self.revoked()

    def revoke_inherited(self, number: int) -> None:
        """As `revoke`, for what an earlier server listed of the image."""
        for word in self._inherited.pop(number, ()):
            self.revoke(word)


def _nothing() -> None:
    """Nobody wants to know."""
