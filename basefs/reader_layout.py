"""What reader processes share with their keeper and their server: places in memory, and messages. Stdlib only.

**Slots** (a memfd a reader, made by the keeper): a page of counters, then SLOTS places for one raw request each. A
slot whose request has a `unique` other than 0 is taken: its request was not handed on or answered yet, as far as the
reader came. The next reader on the same clone of /dev/fuse goes on with it.

**Table** (a memfd for all readers, made by the first server, left with the keeper): one entry an image that readers
may serve, of four words: image number (0: free), serial, generation, nothing. An entry says yes as long as it has the
serial that the reader was told. The generation grows after something that was ready is not ready any more, and before
its bytes change. Behind the entries are cells with what readers answer to GETATTR of an image.
"""

import struct

LAYOUT = 2
"""The number of all that stands here, raised when any of it changes: readers and servers say theirs to the keeper."""

PAGE = 4096
SLOTS = 64
SLOT_BYTES = (1 << 20) + 4 * PAGE
"""The largest request: a write of 1 MiB (FUSE_MAX_MAX_PAGES of libfuse) and its headers."""
SLOTS_BYTES = PAGE + SLOTS * SLOT_BYTES
HITS, HIT_BYTES, FORWARDED, ATTRIBUTES, TABLE_WORDS = 0, 1, 2, 3, 4
"""The counters' words, which only the reader writes, and the words of an entry of the table."""

TABLE_HEADER_WORDS = 8
TABLE_ENTRIES = 16_384
NUMBER, SERIAL, GENERATION = range(3)

CELLS = 4096
CELL_BYTES = 128
CELLS_AT = (8 * (TABLE_HEADER_WORDS + TABLE_ENTRIES * TABLE_WORDS) + PAGE - 1) // PAGE * PAGE
TABLE_BYTES = CELLS_AT + CELLS * CELL_BYTES
CELL = struct.Struct("<Q104sI")
"""An image's inode (0: nothing), the `fuse_attr_out`, and the CRC-32 of both. An image's cell is the one at its inode
modulo CELLS: of two images with the same one the server answers for that which was asked about longer ago."""
ATTRIBUTES_BYTES = 104

MESSAGE = struct.Struct("<IIQQQQQ")
"""Server to reader: kind, log2 of the chunk size, inode, word of the entry, serial, bytes shown, log2 of the size of
a cluster (0: what is stored is shown as it is)."""
TABLE, IMAGE, SWEEP, FILE, CLOSE, VOLUME = 1, 2, 3, 4, 5, 6
"""With the table's fd; with the fds of an image's bytes, of its `ready` unless it is a whole file, and of its cluster
map if it has clusters; close what was revoked; with the fd of an open lower file, whose handle is in the place of the
inode; close that one; as IMAGE of a whole file, with a lease before the fd of the bytes, which is closed after it. A
handle on a lower file is never used again, so nobody reads through it once it was released."""

KEPT = struct.Struct("<I")
"""The first that a reader says on a connection: how many requests follow that were in its slots before it. One of them
may have been handed on by its predecessor, none after them: what the kernel resends may have the same `unique`."""

UNKNOWN, ZEROS, PACKED = 0, 1, 1 << 63
"""What the cluster map says of a cluster of the disk that is shown: ask the server; zeros; or with PACKED, where its
deflate stream is in the image's bytes (`packed_word`). Any other word is where the cluster is in them as it is."""
PACKED_CLUSTER_BITS_MAX = 16
"""Larger clusters are the server's: to inflate one would hold up everything else that a reader does."""
_PACKED_HOST_BITS = 43
_PACKED_HOST_MAX = (1 << _PACKED_HOST_BITS) - 1
_SECTOR = 512
PACKED_BYTES_MAX = (1 << PACKED_CLUSTER_BITS_MAX) + _SECTOR
"""The longest stream that `packed_word` tells of, and a byte."""
MAP_BYTES_MAX = 16 << 20
"""Of a larger map (a disk of 128 GiB at the default cluster size) there is none, and the server answers all."""

READY = 1
"""The value of `ready` that a reader serves; any other is for the server (cache/chunk_file.py)."""
HIT_BYTES_MAX = 1 << 20
"""The largest read that a reader answers."""


def packed_word(host: int, length: int, cluster_bits: int) -> int:
    """The word of a cluster whose deflate stream begins at byte `host` and ends within `length` bytes; or UNKNOWN.

    It is UNKNOWN for what is not inflated by readers: large clusters, a place beyond 8 TiB, and a stream that is
    longer than the cluster, as qemu writes none; a reader would take the longer for it the longer it is.
    """
    if cluster_bits > PACKED_CLUSTER_BITS_MAX or not 0 <= host <= _PACKED_HOST_MAX:
        return UNKNOWN
    # What an L2 entry says ends with a sector.
    return PACKED | length << _PACKED_HOST_BITS | host if 0 < length < (1 << cluster_bits) + _SECTOR else UNKNOWN


def packed_place(word: int, cluster_bits: int) -> tuple[int, int]:
    """Host and length in a word with PACKED; a length of 0 where it is none that `packed_word` makes."""
    host, length = word & _PACKED_HOST_MAX, (word ^ PACKED) >> _PACKED_HOST_BITS
    return host, length if packed_word(host, length, cluster_bits) == word else 0
