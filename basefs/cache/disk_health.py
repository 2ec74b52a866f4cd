"""Whether the cache disk takes bytes: one state for the whole cache, and one probe that finds out when it does again.

While it does not, bytes are served from memory. A disk that somebody else filled may be helped by eviction first.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

DISK_RETRY_S = 10.0
"""After the cache disk refused a byte, bytes go round it for so long before it is tried again."""
TOLD_AGAIN_S = 300.0
"""A disk that fails and heals again and again is told once in so long."""
PROBE_BYTES = 64 * 1024
PROBE_NAME = "probe"


class DiskHealth:
    """The cache disk's state. Owned by the trio loop."""

    def __init__(self, chunks_dir: Path, nursery: trio.Nursery, disk: BlockingCalls) -> None:
        self._probe_path = chunks_dir / PROBE_NAME
        self._nursery = nursery
        self._disk = disk
        self._told = ConditionLog(log, repeat_s=TOLD_AGAIN_S, clock=trio.current_time)
        self._was_told = False
        self.relieve: Callable[[], Awaitable[bool]] | None = None
        """What may help a full disk, and whether it did; the evictor, once it runs."""
        self.reason: str | None = None
        """Why nothing is stored now; None while the disk works."""

    @property
    def is_usable(self) -> bool:
        """Whether bytes may be written to the cache disk."""
        return self.reason is None

    def failed(self, error: errors.CacheError) -> None:
        """The disk failed: bytes go round it until a probe says that it works again."""
        if self.reason is None:
            self.reason = str(error)
            self._was_told = self._told.begins("disk", logging.WARNING, "serving round the cache: %s", error)
            self._nursery.start_soon(self._heal, _is_full(error))

    async def _heal(self, is_full: bool) -> None:
        """Ends when the disk works; cancelled with the service."""
        while True:
            if not (is_full and self.relieve is not None and await self.relieve()):
                await trio.sleep(DISK_RETRY_S)
            try:
                await self._disk.run(_probe, self._probe_path)
            except OSError as exc:
                self.reason = f"cache disk: {exc}"
                is_full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            else:
                break
        self.reason = None
        if self._was_told:
            log.info("the cache disk takes bytes again")


def _is_full(error: errors.CacheError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _probe(path: Path) -> None:
    """Write to the disk and have it say that it has the bytes (thread)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, os.urandom(PROBE_BYTES))
        os.fdatasync(fd)
    finally:
        os.close(fd)
        path.unlink()
