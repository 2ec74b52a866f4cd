"""The raw view of a qcow2 image: its disk, found cluster by cluster in the stored bytes.

Owned by the trio loop. `hit` answers from what is in memory (tables in `Qcow2Memory`, stored bytes by their own `hit`);
`read` brings what is missing: the header, the L1 blocks, the slices of L2 tables, then data and compressed clusters
side by side: four round trips at most, mostly two, for the file's first MiB is here (the gate keeps it).
Tables need no flight of their own: who wants the same one waits for the same chunk, and parsing takes 20 us.
"""

import mmap
from array import array
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry
from basefs.concurrency.gather import gather
from basefs.core.qcow2_header import LAYOUT_HEADER_BYTES, qcow2_layout_of
from basefs.core.qcow2_layout import DATA, PACKED, ZEROS, Extent, Qcow2Layout, Qcow2TableError, table_of
from basefs.views.qcow2_clusters import ClusterReader, ReadLimit
from basefs.views.qcow2_memory import Qcow2Memory
from basefs.views.stored import ByteSource

HIT_BYTES_MAX = 1 << 20
"""The largest read the kernel sends."""
HIT_EXTENTS_MAX = 256
"""A hit of more pieces would hold up the loop for milliseconds; `read` lets others run between them."""
RUN_BYTES_MAX = 1 << 20
"""Tables that are neighbours in the file are read together up to so many bytes."""
_ALL_ZEROS: "array[int]" = array("Q")
"""The table of a slice that is not there."""

# As in `cache/chunk_file.py`: one page-aligned buffer for all answers that are put together; the kernel gets it copied
# before another task runs. Its own, for the stored bytes' `hit` may use the other on the way.
_hit_buffer = memoryview(mmap.mmap(-1, HIT_BYTES_MAX))
_zeros = memoryview(mmap.mmap(-1, HIT_BYTES_MAX)).toreadonly()


