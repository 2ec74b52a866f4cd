"""The cells of an image against a model that looks at each chunk, over real files."""

import os
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs import errors
from basefs.cache.chunk_file import data_path, map_path, open_chunk_file
from basefs.cache.image_map import CellBytes, cells_of, stored_cells
from basefs.cache.ledger import CLAIMED, EVICTING, MISSING, READY, STORED
from basefs.core.chunk_map import ChunkMapHeader
from tests.cache.conftest import CHUNK, IMAGE_ID, Fetchers
from tests.cache.memory_source import MemorySource

KINDS = ("missing", "present", "zero", "fetching", "evicting")
STATES = {"missing": MISSING, "fetching": CLAIMED, "evicting": EVICTING}
INODE = 42


def model(kinds: list[str], size: int, per_cell: int) -> list[CellBytes]:
    cells = []
    for start in range(0, len(kinds), per_cell):
        sums = dict.fromkeys(KINDS, 0)
        for index in range(start, min(start + per_cell, len(kinds))):
            sums[kinds[index]] += min(CHUNK, size - index * CHUNK)
        cells.append(CellBytes(sums["present"], sums["zero"], sums["fetching"]))
    return cells


@settings(deadline=None, max_examples=150)
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=40),
    last=st.integers(1, CHUNK),
    cells_max=st.integers(1, 50),
    stored=st.sampled_from([STORED, READY]),
)
def test_the_cells_say_where_each_byte_is(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], last: int, cells_max: int, stored: int
) -> None:
    if kinds and kinds[-1] == "zero":
        last = CHUNK  # a shorter one may have blocks, and counts as present then
    size = (len(kinds) - 1) * CHUNK + last if kinds else 0
    directory = tmp_path_factory.mktemp("map")
    header = ChunkMapHeader(image_id=IMAGE_ID, size=size, chunk_bytes=CHUNK)
    file, _ = open_chunk_file(directory, INODE, header)
    for index, kind in enumerate(kinds):
        if kind in ("present", "zero"):
            fill = b"\xff" if kind == "present" else b"\0"
            file.write_piece(index * CHUNK, fill * header.chunk_length(index))
    states = bytes(STATES.get(kind, stored) for kind in kinds)
    got = cells_of(states, file.data_fd, size=size, chunk_bytes=CHUNK, cells_max=cells_max)
    file.close()
    assert len(got.cells) <= cells_max
    assert got.cells == model(kinds, size, got.cell_bytes // CHUNK)
    report = got.report()
    assert sum(run["cells"] for run in report["runs"]) == len(got.cells)
    assert sum(report[f"{kind}_bytes"] for kind in ("present", "zero", "fetching", "missing")) == size
    on_disk = stored_cells(directory, INODE, header, cells_max=cells_max)
    here = [kind if kind in ("present", "zero") else "missing" for kind in kinds]
    assert on_disk.cells == model(here, size, on_disk.cell_bytes // CHUNK)


def test_of_an_image_with_nothing_here_everything_is_missing_and_nothing_is_made(tmp_path: Path) -> None:
    header = ChunkMapHeader(image_id=IMAGE_ID, size=10 * CHUNK, chunk_bytes=CHUNK)
    report = stored_cells(tmp_path, INODE, header, cells_max=4).report()
    assert (report["missing_bytes"], report["cell_bytes"]) == (10 * CHUNK, 3 * CHUNK)
    assert os.listdir(tmp_path) == []


def test_a_map_of_another_image_counts_for_nothing(tmp_path: Path) -> None:
    other = ChunkMapHeader(image_id="another", size=10 * CHUNK, chunk_bytes=CHUNK)
    file, _ = open_chunk_file(tmp_path, INODE, other)
    file.write_piece(0, b"x" * CHUNK)
    file.close()
    header = ChunkMapHeader(image_id=IMAGE_ID, size=10 * CHUNK, chunk_bytes=CHUNK)
    assert stored_cells(tmp_path, INODE, header, cells_max=4).report()["missing_bytes"] == 10 * CHUNK


def test_the_chunks_of_an_earlier_chunk_size_are_shown_as_they_are(tmp_path: Path) -> None:
    file, _ = open_chunk_file(tmp_path, INODE, ChunkMapHeader(image_id=IMAGE_ID, size=8 * CHUNK, chunk_bytes=CHUNK))
    file.write_piece(CHUNK, b"x" * CHUNK)
    file.close()
    now = ChunkMapHeader(image_id=IMAGE_ID, size=8 * CHUNK, chunk_bytes=4 * CHUNK)
    report = stored_cells(tmp_path, INODE, now, cells_max=100).report()
    assert (report["chunk_bytes"], report["present_bytes"]) == (CHUNK, CHUNK)


def test_files_that_cannot_be_read_are_an_error_that_names_the_image(tmp_path: Path) -> None:
    map_path(tmp_path, INODE).mkdir()
    data_path(tmp_path, INODE).touch()
    header = ChunkMapHeader(image_id=IMAGE_ID, size=CHUNK, chunk_bytes=CHUNK)
    with pytest.raises(errors.CacheError, match=IMAGE_ID):
        stored_cells(tmp_path, INODE, header, cells_max=4)


async def test_a_prepared_image_tells_what_is_here_and_what_is_under_way(fetchers: Fetchers) -> None:
    image = b"\1" * CHUNK + bytes(CHUNK) + b"\2" * (198 * CHUNK)
    source = MemorySource({IMAGE_ID: image}, hold=trio.Event())
    async with fetchers(source) as fetcher, trio.open_nursery() as nursery:
        await fetcher.store_header(image[: 2 * CHUNK])
        nursery.start_soon(partial(fetcher.read, 4 * CHUNK, CHUNK, deadline_s=60, patient=False))
        await trio.testing.wait_all_tasks_blocked()
        ((_, offset, length),) = source.calls
        cells = (await fetcher.cells(200)).cells
        source.hold.set()
    fetched = range(offset // CHUNK, (offset + length) // CHUNK)
    assert 4 in fetched
    assert cells[:2] == [CellBytes(CHUNK, 0, 0), CellBytes(0, CHUNK, 0)]
    assert [index for index, cell in enumerate(cells) if cell == CellBytes(0, 0, CHUNK)] == list(fetched)
    assert {cell for index, cell in enumerate(cells) if index > 1 and index not in fetched} == {CellBytes(0, 0, 0)}
