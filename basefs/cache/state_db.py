"""The state database: the catalog with its numbers and what happened to each image here, in sqlite.

Three copies. The one in memory is what is asked and changed. Each change goes to the file in the same call, before
anybody hears of it, so `kill -9` loses nothing that was `stored`. A third is in escrow, in memory that outlives the
server: the next one begins with it where the file cannot be read in time, or is behind.

Invariants: one change at a time, in memory and then in the file; a file that failed or was too slow is behind, and
only a whole copy brings it up to date; a number is in the file or in escrow before anybody sees it, and none is given
out twice, not even when the database had to be begun anew (`numbers_from`).
"""

import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.cache import state_copy, state_rows
from basefs.cache.state_copy import StateCopy
from basefs.cache.state_file import StateFile
from basefs.cache.state_rows import GENERATION, NEXT_NUMBER, RECORD_FIELDS, DamagedError, Statements
from basefs.catalog.records import ImageEntry, ImageRecord
from basefs.concurrency.threads import BlockingCalls
from basefs.core.escrow import Escrow, HeldFd

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FLUSH_INTERVAL_S = 1.0
STORE_WAIT_S = 1.0
"""What a change waits for the file; utime(2) and open(2) on the mount wait with it."""
OPEN_WAIT_S = 2.0
COPY_INTERVAL_S = 1.0
"""For what nobody waits for. A copy of 1,000 images takes a thread 1-2 ms."""
COPY_RETRY_S = 5.0

_VALUE = "INSERT OR REPLACE INTO value (key, value) VALUES (?, ?)"
_LOCAL = "UPDATE image SET verdict = ?, reason = ?, local = ?, is_gone = ? WHERE number = ?"
_RECORD = (
    "INSERT INTO image (number, image_id, record) VALUES (?, ?, ?) "
    "ON CONFLICT (number) DO UPDATE SET record = excluded.record"
)


