"""Images in Ceph, as Glance's rbd store keeps them: an RBD image named by the image id, and its snapshot `snap`.

Invariant: no byte is delivered that the snapshot might not have. Once it is removed its objects are read as zeros
where they were deleted, and with other bytes where the image was written since (seen: the OSD answers from its head);
nobody tells us, for a reader without the right to write can watch nothing. The snapshot goes from the header before
that. So what was read counts if the header has the snapshot *after* it was read (`rbd_reads`). Where the snapshot was
allocated nowhere when it was opened (its object map; a snapshot does not change) are zeros without a read.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from basefs import errors
from basefs.concurrency.batched_calls import BatchedCalls
from basefs.concurrency.threads import BlockingCalls
from basefs.config.store_options import RbdSettings
from basefs.core.store_location import rbd_location
from basefs.sources.base import Deliver
from basefs.sources.ceph_cluster import (
    MISSING_LIBRARY,
    CephCalls,
    CephLibrary,
    Cluster,
    ConnectionLostError,
    connected,
    load_library,
)
from basefs.sources.rbd_reads import ConfirmedRead, SnapshotReads
from basefs.sources.rbd_snapshot import Snapshot, open_snapshot
from basefs.sources.store import StoreName

SNAPSHOT = "snap"
"""glance_store/_drivers/rbd.py: DEFAULT_SNAPNAME."""
WINDOW_BYTES = 4 * 1024 * 1024
"""Read ahead of what is delivered, in one call of `fetch_range`."""
CLOSE_LIMIT_S = 3.0
_CONNECT_SLACK_S = 2.0
_SMALL_TRIPS_MAX = 2
"""More than one, for a delivery may wait until the cache has room; more would find fewer calls to take along."""
_OTHER_CLUSTER = "the location is in another Ceph cluster than [rbd] ceph_conf"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    offset: int
    length: int
    read: ConfirmedRead | None
    """None: zeros, without a read."""

    @property
    def is_right(self) -> bool:
        """Whether its bytes are there; a read that failed is told when those before it were delivered."""
        return self.read is None or self.read.is_right


class RbdObject:
    """`StoreObject` of one snapshot. Made by `RbdStore`."""

    def __init__(self, store: "RbdStore", calls: CephCalls, cluster: Cluster, snapshot: Snapshot, what: str) -> None:
        self.size = snapshot.size
        self._store = store
        self._calls = calls
        self._cluster = cluster
        self._snapshot = snapshot
        self._what = what
        self._is_closed = False
        self._reads = SnapshotReads(calls, snapshot)
        self._zeros = b""

    async def fetch_range(self, *, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        """See `StoreObject`. Cancellation: at once, but for what is being delivered."""
        what = f"{self._what}, bytes {offset} to {offset + length - 1}"
        end = offset + length
        spans = ((start, min(piece_bytes, end - start)) for start in range(offset, end, piece_bytes))
        try:
            await self._fetch(what, spans, deliver)
        except ConnectionLostError:
            self._cluster.is_usable = False
            raise

    async def _fetch(self, what: str, spans: Iterator[tuple[int, int]], deliver: Deliver) -> None:
        ahead: deque[_Piece] = deque()
        ahead_bytes = 0
        span = next(spans, None)
        while span is not None or ahead:
            while span is not None and ahead_bytes < WINDOW_BYTES:
                ahead.append(self._begin(what, *span))
                ahead_bytes += span[1]
                span = next(spans, None)
            batch = await self._next_batch(ahead, what)
            ahead_bytes -= sum(len(data) for _offset, data in batch)
            # A lone piece is a small read: those that wait now go to a thread together.
            door = self._store.small_deliveries if len(batch) == 1 and not ahead else self._store.deliveries
            if not await door.run(_deliver_all, batch, deliver):
                return

    def _begin(self, what: str, offset: int, length: int) -> _Piece:
        if self._snapshot.is_hole(offset, length):
            return _Piece(offset=offset, length=length, read=None)
        self._store.requests += 1
        return _Piece(offset=offset, length=length, read=self._reads.begin(what, offset, length))

    async def _next_batch(self, ahead: deque[_Piece], what: str) -> list[tuple[int, bytes]]:
        """The first piece, and those after it that are there, too; taken off `ahead`. Waits for the first one only."""
        batch: list[tuple[int, bytes]] = []
        while ahead and (not batch or ahead[0].is_right):
            piece = ahead[0]
            if piece.read is None:
                data = self._zeros_of(piece.length)
            else:
                data = await piece.read.wait(what)
                self._store.received_bytes += len(data)
            ahead.popleft()
            batch.append((piece.offset, data))
        return batch

    def _zeros_of(self, length: int) -> bytes:
        if len(self._zeros) != length:
            self._zeros = bytes(length)
        return self._zeros

    async def close(self) -> None:
        """See `StoreObject`. Bounded: a cluster that does not answer has it closed later, by its own time-outs."""
        if not self._is_closed:
            self._is_closed = True
            self._reads.close()
            await self._calls.give_back(CLOSE_LIMIT_S, self._snapshot.image.close)


def _deliver_all(batch: list[tuple[int, bytes]], deliver: Deliver) -> bool:
    for offset, data in batch:
        trio.from_thread.check_cancelled()
        if not deliver(offset, memoryview(data)):
            return False
    return True


class RbdStore:
    """`Store` over one Ceph cluster, which is connected to when it is first needed."""

    name: StoreName = "rbd"

    def __init__(self, settings: RbdSettings, *, threads_max: int, library: CephLibrary | None = None) -> None:
        """`threads_max`: calls of `fetch_range` that deliver at a time. `library`: None, what this machine has."""
        self.requests = 0
        self.received_bytes = 0
        self.deliveries = BlockingCalls("rbd", threads_max=threads_max)
        self.small_deliveries = BatchedCalls("rbd-small", trips_max=_SMALL_TRIPS_MAX)
        """Both for the objects."""
        self._settings = settings
        self._library = library or load_library()
        self.missing = None if self._library else MISSING_LIBRARY
        self._calls = CephCalls(self._library) if self._library else None
        self._connecting = trio.Lock()
        self._clusters: list[Cluster] = []
        """The last one is used; what is open on one that was lost keeps it until the end."""

    @property
    def _cluster(self) -> Cluster | None:
        return self._clusters[-1] if self._clusters and self._clusters[-1].is_usable else None

    def refusal(self, image_id: str, location: str) -> str | None:
        """See `Store`."""
        if self.missing is not None:
            return self.missing
        try:
            found = rbd_location(location)
        except ValueError as exc:
            return f"the location is not one of Glance's rbd store: {exc}"
        if self._cluster is not None and found.fsid != self._cluster.fsid:
            return _OTHER_CLUSTER
        if found.pool not in self._settings.pools:
            return "the location's pool is not in [rbd] pools"
        if found.image != image_id or found.snapshot != SNAPSHOT:
            return f"the location is not the snapshot `{SNAPSHOT}` of an RBD image with the image's id as its name"
        return None

    async def open(self, location: str, *, image_id: str, size: int) -> RbdObject:
        """See `Store`. Cancellation: at any time; a call that hangs is left behind in its thread."""
        found = rbd_location(location)
        what = f"image {image_id} in Ceph"
        cluster = await self._connected()
        if found.fsid != cluster.fsid:
            raise errors.SourceForbiddenError(f"{what}: {_OTHER_CLUSTER}")
        assert self._library is not None
        assert self._calls is not None
        try:
            snapshot = await self._calls.make(
                self._open_limit_s, what, _close_snapshot, open_snapshot, self._library, cluster, found
            )
        except ConnectionLostError:
            cluster.is_usable = False
            raise
        opened = RbdObject(self, self._calls, cluster, snapshot, what)
        if snapshot.size != size:
            await opened.close()
            raise errors.SourceCorruptError(f"{what}: it has {snapshot.size} bytes, the image's metadata say {size}")
        return opened

    @property
    def _open_limit_s(self) -> float:
        """Opening takes several requests; when one is late, so are the others."""
        return 2.0 * self._settings.op_timeout_s

    async def _connected(self) -> Cluster:
        if self._library is None or self._calls is None:
            raise errors.SourceForbiddenError(MISSING_LIBRARY)
        async with self._connecting:
            if self._cluster is None:
                limit_s = self._settings.connect_timeout_s + _CONNECT_SLACK_S
                made = await self._calls.make(limit_s, "Ceph", Cluster.close, connected, self._library, self._settings)
                self._clusters.append(made)
            assert self._cluster is not None
            return self._cluster

    async def close(self) -> None:
        """See `Store`. Bounded; never cancelled."""
        clusters, self._clusters = self._clusters, []
        if self._calls is not None:
            for cluster in clusters:
                await self._calls.give_back(CLOSE_LIMIT_S, cluster.close)


def _close_snapshot(snapshot: Snapshot) -> None:
    snapshot.image.close()
