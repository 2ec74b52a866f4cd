"""The attributes of images that readers tell the kernel: cells in the table, which only the server writes. Stdlib only.

There is no lock between the two: a cell that is read while it is written fits its checksum no more, in whatever order a
processor shows the stores of another, and the request is handed on.
"""

import zlib

from basefs.reader_layout import ATTRIBUTES_BYTES, CELL, CELL_BYTES, CELLS, CELLS_AT

_CRC_AT = 8 + ATTRIBUTES_BYTES


class AttributeCells:
    """The cells in the memory of a table, as bytes."""

    def __init__(self, table: memoryview) -> None:
        self._table = table.cast("B")

    def get(self, inode: int) -> bytes | None:
        """The `fuse_attr_out` of the image with this inode; None: the server answers."""
        at = _place(inode)
        cell = bytes(self._table[at : at + CELL.size])
        found, attributes, checksum = CELL.unpack(cell)
        return attributes if found == inode and zlib.crc32(cell[:_CRC_AT]) == checksum else None

    def put(self, inode: int, attributes: bytes) -> None:
        """Have readers answer with these from here on."""
        at = _place(inode)
        cell = CELL.pack(inode, attributes, 0)
        self._table[at : at + CELL.size] = CELL.pack(inode, attributes, zlib.crc32(cell[:_CRC_AT]))

    def clear(self, inode: int) -> None:
        """Have the server answer for this inode from here on."""
        if self.has(inode):
            at = _place(inode)
            self._table[at : at + CELL.size] = bytes(CELL.size)

    def has(self, inode: int) -> bool:
        """Whether readers answer for this inode, as far as its server knows."""
        at = _place(inode)
        return int.from_bytes(self._table[at : at + 8], "little") == inode

    def inodes(self) -> list[int]:
        """All that readers answer for, whichever server told them."""
        words = self._table[CELLS_AT : CELLS_AT + CELLS * CELL_BYTES].cast("Q")
        return [inode for inode in words[:: CELL_BYTES // 8].tolist() if inode]


def _place(inode: int) -> int:
    return CELLS_AT + inode % CELLS * CELL_BYTES
