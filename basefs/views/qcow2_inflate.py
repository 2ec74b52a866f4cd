"""Compressed clusters of qcow2, inflated as qemu does (block/qcow2-threads.c): the cluster, or an error. In threads."""

import sys
import zlib
from typing import Literal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_ZLIB_WINDOW_BITS = -12
"""Raw deflate with a window of 4 KiB."""
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
