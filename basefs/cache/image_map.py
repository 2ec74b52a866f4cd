"""Where the bytes of an image are: its chunks, gathered into cells so that a map of any image is bounded.

Chunks of zeros are holes in the chunk file (`ChunkFile.write_piece`), so the file system tells which they are. They
count as present where it has no holes; a last chunk that is short may, too.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from basefs import errors
from basefs.cache.chunk_file import data_path, map_path, stored_states, usable_header
from basefs.cache.ledger import CLAIMED, READY, STORED
from basefs.core.chunk_map import ChunkMapHeader

_MISSING, _PRESENT, _ZERO, _FETCHING = 0, 1, 2, 3
_KIND_OF_STATE = bytes(
    _PRESENT if state in (STORED, READY) else _FETCHING if state == CLAIMED else _MISSING for state in range(256)
)
_SLICE = 1 << 18
_IN_A_HOLE = bytes(_ZERO if kind == _PRESENT else kind for kind in range(256))


@dataclass(frozen=True, slots=True)
class CellBytes:
    """Bytes of one cell by where they are; what is left of the cell's length is missing."""

    present: int
    zero: int
    fetching: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCells:
    """An image of `size` bytes in cells of `cell_bytes`, whole chunks each; the last cell may be shorter."""

    size: int
    chunk_bytes: int
    cell_bytes: int
    cells: list[CellBytes]

    def report(self) -> dict[str, Any]:
        """As JSON values: bytes in all, and runs of equal cells, in order of their offsets."""
        totals = {
            "present_bytes": sum(cell.present for cell in self.cells),
            "zero_bytes": sum(cell.zero for cell in self.cells),
            "fetching_bytes": sum(cell.fetching for cell in self.cells),
        }
        return {
            "size": self.size,
            "chunk_bytes": self.chunk_bytes,
            "cell_bytes": self.cell_bytes,
            **totals,
            "missing_bytes": self.size - sum(totals.values()),
            "runs": [
                {
                    "cells": sum(1 for _ in equal),
                    "present_bytes": cell.present,
                    "zero_bytes": cell.zero,
                    "fetching_bytes": cell.fetching,
                }
                for cell, equal in groupby(self.cells)
            ],
        }


def cells_of(states: bytes, data_fd: int | None, *, size: int, chunk_bytes: int, cells_max: int) -> ImageCells:
    """The cells of an image, at most `cells_max` >= 1, from the ledger's states of its chunks (thread).

    `data_fd`: its chunk file, None where there is none.

    Raises:
        OSError: the disk did not tell where the holes are.
    """
    kinds = bytearray(len(states))
    for start in range(0, len(states), _SLICE):
        # At once, it kept the interpreter, and with it the loop, for 30 ms at the 16 million chunks of 1 TiB.
        kinds[start : start + _SLICE] = states[start : start + _SLICE].translate(_KIND_OF_STATE)
    if data_fd is not None:
        for hole in _holes(data_fd, size, chunk_bytes):
            kinds[hole.start : hole.stop] = kinds[hole.start : hole.stop].translate(_IN_A_HOLE)
    chunks_per_cell = max(1, -(-len(kinds) // cells_max))
    short = len(kinds) * chunk_bytes - size
    cells = []
    for start in range(0, len(kinds), chunks_per_cell):
        stop = min(start + chunks_per_cell, len(kinds))
        last = kinds[-1] if stop == len(kinds) else None
        present, zero, fetching = (
            kinds.count(kind, start, stop) * chunk_bytes - (short if last == kind else 0)
            for kind in (_PRESENT, _ZERO, _FETCHING)
        )
        cells.append(CellBytes(present, zero, fetching))
    return ImageCells(size=size, chunk_bytes=chunk_bytes, cell_bytes=chunks_per_cell * chunk_bytes, cells=cells)


def _holes(data_fd: int, size: int, chunk_bytes: int) -> Iterator[range]:
    """The chunks that lie in holes as a whole."""
    position = 0
    while position < size:
        try:
            data = min(os.lseek(data_fd, position, os.SEEK_DATA), size)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            data = size  # no data from here to the end of the file
        first = -(-position // chunk_bytes)
        stop = -(-size // chunk_bytes) if data == size else data // chunk_bytes
        if first < stop:
            yield range(first, stop)
        position = size if data == size else os.lseek(data_fd, data, os.SEEK_HOLE)


def stored_cells(directory: Path, inode: int, wanted: ChunkMapHeader, *, cells_max: int) -> ImageCells:
    """As `cells_of`, of an image that is not prepared, from its files, which are not touched (thread).

    Raises:
        CacheError: the disk did not give them.
    """
    with ExitStack() as opened:

        def fd_of(path: Path) -> int:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            return fd

        header, states, data_fd = wanted, bytearray(wanted.chunks), None
        try:
            try:
                map_fd = fd_of(map_path(directory, inode))
                data_fd = fd_of(data_path(directory, inode))
            except FileNotFoundError:  # nothing is here, or it was removed just now
                data_fd = None
            else:
                header = usable_header(map_fd, wanted) or wanted
                if header is not wanted:
                    states = stored_states(map_fd, header)
            return cells_of(
                bytes(states), data_fd, size=header.size, chunk_bytes=header.chunk_bytes, cells_max=cells_max
            )
        except OSError as exc:
            raise errors.CacheError(f"cache file of {wanted.image_id}: {exc}") from exc
