"""The file `<inode>.map`: which chunks of an image are here, and their checksums. Format version 2.

    0      header, 4096 bytes: HEADER below, then zeros
    4096   `sums`, one little-endian u64 a chunk: xxh3-64 of the chunk's bytes, 0 = the chunk is absent

The checksums are seeded with the header, so those of another image's map, which a power cut may leave below a
header of ours, fit no bytes. `tests/core/test_chunk_map.py` pins the bytes: whoever changes them raises VERSION.
"""

import struct
from dataclasses import dataclass

import xxhash

MAGIC = b"basefsmp"
VERSION = 2
PAGE = 4096
SUMS_OFFSET = PAGE
SUM_BYTES = 8

# magic, version, chunk_bytes, image size, length of the image id, image id; then xxh3-64 of all that
_HEADER = struct.Struct("<8sIIQI192s")
_SUM = struct.Struct("<Q")
IMAGE_ID_BYTES_MAX = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMapHeader:
    """What a map is for, and where its parts are. `chunk_bytes` is a power of two."""

    image_id: str
    size: int
    chunk_bytes: int

    @property
    def chunks(self) -> int:
        """How many chunks the image has; the last may be shorter."""
        return -(-self.size // self.chunk_bytes)

    @property
    def map_bytes(self) -> int:
        """Size of the map file."""
        return SUMS_OFFSET + SUM_BYTES * self.chunks

    def chunk_length(self, index: int) -> int:
        """Bytes in chunk `index`, 0 <= index < chunks."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)

    def pack(self) -> bytes:
        """The header page.

        Raises:
            ValueError: the image id is longer than IMAGE_ID_BYTES_MAX bytes.
        """
        body = self._body()
        return (body + _SUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE, b"\0")

    def seed(self) -> int:
        """What the checksums of this map's chunks begin with; another for every image and geometry."""
        return xxhash.xxh3_64_intdigest(self._body())

    def _body(self) -> bytes:
        name = self.image_id.encode("utf-8")
        if len(name) > IMAGE_ID_BYTES_MAX:
            raise ValueError(f"image id of {len(name)} bytes; {IMAGE_ID_BYTES_MAX} at most")
        return _HEADER.pack(MAGIC, VERSION, self.chunk_bytes, self.size, len(name), name)


def parse_header(page: bytes) -> ChunkMapHeader:
    """The header in the first page of a map file.

    Raises:
        ValueError: no map of this version, or damaged; the message says which.
    """
    if len(page) < _HEADER.size + _SUM.size:
        raise ValueError("shorter than its header")
    body = page[: _HEADER.size]
    magic, version, chunk_bytes, size, name_length, name = _HEADER.unpack(body)
    if magic != MAGIC:
        raise ValueError("not a chunk map")
    if _SUM.unpack_from(page, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(body):
        raise ValueError("header checksum is wrong")
    if version != VERSION:
        raise ValueError(f"format version {version}, this basefs knows {VERSION}")
    if chunk_bytes <= 0 or chunk_bytes & (chunk_bytes - 1) or name_length > IMAGE_ID_BYTES_MAX:
        raise ValueError("impossible geometry")
    return ChunkMapHeader(image_id=name[:name_length].decode("utf-8"), size=size, chunk_bytes=chunk_bytes)


def checksum(data: bytes | memoryview, seed: int) -> int:
    """The checksum of a chunk: xxh3-64, never 0, because 0 in the map says that the chunk is absent."""
    return xxhash.xxh3_64_intdigest(data, seed) or 1
