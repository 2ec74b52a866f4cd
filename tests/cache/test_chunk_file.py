"""The chunk file against damage: whatever a crash or a power cut leaves, no wrong byte is taken for a right one."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basefs import errors
from basefs.cache.chunk_file import ChunkFile, data_path, map_path, open_chunk_file
from basefs.core.chunk_map import ChunkMapHeader

CHUNK = 16 * 1024
SIZE = 9 * CHUNK + 777
HEADER = ChunkMapHeader(image_id="an-image", size=SIZE, chunk_bytes=CHUNK)
INODE = 2**32 + 3
SECTOR = 512


def image_of(seed: int) -> bytes:
    rng = random.Random(seed)
    return b"".join(bytes(CHUNK) if rng.random() < 0.3 else rng.randbytes(CHUNK) for _ in range(10))[:SIZE]


def chunk_of(image: bytes, index: int) -> bytes:
    return image[index * CHUNK : (index + 1) * CHUNK]


def write(file: ChunkFile, image: bytes, first: int, last: int) -> None:
    file.write_piece(first * CHUNK, image[first * CHUNK : (last + 1) * CHUNK])


def contents(directory: Path) -> tuple[bytes, bytes]:
    return tuple(
        path.read_bytes() if path.exists() else b""
        for path in (data_path(directory, INODE), map_path(directory, INODE))
    )  # type: ignore[return-value]


def mixed(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """What a disk may hold when some sectors of the unsynced writes reached it and some did not."""
    length = rng.choice([len(old), len(new), rng.randint(min(len(old), len(new)), max(len(old), len(new)))])
    old, new = old.ljust(length, b"\0"), new.ljust(length, b"\0")
    share = rng.random()
    return b"".join((new if rng.random() < share else old)[at : at + SECTOR] for at in range(0, length, SECTOR))[
        :length
    ]


def check_no_wrong_byte(directory: Path, image: bytes) -> int:
    file, states = open_chunk_file(directory, INODE, HEADER)
    try:
        assert len(states) == HEADER.chunks
        good = 0
        for index in range(HEADER.chunks):
            assert not file.is_ready(index), "nothing is ready before it was verified"
            assert file.hit(index * CHUNK, 10) is None
            if states[index]:
                (data,) = file.verify(index, 1)
                assert data is None or data == chunk_of(image, index)
                good += data is not None
        return good
    finally:
        file.close()


ranges = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: (min(pair), max(pair))), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), before=ranges, after=ranges, removed_between=st.booleans())
def test_a_power_cut_at_any_moment_leaves_no_wrong_byte(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    before: list[tuple[int, int]],
    after: list[tuple[int, int]],
    removed_between: bool,
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    rng, image = random.Random(seed), image_of(seed)
    file, _ = open_chunk_file(directory, INODE, HEADER)
    for first, last in before:
        write(file, image, first, last)
    if removed_between:
        file.clear(range(0, HEADER.chunks, 2))
    old = contents(directory)
    for first, last in after:
        write(file, image, first, last)
    file.close()
    new = contents(directory)
    for path, was, is_now in zip((data_path, map_path), old, new, strict=True):
        path(directory, INODE).write_bytes(mixed(was, is_now, rng))
    check_no_wrong_byte(directory, image)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=6000), seed=st.integers(0, 1000))
def test_garbage_for_a_map_is_begun_anew(tmp_path_factory: pytest.TempPathFactory, data: bytes, seed: int) -> None:
    directory = tmp_path_factory.mktemp("garbage")
    map_path(directory, INODE).write_bytes(data)
    data_path(directory, INODE).write_bytes(random.Random(seed).randbytes(3 * CHUNK))
    assert check_no_wrong_byte(directory, image_of(seed)) == 0


def test_what_was_written_is_there_after_a_clean_end(tmp_path: Path) -> None:
    image = image_of(1)
    file, states = open_chunk_file(tmp_path, INODE, HEADER)
    assert not any(states)
    write(file, image, 0, 9)
    file.close()
    assert check_no_wrong_byte(tmp_path, image) == HEADER.chunks


def test_bytes_of_the_data_file_without_a_map_do_not_count(tmp_path: Path) -> None:
    image = image_of(2)
    file, _ = open_chunk_file(tmp_path, INODE, HEADER)
    write(file, image, 0, 9)
    file.close()
    map_path(tmp_path, INODE).unlink()
    assert check_no_wrong_byte(tmp_path, image) == 0


def test_bytes_and_checksums_of_another_image_below_a_header_of_ours_do_not_count(tmp_path: Path) -> None:
    """What a power cut leaves where a map was begun anew and the old sectors came back."""
    file, _ = open_chunk_file(tmp_path, INODE, replace(HEADER, image_id="another"))
    write(file, image_of(6), 0, 9)
    file.close()
    with map_path(tmp_path, INODE).open("r+b") as chunk_map:
        chunk_map.write(HEADER.pack())
    assert check_no_wrong_byte(tmp_path, image_of(7)) == 0


def test_a_chunk_size_of_an_earlier_configuration_is_kept(tmp_path: Path) -> None:
    image = image_of(3)
    file, _ = open_chunk_file(tmp_path, INODE, HEADER)
    write(file, image, 0, 9)
    file.close()
    other = ChunkMapHeader(image_id="an-image", size=SIZE, chunk_bytes=4 * CHUNK)
    file, states = open_chunk_file(tmp_path, INODE, other)
    assert file.header.chunk_bytes == CHUNK
    assert all(states)
    file.close()


@pytest.mark.mount
def test_a_full_disk_is_an_error_of_the_cache_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    import subprocess

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(tmp_path)], check=True)
    try:
        file, _ = open_chunk_file(tmp_path, INODE, HEADER)
        image = random.Random(5).randbytes(SIZE)
        with pytest.raises(errors.CacheError, match="No space"):
            write(file, image, 0, 9)
        file.close()
        (tmp_path / "ballast").write_bytes(b"")
        os.truncate(data_path(tmp_path, INODE), 0)
        with (tmp_path / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space"):
            ballast.write(bytes(1 << 20))
        with pytest.raises(errors.CacheError, match="No space"):
            open_chunk_file(tmp_path, INODE + 1, HEADER)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