class Qcow2View:
    """Shows the disk in `stored`, whose content the gate found to be a qcow2 of `entry.local.shown_size` bytes."""

    def __init__(self, stored: ByteSource, entry: ImageEntry, memory: Qcow2Memory, clusters: ClusterReader) -> None:
        self._stored = stored
        self._stored_hit = stored.hit
        self._entry = entry
        self._number = entry.number
        self._image = memory.of(entry.number)
        self._memory = memory
        self._slices = memory.slices
        self._clusters = clusters
        self._last: tuple[int, Qcow2Layout | None, array[int]] = -1, None, _ALL_ZEROS
        self._missed: tuple[int, int, int, Extent] | None = None
        """The one compressed extent that the last `hit` did not find: generation, offset, end. `read` comes next."""

    @property
    def size(self) -> int:
        """Bytes shown; 0 until the content was checked."""
        return self._entry.local.shown_size or 0

    @property
    def layout(self) -> Qcow2Layout | None:
        """Where tables and clusters are; None until the header was read."""
        return self._image.layout

    def when_forgotten(self, call: Callable[[], None]) -> None:
        """Have `call` called when what was read of the image may have been wrong."""
        self._image.forgotten = call

    def known_extents(self, offset: int) -> list[Extent] | None:
        """Where the cluster of the disk at `offset`, its first byte, is; None when its table is not in memory.

        Raises:
            Qcow2TableError: its entry cannot be.
        """
        layout = self._image.layout
        if layout is None:
            return None
        table = self._slices.get((self._number, offset >> layout.slice_shift))
        if table is None:
            return None
        return _extents(layout, table, offset, min(offset + layout.cluster_bytes, layout.size))

    def hit(self, offset: int, size: int) -> memoryview | bytes | None:
        """See `PreparedImage.hit`."""
        layout = self._image.layout
        if layout is None:
            return None
        end = min(offset + size, layout.size)
        if end <= offset:
            return b""
        if end - offset > HIT_BYTES_MAX or (end - offset) >> layout.cluster_bits > HIT_EXTENTS_MAX:
            return None
        extents: list[Extent] = []
        shift = layout.slice_shift
        try:
            for number in range(offset >> shift, (end - 1 >> shift) + 1):
                last = self._last
                table = last[2] if last[0] == number and last[1] is layout else self._table_of(layout, number)
                if table is None:
                    return None
                if (offset ^ end - 1) >> layout.cluster_bits == 0 and table:
                    host = layout.plain_host(table, offset)
                    if host:
                        return self._stored_hit(host, end - offset)
                begin = max(offset, number << shift)
                extents += _extents(layout, table, begin, min(end, number + 1 << shift))
        except Qcow2TableError:  # `read` says so
            return None
        hit = self._hit_of(extents, end - offset)
        if hit is None and len(extents) == 1 and extents[0].kind == PACKED:
            self._missed = self._image.generation, offset, end, extents[0]
        return hit

    def _table_of(self, layout: Qcow2Layout, number: int) -> "array[int] | None":
        """The slice with this number, if it is in memory. Kept at hand: reads come in neighbourhoods."""
        table = self._slices.get((self._number, number))
        if table is not None:
            self._last = number, layout, table
        return table

    def _hit_of(self, extents: list[Extent], size: int) -> memoryview | bytes | None:
        if len(extents) == 1:
            extent = extents[0]
            if extent.kind == DATA:
                return self._stored_hit(extent.host, size)
            if extent.kind == ZEROS:
                return _zeros[:size]
            cluster = self._memory.clusters.get((self._number, extent.host, extent.packed_length))
            return None if cluster is None else memoryview(cluster)[extent.at : extent.at + size]
        if len(extents) > HIT_EXTENTS_MAX:
            return None
        done = 0
        for extent in extents:
            target = _hit_buffer[done : done + extent.length]
            if extent.kind == DATA:
                if not self._stored.hit_into(extent.host, target):
                    return None
            elif extent.kind == ZEROS:
                target[:] = _zeros[: extent.length]
            else:
                cluster = self._memory.clusters.get((self._number, extent.host, extent.packed_length))
                if cluster is None:
                    return None
                target[:] = memoryview(cluster)[extent.at : extent.at + extent.length]
            done += extent.length
        return _hit_buffer[:size]

    async def read(self, offset: int, size: int, *, deadline_s: float, patient: bool) -> bytes | memoryview:
        """What the disk holds of `[offset, offset + size)`, clipped at its end; see `ImageFetcher.read` for errors.

        The answer is valid until the next await.

        Raises:
            ImageDamagedError: the image's tables or compressed bytes there are none. Other places may be read.
        """
        limit = ReadLimit(until=trio.current_time() + deadline_s, patient=patient)
        try:
            layout = self._image.layout or await self._open(limit)
            end = min(offset + size, layout.size)
            if end <= offset:
                return b""
            missed, self._missed = self._missed, None
            if missed is not None and missed[:3] == (self._image.generation, offset, end):
                return await self._clusters.read_one(self._stored, self._entry, layout, missed[3], limit)
            return await self._fill(layout, await self._map(layout, offset, end, limit), limit)
        except Qcow2TableError as exc:
            raise errors.ImageDamagedError(f"image {self._entry.image_id}: {exc}") from exc

    async def _stored_bytes(self, offset: int, length: int, limit: ReadLimit) -> bytes:
        # A copy: the others that are brought beside it take the same buffer.
        return bytes(await self._stored.read(offset, length, deadline_s=limit.left_s(), patient=limit.patient))

    async def _open(self, limit: ReadLimit) -> Qcow2Layout:
        """The layout, which is kept; from the header, which says what it said when the gate looked at it."""
        image_id, generation = self._entry.image_id, self._image.generation
        if self._entry.local.shown_size is None:
            raise errors.SourceUnavailableError(f"image {image_id}: its content is not checked yet")
        header = await self._stored_bytes(0, min(LAYOUT_HEADER_BYTES, self._stored.size), limit)
        try:
            layout = qcow2_layout_of(header, stored_size=self._stored.size)
        except ValueError as exc:
            raise errors.ImageDamagedError(f"image {image_id}: byte 0: its header: {exc}") from exc
        if layout.size != self._entry.local.shown_size:
            raise errors.ImageDamagedError(
                f"image {image_id}: byte 24: its disk has {layout.size} bytes, and had {self.size} when it was checked"
            )
        if generation == self._image.generation:
            self._image.layout = layout
        return layout

    # --- tables -----------------------------------------------------------------------------------------

    async def _map(self, layout: Qcow2Layout, offset: int, end: int, limit: ReadLimit) -> list[Extent]:
        """Where `[offset, end)` is. Brings the tables that are missing: L1 blocks, then slices."""
        numbers = layout.slices(offset, end)
        tables = {number: self._slices.get((self._number, number)) for number in numbers}
        missing = [number for number, table in tables.items() if table is None]
        if missing:
            tables |= await self._load_slices(layout, missing, limit)
        extents: list[Extent] = []
        for number in numbers:
            table = tables[number]
            assert table is not None, "all slices were loaded"
            begin, until = max(offset, number << layout.slice_shift), min(end, number + 1 << layout.slice_shift)
            extents += _extents(layout, table, begin, until)
        return extents

    async def _load_slices(self, layout: Qcow2Layout, numbers: list[int], limit: ReadLimit) -> dict[int, "array[int]"]:
        """The tables of these slices, which are kept; neighbours in the file are one read."""
        generation, step = self._image.generation, layout.slice_bytes
        blocks = await self._l1_blocks({layout.l1_block(number) for number in numbers}, limit)
        places = [(layout.slice_place(number, blocks[layout.l1_block(number)[0]]), number) for number in numbers]
        loaded = dict.fromkeys(numbers, _ALL_ZEROS)
        runs = _runs(sorted((place, number) for place, number in places if place is not None), step)
        calls = [partial(self._table_bytes, run[0][0], run[-1][0] + step, limit) for run in runs]
        for run, raw in zip(runs, await gather(calls), strict=True):
            for place, number in run:
                start = place - run[0][0]
                loaded[number] = table_of(raw[start : start + step])
        if generation == self._image.generation:
            for number, table in loaded.items():
                self._slices[self._number, number] = table
        return loaded

    async def _l1_blocks(self, places: set[tuple[int, int]], limit: ReadLimit) -> dict[int, "array[int]"]:
        """L1 blocks by their offset in the file, which are kept."""
        generation, kept = self._image.generation, self._memory.l1_blocks
        blocks: dict[int, array[int]] = {}
        missing = []
        for offset, length in places:
            block = kept.get((self._number, offset))
            if block is None:
                missing.append((offset, length))
            else:
                blocks[offset] = block
        raws = await gather([partial(self._table_bytes, offset, offset + length, limit) for offset, length in missing])
        for (offset, _), raw in zip(missing, raws, strict=True):
            blocks[offset] = table_of(raw)
            if generation == self._image.generation:
                kept[self._number, offset] = blocks[offset]
        return blocks

    async def _table_bytes(self, offset: int, end: int, limit: ReadLimit) -> bytes:
        """The file's `[offset, end)`; past its end zeros, as qemu reads a table that the end cuts off."""
        here = max(0, min(end, self._stored.size) - offset)
        return (await self._stored_bytes(offset, here, limit) if here else b"").ljust(end - offset, b"\0")

    # --- bytes ------------------------------------------------------------------------------------------

    async def _fill(self, layout: Qcow2Layout, extents: list[Extent], limit: ReadLimit) -> bytes | memoryview:
        """The bytes of the extents, brought side by side; put together in the buffer of the hits where they fit.

        For its pages: the kernel copies 1 MiB out of them in a tenth of the time (`cache/chunk_file.py`).
        """
        if len(extents) == 1 and extents[0].kind == PACKED:
            return await self._clusters.read_one(self._stored, self._entry, layout, extents[0], limit)
        data = [extent for extent in extents if extent.kind == DATA]
        packed = [extent for extent in extents if extent.kind == PACKED]
        clusters: dict[Extent, bytes] = {}

        async def unpack() -> bytes:
            clusters.update(await self._clusters.read(self._stored, self._entry, layout, packed, limit))
            return b""

        calls: list[Callable[[], Awaitable[bytes]]] = [
            partial(self._stored_bytes, extent.host, extent.length, limit) for extent in data
        ]
        found = iter(await gather([*calls, unpack] if packed else calls))
        if extents == data and len(data) == 1:
            return next(found)
        size = sum(extent.length for extent in extents)
        target = _hit_buffer[:size] if size <= HIT_BYTES_MAX else memoryview(bytearray(size))
        done = 0
        for extent in extents:
            end = done + extent.length
            if extent.kind == DATA:
                target[done:end] = next(found)
            elif extent.kind == ZEROS:
                target[done:end] = _zeros[: extent.length] if extent.length <= HIT_BYTES_MAX else bytes(extent.length)
            else:
                target[done:end] = memoryview(clusters[extent])[extent.at : extent.at + extent.length]
            done = end
        return target


def _extents(layout: Qcow2Layout, table: "array[int]", offset: int, end: int) -> list[Extent]:
    return layout.extents(table, offset, end) if table else [Extent(ZEROS, end - offset)]


def _runs(places: list[tuple[int, int]], step: int) -> list[list[tuple[int, int]]]:
    """Ascending places of pieces of `step` bytes, with those together that touch, up to RUN_BYTES_MAX."""
    runs: list[list[tuple[int, int]]] = []
    for place, number in places:
        if runs and place <= runs[-1][-1][0] + step and place + step - runs[-1][0][0] <= RUN_BYTES_MAX:
            runs[-1].append((place, number))
        else:
            runs.append([(place, number)])
    return runs
