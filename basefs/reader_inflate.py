"""Compressed clusters in a reader: inflated one at a time, and the last ones kept. Stdlib, and zlib-ng if it is there.

Tenants wrote what is inflated here: it takes the memory of a cluster, whatever it says, and whoever makes it take long
is not inflated here again (`Inflater.is_slow`), for everything else waits meanwhile. What does not become a cluster is
the server's to judge.
"""

import importlib
import sys
import time
import zlib
from types import ModuleType

CLUSTERS_BYTES_MAX = 8 << 20
"""Inflated clusters that a reader keeps: a guest that reads on comes to each of 64 KiB several times."""
FAIR_NS = 1_000_000
"""Processor time that an image's clusters may take on average: 64 KiB take 0.15-0.35 ms (by zlib 0.2-0.55), made for it
8. One of a thousand is charged 2.5 ms (a virtual machine's processor is taken away), so one alone says nothing."""
SLOW_NS_MAX = 8_000_000
"""That is counted of one, and what an image may be over its average before it is the server's, which inflates in
threads: three times as much."""
_WINDOW_BITS = -15
"""As in `views/qcow2_inflate`: qemu inflates into the whole cluster at once."""

_thread_time_ns = time.thread_time_ns
_zlib: ModuleType = zlib


def use_zlib_ng(directory: str | None) -> None:
    """Inflate by the zlib_ng that is installed in `directory`, if it is: 10 to 40 % less time, for 0.2 MiB of memory.

    It takes no stream that zlib refuses (DESIGN, "The raw view of qcow2").
    """
    global _zlib
    if not directory:
        return
    # For this import only, and last: the standard library is ours to find first.
    sys.path.append(directory)
    try:
        _zlib = importlib.import_module("zlib_ng.zlib_ng")
    except ImportError:
        pass
    finally:
        sys.path.remove(directory)


class Inflater:
    """The inflated clusters of all images, by an image's serial and the word of the cluster in its map."""

    def __init__(self) -> None:
        self._clusters: dict[tuple[int, int], tuple[int, bytes]] = {}
        """With the generation in which they were read. The one that was used last is the last."""
        self._bytes = 0
        self._over_ns: dict[int, int] = {}
        """Serials of images whose clusters took longer than FAIR_NS lately, and by how much."""

    def kept(self, serial: int, generation: int, word: int) -> bytes | None:
        """The cluster, if it was inflated in this generation of its image, and is here still."""
        key = serial, word
        found = self._clusters.pop(key, None)
        if found is None:
            return None
        if found[0] != generation:
            self._bytes -= len(found[1])
            return None
        self._clusters[key] = found
        return found[1]

    def inflate(self, serial: int, generation: int, word: int, packed: memoryview, cluster_bytes: int) -> None:
        """Keep the cluster that `packed` begins with, if there is one. The caller makes sure that it is the image's."""
        began_ns = _thread_time_ns()
        try:
            cluster = _zlib.decompressobj(_WINDOW_BITS).decompress(packed, cluster_bytes)
        except _zlib.error:
            cluster = b""
        took_ns = min(_thread_time_ns() - began_ns, SLOW_NS_MAX)
        if took_ns > FAIR_NS or serial in self._over_ns:
            over_ns = self._over_ns.pop(serial, 0) + took_ns - FAIR_NS
            if over_ns > 0:
                self._over_ns[serial] = over_ns
        if len(cluster) == cluster_bytes and self.kept(serial, generation, word) is None:
            self._clusters[serial, word] = generation, cluster
            self._bytes += cluster_bytes
            while self._bytes > CLUSTERS_BYTES_MAX:
                self._bytes -= len(self._clusters.pop(next(iter(self._clusters)))[1])

    def is_slow(self, serial: int) -> bool:
        """Whether the image's clusters took too long, so that they are not to be inflated here."""
        return self._over_ns.get(serial, 0) >= 3 * SLOW_NS_MAX

    def forget(self, serial: int) -> None:
        """The image is not served any more."""
        self._over_ns.pop(serial, None)
        for key in [key for key in self._clusters if key[0] == serial]:
            self._bytes -= len(self._clusters.pop(key)[1])
