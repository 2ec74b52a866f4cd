"""Compressed clusters of qcow2 images: read, inflated in threads, each once however many want it, and kept for a while.

Owned by the trio loop. A cluster that is on its way belongs to the reader that was first; others wait for it, and look
again themselves when that reader gave up or failed: so none waits longer, or less, than it would alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.concurrency.gather import gather
from basefs.concurrency.short_calls import ShortCalls
from basefs.core.qcow2_layout import Extent, Qcow2Layout
from basefs.views.qcow2_inflate import inflate
from basefs.views.qcow2_memory import ClusterKey, Qcow2Memory
from basefs.views.stored import ByteSource

THREADS_MAX = min(4, len(os.sched_getaffinity(0)))
"""qemu has 4. More than there are processors would only be woken more often."""
BATCH_BYTES_MIN = 128 * 1024
"""Inflated bytes a thread is woken for: 128 KiB take about 0.5 ms, the way to a thread and back 0.05 ms."""
READ_BYTES_MAX = 1 << 20
"""Neighbours in the file are read together up to so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimit:
    """How long a reader waits (trio's clock), and whether it also waits through a refusal; see `ImageFetcher.read`."""

    until: float
    patient: bool

    def left_s(self) -> float:
        """Seconds, >= 0."""
        return max(0.0, self.until - trio.current_time())


class ClusterReader:
    """Reads compressed clusters of all images into `memory`."""

    def __init__(self, memory: Qcow2Memory) -> None:
        self._memory = memory
        self._threads = ShortCalls("inflate", threads_max=THREADS_MAX)
        self._on_their_way: dict[ClusterKey, trio.Event] = {}

    async def read(
        self, stored: ByteSource, entry: ImageEntry, layout: Qcow2Layout, extents: Sequence[Extent], limit: ReadLimit
    ) -> dict[Extent, bytes]:
        """The whole cluster of each of the PACKED `extents`.

        Raises:
            ImageDamagedError: compressed bytes are none, or not of one cluster.
            BasefsError: see `ImageFetcher.read`.
        """
        wanted = {extent: (entry.number, extent.host, extent.packed_length) for extent in extents}
        found: dict[ClusterKey, bytes] = {}
        while missing := {key for key in wanted.values() if key not in found}:
            for key in list(missing):
                cluster = self._memory.clusters.get(key)
                if cluster is not None:
                    found[key] = cluster
                    missing.remove(key)
            ours = sorted(key for key in missing if key not in self._on_their_way)
            if ours:
                found |= await self._bring(stored, entry, layout, ours, limit)
            elif missing:
                with trio.move_on_at(limit.until):
                    await self._on_their_way[missing.pop()].wait()
                    continue
                raise errors.DeadlineExceededError(f"image {entry.image_id}: a cluster was not inflated in time")
        return {extent: found[key] for extent, key in wanted.items()}

    async def read_one(
        self, stored: ByteSource, entry: ImageEntry, layout: Qcow2Layout, extent: Extent, limit: ReadLimit
    ) -> memoryview:
        """The bytes of one PACKED extent, which is what most reads want; see `read`."""
        key = entry.number, extent.host, extent.packed_length
        cluster = self._memory.clusters.get(key)
        if cluster is None:
            if key in self._on_their_way:
                cluster = (await self.read(stored, entry, layout, [extent], limit))[extent]
            else:
                cluster = (await self._bring(stored, entry, layout, [key], limit))[key]
        return memoryview(cluster)[extent.at : extent.at + extent.length]

    async def _bring(
        self, stored: ByteSource, entry: ImageEntry, layout: Qcow2Layout, keys: list[ClusterKey], limit: ReadLimit
    ) -> dict[ClusterKey, bytes]:
        """Read and inflate them; they are kept unless the image was forgotten meanwhile."""
        image = self._memory.of(entry.number)
        generation = image.generation
        done = trio.Event()
        self._on_their_way |= dict.fromkeys(keys, done)
        packed: list[tuple[int, bytes | memoryview]]
        try:
            if len(keys) == 1:  # what most reads want
                _, host, length = keys[0]
                packed = [(host, await _stored_bytes(stored, host, length, limit))]
            else:
                packed = await self._packed(stored, keys, limit)
            batch = max(1, BATCH_BYTES_MIN // layout.cluster_bytes, -(-len(keys) // THREADS_MAX))
            calls = [
                partial(self._threads.run, _inflated, entry.image_id, layout, packed[at : at + batch])
                for at in range(0, len(keys), batch)
            ]
            inflated = [cluster for part in await gather(calls) for cluster in part]
            brought = dict(zip(keys, inflated, strict=True))
            if generation == image.generation:
                for key, cluster in brought.items():
                    self._memory.clusters[key] = cluster
            return brought
        finally:
            for key in keys:
                del self._on_their_way[key]
            done.set()

    async def _packed(
        self, stored: ByteSource, keys: list[ClusterKey], limit: ReadLimit
    ) -> list[tuple[int, bytes | memoryview]]:
        """Offset and compressed bytes of each of `keys`, which ascend; what touches in the file is one read."""
        runs: list[list[ClusterKey]] = []
        end = 0
        for key in keys:
            _, host, length = key
            if runs and host <= end and host + length - runs[-1][0][1] <= READ_BYTES_MAX:
                runs[-1].append(key)
                end = max(end, host + length)
            else:
                runs.append([key])
                end = host + length
        places = [(run[0][1], max(host + length for _, host, length in run)) for run in runs]
        raws = await gather([partial(_stored_bytes, stored, start, end - start, limit) for start, end in places])
        packed: list[tuple[int, bytes | memoryview]] = []
        for run, (start, _), raw in zip(runs, places, raws, strict=True):
            view = memoryview(raw)
            packed += [(host, view[host - start : host - start + length]) for _, host, length in run]
        return packed


async def _stored_bytes(stored: ByteSource, offset: int, length: int, limit: ReadLimit) -> bytes:
    # What is at hand costs a tenth of a read, with its deadline and its wait; the copy stays valid over an await.
    hit = stored.hit(offset, length)
    if hit is not None:
        return bytes(hit)
    return bytes(await stored.read(offset, length, deadline_s=limit.left_s(), patient=limit.patient))


def _inflated(image_id: str, layout: Qcow2Layout, packed: list[tuple[int, bytes | memoryview]]) -> list[bytes]:
    """In a thread."""
    clusters = []
    for host, raw in packed:
        try:
            clusters.append(inflate(raw, layout.cluster_bytes, layout.compression))
        except ValueError as exc:
            raise errors.ImageDamagedError(f"image {image_id}: the compressed cluster at byte {host}: {exc}") from exc
    return clusters