class StateDatabase:
    """`CatalogStore` in one sqlite file. `open`, then `run` in the service nursery, `close` at the end."""

    def __init__(
        self,
        file: StateFile,
        copy: sqlite3.Connection,
        entries: list[ImageEntry],
        next_number: int,
        escrow: Escrow | None,
    ) -> None:
        self._file = file
        self._db = copy
        self._loaded = entries
        self._next_number = next_number
        self._generation = state_rows.read_value(copy, GENERATION, 0)
        self._threads = BlockingCalls("state-db", threads_max=1)
        self._copy = StateCopy(copy, lambda: self._generation, self._threads, escrow)
        self._file_turn = trio.CapacityLimiter(1)
        self._changing = trio.Lock()
        self._dirty: dict[int, ImageEntry] = {}
        self._is_dirty = trio.Event()
        self.touched: Callable[[ImageEntry], None] = _nothing
        """Called in the step in which an entry is noted to have changed."""
        self._changed = trio.Event()
        self._changed.set()
        self._is_behind = False

    @classmethod
    async def open(
        cls, path: Path, *, numbers_from: int, held: HeldFd | None = None, escrow: Escrow | None = None
    ) -> "StateDatabase":
        """The database at `path`, made if it is not there.

        A damaged one, or one of another version, is set aside as `<name>.damaged-<n>` with one WARNING.

        Args:
            path: The file; `-wal` stands beside it.
            numbers_from: Every number up to this one is taken: the highest that the cache directory knows of.
            held: What a server before this one left in escrow, used where it is newer than the file, or the file
                cannot be read within OPEN_WAIT_S. Its fd is ours.
            escrow: Where a copy is left.

        Raises:
            CacheError: the file cannot be opened or written, and nothing is held.
        """
        file = StateFile(path)
        kept = None if held is None else await trio.to_thread.run_sync(state_copy.read_held, held)
        problem = ""
        try:
            with trio.fail_after(OPEN_WAIT_S if kept else float("inf")):
                # Abandoned in a thread that hangs with the disk, it changes nothing but the file's journal.
                copy, entries = await trio.to_thread.run_sync(file.read, abandon_on_cancel=True)
            if kept is not None and _generation(kept[0]) > _generation(copy):
                (copy, entries), problem = kept, "is older than what the keeper kept"
        except (DamagedError, sqlite3.Error, OSError, trio.TooSlowError) as exc:
            if kept is None:
                raise errors.CacheError(f"{path}: {exc}") from exc
            problem = f"cannot be read: {exc}" if str(exc) else f"was not read within {OPEN_WAIT_S:g} s"
            file.abandon()
            file, (copy, entries) = StateFile(path), kept
        next_number = state_rows.read_value(copy, NEXT_NUMBER, 1)
        numbers = (numbers_from + 1, next_number, *(entry.number + 1 for entry in entries))
        database = cls(file, copy, entries, max(numbers), escrow)
        if problem:
            database._fell_behind(f"{path} {problem}")
        return database

    async def run(self) -> None:
        """Write what was touched, about once a second, and keep the copies up to date. Ends when it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_copies)
            while True:
                await self._is_dirty.wait()
                await trio.sleep(FLUSH_INTERVAL_S)
                await self.flush()

    # --- CatalogStore --------------------------------------------------------------------------------

    async def load(self) -> list[ImageEntry]:
        """See `CatalogStore`. What `open` has read; once."""
        entries, self._loaded = self._loaded, []
        return entries

    async def values(self) -> Mapping[str, str]:
        """See `CatalogStore`."""
        return await self._run(lambda: dict(self._db.execute("SELECT key, value FROM value")))

    async def upsert(self, records: Sequence[ImageRecord], values: Mapping[str, str]) -> Mapping[str, int]:
        """See `CatalogStore`."""
        async with self._changing:
            known = await self._run(self._numbers_of, records)
            numbers, next_number = dict(known), self._next_number
            for record in records:
                if record.image_id not in numbers:
                    numbers[record.image_id], next_number = next_number, next_number + 1
            rows = [(numbers[record.image_id], record.image_id, _record_text(record)) for record in records]
            stored = {**values, NEXT_NUMBER: str(next_number)}
            self._next_number = next_number
            await self._change([(_RECORD, rows), (_VALUE, list(stored.items()))])
            # The file may be lost to the next server, and a number must not be given to another image then.
            if len(known) < len(numbers):
                await self._copy.leave()
        return numbers

    def touch(self, entry: ImageEntry) -> None:
        """See `CatalogStore`."""
        self._dirty[entry.number] = entry
        self._is_dirty.set()
        self.touched(entry)

    async def stored(self, entry: ImageEntry) -> None:
        """Return when what changed of the entry's verdict or local state outlives this server; see `flush`."""
        self.touch(entry)
        await self.flush()
        await self._copy.leave()

    async def forget(self, number: int) -> None:
        """See `CatalogStore`."""
        self._dirty.pop(number, None)
        async with self._changing:
            await self._change([("DELETE FROM image WHERE number = ?", [(number,)])])

    async def flush(self) -> None:
        """Write now what was touched: a kill does not lose it then. Waits STORE_WAIT_S for a disk at most."""
        async with self._changing:
            dirty, self._dirty = self._dirty, {}
            if self._is_dirty.is_set():
                self._is_dirty = trio.Event()
            if not dirty:
                return
            try:
                await self._change([(_LOCAL, [state_rows.local_row(entry) for entry in dirty.values()])])
            except BaseException:
                for entry in dirty.values():
                    self.touch(entry)
                raise

    async def close(self) -> None:
        """Write what was touched and close the file. Never fails: what cannot be written is logged."""
        await self.flush()
        if self._is_behind:
            with trio.move_on_after(STORE_WAIT_S):
                await self._catch_up()
        await self._copy.leave()
        with trio.move_on_after(STORE_WAIT_S):
            await self._in_file(self._file.close)
        await self._threads.run(self._db.close)

    # --- one change ----------------------------------------------------------------------------------

    async def _change(self, statements: Statements) -> None:
        """In memory, then in the file. The caller has the lock."""
        generation = self._generation + 1
        statements = [*statements, (_VALUE, [(GENERATION, str(generation))])]
        await self._run(state_rows.run_statements, self._db, statements)
        self._generation = generation
        if not self._is_behind:
            is_written = False
            try:
                with trio.fail_after(STORE_WAIT_S):
                    await self._in_file(self._file.apply, statements)
                is_written = True
            except (sqlite3.Error, trio.TooSlowError) as exc:
                self._fell_behind(f"{self._file.path}: {str(exc) or f'no answer within {STORE_WAIT_S:g} s'}")
            finally:
                # Cancelled, it may have been written or not.
                self._is_behind = self._is_behind or not is_written
        if self._is_behind:
            await self._copy.leave()
        self._changed.set()

    async def _in_file(self, fn: Callable[[*Ts], None], *args: *Ts) -> None:
        """`fn(*args)` on the file, when those before it have ended.

        A caller that waited long enough leaves a thread that hangs with the disk behind: whatever that does to the
        file later, a whole copy follows (`_is_behind`).
        """
        await trio.to_thread.run_sync(fn, *args, limiter=self._file_turn, abandon_on_cancel=True)

    def _fell_behind(self, why: str) -> None:
        self._is_behind = True
        log.warning("state of images cannot be stored on the disk, trying again: %s", why)

    # --- the copies ----------------------------------------------------------------------------------

    async def _keep_copies(self) -> None:
        """Ends when it is cancelled."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self._copy.leave()
            await trio.sleep(COPY_RETRY_S if self._is_behind else COPY_INTERVAL_S)
            if self._is_behind:
                await self._catch_up()

    async def _catch_up(self) -> None:
        """Bring the file up to date as a whole; it stays behind if that fails."""
        async with self._changing:
            generation, content = self._generation, await self._run(self._db.serialize)
        try:
            await self._in_file(self._file.replace, content)
        except (sqlite3.Error, OSError) as exc:
            log.debug("state of images is not stored yet: %s", exc)
        else:
            self._is_behind = generation != self._generation
            if not self._is_behind:
                log.info("state of images is stored on the disk again")
        if self._is_behind:
            self._changed.set()

    # --- in a thread ---------------------------------------------------------------------------------

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self._threads.run(fn, *args)
        except sqlite3.Error as exc:
            raise errors.CacheError(f"state database: {exc}") from exc

    def _numbers_of(self, records: Sequence[ImageRecord]) -> dict[str, int]:
        found = (
            self._db.execute("SELECT image_id, number FROM image WHERE image_id = ?", (record.image_id,)).fetchone()
            for record in records
        )
        return {row[0]: row[1] for row in found if row is not None}


def _record_text(record: ImageRecord) -> str:
    return json.dumps({name: getattr(record, name) for name in RECORD_FIELDS})


def _generation(db: sqlite3.Connection) -> int:
    return state_rows.read_value(db, GENERATION, 0)


def _nothing(_entry: ImageEntry) -> None:
    """Nobody wants to know."""
