"""Reads of a snapshot that count: the header had the snapshot after they were read.

Invariant: a question for the snapshot begins after the end of every read that it answers for. One is under way at a
time and answers for all reads that ended before it. It is begun in the library's thread, where the read or the question
before it ended, and who waits is woken when both are over: a read is one trip to the loop, and those that one question
answers for share it.
"""

import contextlib
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import outcome
import trio

from basefs import errors
from basefs.sources.ceph_cluster import CephCalls, error_of_code
from basefs.sources.rbd_snapshot import Snapshot

_ANSWER_BYTES_MAX = 4096


class ConfirmedRead:
    """One read, and the header's word for it. Who does not `wait` for it misses nothing."""

    __slots__ = ("_calls", "_length", "code", "data", "done", "failure", "header_code")

    def __init__(self, calls: CephCalls, length: int) -> None:
        self._calls = calls
        self._length = length
        self.done = trio.Event()
        self.code = 0
        self.header_code = 0
        self.data: bytes = b""
        self.failure: BaseException | None = None
        """Why the header was not asked."""

    @property
    def is_whole(self) -> bool:
        """Whether its bytes have come, confirmed or not."""
        return self.code >= 0 and len(self.data) == self._length

    @property
    def is_right(self) -> bool:
        """Whether its bytes have come and count."""
        return self.done.is_set() and self.is_whole and self.header_code >= 0 and self.failure is None

    async def wait(self, what: str) -> bytes:
        """What was read. Cancellation: at any time.

        Raises:
            StoreGoneError: also when the header does not have the snapshot any more.
            SourceForbiddenError, SourceUnavailableError: as the library's code means.
            SourceCorruptError: not all of it was read.
        """
        await self.done.wait()
        if self.code < 0:
            raise error_of_code(-self.code, what)
        if not self.is_whole:
            raise errors.SourceCorruptError(f"{what}: librbd read {len(self.data)} bytes instead of {self._length}")
        if self.failure is not None:
            raise self._calls.translated(self.failure, f"{what}: its snapshot") from self.failure
        if self.header_code < 0:
            raise error_of_code(-self.header_code, f"{what}: its snapshot")
        return self.data


class SnapshotReads:
    """The reads of one snapshot. Made in the loop; `_lock` guards what the library's threads share."""

    def __init__(self, calls: CephCalls, snapshot: Snapshot) -> None:
        self._calls = calls
        self._snapshot = snapshot
        self._wanted = struct.pack("<Q", snapshot.snapshot_id)
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._unasked: list[ConfirmedRead] = []
        self._is_asking = False
        self._is_closed = False
        self._ended: deque[ConfirmedRead] = deque()
        self._is_loop_told = False

    def begin(self, what: str, offset: int, length: int) -> ConfirmedRead:
        """A read that has begun. Raises as `ConfirmedRead.wait`."""
        read = ConfirmedRead(self._calls, length)

        def ended(completion: Any, data: bytes | None) -> None:  # noqa: ANN401  librbd has no types
            read.code, read.data = completion.get_return_value(), data or b""
            if read.is_whole:
                self._ask_for(read)
            else:
                self._wake([read])

        try:
            self._snapshot.image.aio_read(offset, length, ended)
        except self._calls.errors as exc:
            raise self._calls.translated(exc, what) from exc
        return read

    def close(self) -> None:
        """The header is asked no more: nobody waits for a read that ends from now on."""
        with self._lock:
            self._is_closed = True

    # -- in threads of the library

    def _ask_for(self, read: ConfirmedRead) -> None:
        with self._lock:
            self._unasked.append(read)
            if self._is_asking or self._is_closed:
                return
            self._is_asking = True
        self._ask()

    def _ask(self) -> None:
        """Begin a question for all reads that ended; the next one at its end."""
        while True:
            with self._lock:
                asked, self._unasked = self._unasked, []
                if not asked or self._is_closed:
                    self._is_asking = False
                    return
            # What it raises is raised again by who waits, in the loop: here nobody would hear it.
            begun = outcome.capture(self._begin_question, asked)
            if isinstance(begun, outcome.Value):
                return
            for read in asked:
                read.failure = begun.error
            self._wake(asked)

    def _begin_question(self, asked: Sequence[ConfirmedRead]) -> None:
        def answered(completion: Any, _name: bytes | None) -> None:  # noqa: ANN401  librados has no types
            code = completion.get_return_value()
            for read in asked:
                read.header_code = code
            self._wake(asked)
            self._ask()

        snapshot = self._snapshot
        snapshot.pool.aio_execute(
            snapshot.header, "rbd", "get_snapshot_name", self._wanted, _ANSWER_BYTES_MAX, answered
        )

    def _wake(self, reads: Sequence[ConfirmedRead]) -> None:
        """Have the loop wake who waits for these. Without a lock: what is not seen by a trip makes another one."""
        self._ended.extend(reads)
        if not self._is_loop_told:
            self._is_loop_told = True
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake_now)

    def _wake_now(self) -> None:
        self._is_loop_told = False
        while self._ended:
            self._ended.popleft().done.set()
