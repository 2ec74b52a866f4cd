"""The format of `<inode>.map`: its bytes are pinned; whoever changes them raises VERSION."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.chunk_map import PAGE, SUMS_OFFSET, VERSION, ChunkMapHeader, checksum, parse_header

PINNED = ChunkMapHeader(image_id="3f8d6a70-0000-4000-8000-123456789abc", size=3 * 2**30 + 17, chunk_bytes=65536)

headers = st.builds(
    ChunkMapHeader,
    image_id=st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=192),
    size=st.integers(1, 2**62),
    chunk_bytes=st.integers(12, 24).map(lambda exp: 1 << exp),
)


def test_the_bytes_of_the_header_are_pinned() -> None:
    digest = hashlib.sha256(PINNED.pack()).hexdigest()
    assert (VERSION, digest) == (2, "c0aa7e9c54c260e4d27e84025b3884a799c7adab8f5d9aac4086a58dc7ef8d7a"), (
        "the format changed: raise VERSION and pin the new bytes"
    )


def test_the_geometry_is_pinned() -> None:
    assert (PINNED.chunks, SUMS_OFFSET) == (49153, 4096)
    assert PINNED.map_bytes == SUMS_OFFSET + 8 * 49153
    assert PINNED.chunk_length(49152) == 17


def test_the_checksum_is_pinned_and_never_zero() -> None:
    assert checksum(b"", 0) == 0x2D06800538D394C2
    assert (PINNED.seed(), checksum(b"", PINNED.seed())) == (0x5C94857FCA13A8CD, 0x6CEED2495A6A3C63)
    assert checksum(bytes(65536), PINNED.seed()) != 0


@given(headers)
def test_a_header_is_read_as_it_was_written(header: ChunkMapHeader) -> None:
    assert len(header.pack()) == PAGE
    assert parse_header(header.pack()) == header


@given(headers, st.integers(0, 223), st.integers(1, 255))
def test_a_changed_byte_is_noticed(header: ChunkMapHeader, at: int, flip: int) -> None:
    page = bytearray(header.pack())
    page[at] ^= flip
    with pytest.raises(ValueError, match=r"checksum|chunk map|version"):
        parse_header(bytes(page))


@given(st.binary(max_size=8192))
def test_any_bytes_are_refused_or_a_header(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_header(data)


def test_the_checksums_of_another_image_or_geometry_fit_no_bytes() -> None:
    changes: list[dict[str, Any]] = [{"image_id": "another"}, {"size": PINNED.size + 1}, {"chunk_bytes": 1 << 17}]
    others = [replace(PINNED, **change) for change in changes]
    data = bytes(65536)
    assert len({checksum(data, header.seed()) for header in [PINNED, *others]}) == 4


def test_an_image_id_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="192"):
        ChunkMapHeader(image_id="x" * 193, size=1, chunk_bytes=4096).pack()
