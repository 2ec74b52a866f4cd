"""The copy of the state database with the keeper: in memory that outlives the server, where the next one begins."""

import logging
import os
import sqlite3
from collections.abc import Callable

import trio

from basefs.cache import state_rows
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.core.escrow import Escrow, HeldFd

log = logging.getLogger(__name__)

KEY = "state"


class StateCopy:
    """Leaves copies of `db`, whose transactions `generation` counts; `threads` has its turn on it."""

    def __init__(
        self, db: sqlite3.Connection, generation: Callable[[], int], threads: BlockingCalls, escrow: Escrow | None
    ) -> None:
        self._db = db
        self._generation = generation
        self._threads = threads
        self._escrow = escrow
        self._copying = trio.Lock()
        self._copied = -1

    async def leave(self) -> None:
        """What is in the database now is in escrow; those who want that at the same time share one copy."""
        wanted = self._generation()
        async with self._copying:
            if self._escrow is None or self._copied >= wanted:
                return
            copied = self._generation()
            try:
                fd = await self._threads.run(_memory_file, self._db)
            except OSError as exc:
                log.warning("no copy of the state of images can be left with the keeper: %s", exc)
                return
            try:
                await self._escrow.hold(KEY, "", fd)
            finally:
                os.close(fd)
            self._copied = copied


def read_held(held: HeldFd) -> tuple[sqlite3.Connection, list[ImageEntry]] | None:
    """What was left in escrow (thread); None if it cannot be read."""
    try:
        content = os.pread(held.fd, os.fstat(held.fd).st_size, 0)
    finally:
        os.close(held.fd)
    try:
        copy = state_rows.in_memory(content)
        state_rows.prepare(copy)
        return copy, state_rows.read_entries(copy)
    except (sqlite3.Error, LookupError, ValueError, TypeError, AttributeError) as exc:
        log.warning("the state of images that the keeper kept is damaged: %s", exc)
        return None


def _memory_file(db: sqlite3.Connection) -> int:
    content = db.serialize()
    fd = os.memfd_create("basefs-state", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, len(content))
        view = memoryview(content)
        while view:
            view = view[os.pwrite(fd, view, len(content) - len(view)) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
