"""What the first bytes of a qcow2 file say of its backing file (docs/interop/qcow2.txt of qemu).

Anybody may have written the file: whatever it holds, the answer is a backing file's name or none, or ValueError.
"""

import re
import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
HEADER_BYTES = 72
"""Of version 2; later versions begin with the same fields."""
VERSION_MIN, VERSION_MAX = 2, 3
CLUSTER_BITS_MIN, CLUSTER_BITS_MAX = 9, 21
NAME_BYTES_MAX = 1023
"""qemu's own limit."""

# magic, version, backing_file_offset, backing_file_size, cluster_bits
_HEADER = struct.Struct(">4sIQII")
_BASE_NAME = re.compile(rb"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class BackingName:
    """Where in the file the backing file's name is: 0 < `length` <= NAME_BYTES_MAX."""

    offset: int
    length: int


def backing_name(header: bytes) -> BackingName | None:
    """Where the name of the backing file is; None where the file is no qcow2 or has no backing file.

    Raises:
        ValueError: it says that it is qcow2, and cannot be.
    """
    if not header.startswith(MAGIC):
        return None
    if len(header) < HEADER_BYTES:
        raise ValueError("shorter than its header")
    _, version, offset, length, cluster_bits = _HEADER.unpack_from(header)
    if not VERSION_MIN <= version <= VERSION_MAX:
        raise ValueError(f"version {version}")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ValueError(f"clusters of 2**{cluster_bits} bytes")
    if not offset:
        return None
    if not 0 < length <= NAME_BYTES_MAX or not HEADER_BYTES <= offset <= (1 << cluster_bits) - length:
        raise ValueError(f"a backing file's name of {length} bytes at {offset}")
    return BackingName(offset, length)


def base_names_in(name: bytes) -> set[str]:
    """The names of nova's bases in a backing file's name: its last component, or anywhere in a `json:` description.

    The `<sha1>_<digits>` of old novas counts as `<sha1>`.
    """
    text = name if name.startswith(b"json:") else name.rsplit(b"/", 1)[-1]
    return {found.decode() for found in _BASE_NAME.findall(text)}
