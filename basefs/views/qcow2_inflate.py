"""Compressed clusters of qcow2, inflated as qemu does (block/qcow2-threads.c): the cluster, or an error. In threads."""

import sys
import zlib
from typing import Literal

from zlib_ng import zlib_ng

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_ZLIB_WINDOW_BITS = -15
"""Raw deflate. What qemu writes has a window of 4 KiB; reading, it inflates into the whole cluster at once, so it takes
every distance that does not go back beyond the cluster's beginning. We inflate by the piece, which takes the window."""
_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 27}
"""qemu's limit (zstd's own default). Such a frame costs address space; what is written is a cluster."""


def inflate(packed: bytes | memoryview, cluster_bytes: int, compression: Literal["zlib", "zstd"]) -> bytes:
    """Exactly `cluster_bytes`. What follows the stream in `packed` is ignored: its end is known to a sector only.

    As in qemu, a deflate stream may go on after the cluster, a zstd frame may not; a cluster may be several frames.

    Raises:
        ValueError: the bytes are no such stream, or hold less than a cluster (zstd: or more).
    """
    try:
        data = _inflate_zlib(packed, cluster_bytes) if compression == "zlib" else _inflate_zstd(packed, cluster_bytes)
    except (zlib.error, zstd.ZstdError) as exc:
        raise ValueError(str(exc)) from exc
    if len(data) != cluster_bytes:
        raise ValueError(f"{len(data)} bytes instead of {cluster_bytes}")
    return data


def _inflate_zlib(packed: bytes | memoryview, cluster_bytes: int) -> bytes:
    """zlib-ng is up to twice as fast; what it does not make a cluster of is zlib's to decide, which qemu uses.

    It takes no stream that zlib refuses (DESIGN, "The raw view of qcow2 images"), but refuses some that zlib takes.
    """
    try:
        data = zlib_ng.decompressobj(_ZLIB_WINDOW_BITS).decompress(packed, cluster_bytes)
        if len(data) == cluster_bytes:
            return data
    except zlib_ng.error:  # type: ignore[misc]  # its stub has an instance for the class
        pass
    return zlib.decompressobj(_ZLIB_WINDOW_BITS).decompress(packed, cluster_bytes)


def _inflate_zstd(packed: bytes | memoryview, cluster_bytes: int) -> bytes:
    data = b""
    while packed and len(data) < cluster_bytes:
        frame = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
        data += frame.decompress(packed, cluster_bytes - len(data))
        if not frame.eof:
            if len(data) == cluster_bytes:
                raise ValueError(f"more than {cluster_bytes} bytes")
            break
        packed = frame.unused_data
    return data
