"""The state database: the catalog with its numbers and what happened to each image here, in sqlite.

Invariants: one connection, one thread at a time; every change is one transaction, so `kill -9` loses at most
the last second of touched local state; a number is stored before anybody sees it, and none is given out twice,
not even when the database had to be begun anew (`numbers_from`).
"""

import dataclasses
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from basefs import errors
from basefs.catalog.records import ImageEntry, ImageRecord, LocalState, Verdict, VerdictState
from basefs.concurrency.threads import BlockingCalls
from basefs.core.names import base_name_of

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FLUSH_INTERVAL_S = 1.0
FLUSH_RETRY_S = 5.0
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE image (
    number INTEGER PRIMARY KEY,
    image_id TEXT NOT NULL UNIQUE,
    record TEXT NOT NULL,
    verdict TEXT NOT NULL DEFAULT 'unchecked',
    reason TEXT,
    local TEXT NOT NULL DEFAULT '{}',
    is_gone INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE value (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
_NEXT_NUMBER = "next_number"
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
"""SQLITE_ERROR: a table or column is not there."""
_RECORD_FIELDS = tuple(field.name for field in dataclasses.fields(ImageRecord))
_LOCAL_FIELDS = tuple(field.name for field in dataclasses.fields(LocalState))


class _DamagedError(Exception):
    """The file is no state database of ours."""


class StateDatabase:
    """`CatalogStore` in one sqlite file. `open`, then `run` in the service nursery, `close` at the end."""

    def __init__(self, path: Path, connection: sqlite3.Connection, entries: list[ImageEntry], next_number: int) -> None:
        self._path = path
        self._db = connection
        self._loaded = entries
        self._next_number = next_number
        self._threads = BlockingCalls("state-db", threads_max=1)
        self._dirty: dict[int, ImageEntry] = {}
        self._is_dirty = trio.Event()
        self._is_failing = False

    @classmethod
    async def open(cls, path: Path, *, numbers_from: int) -> "StateDatabase":
        """The database at `path`, made if it is not there.

        A damaged one, or one of another version, is set aside as `<name>.damaged-<n>` with one WARNING.

        Args:
            path: The file; `-wal` and `-shm` stand beside it.
            numbers_from: Every number up to this one is taken: the highest that the cache directory knows of.

        Raises:
            CacheError: the file cannot be opened or written.
        """
        # A thread that only the start needs, before there is an object to own one.
        return await trio.to_thread.run_sync(cls._open, path, numbers_from)

    async def run(self) -> None:
        """Write what was touched, about once a second. Ends when it is cancelled; `close` writes the rest."""
        while True:
            await self._is_dirty.wait()
            await trio.sleep(FLUSH_INTERVAL_S)
            try:
                await self.flush()
            except errors.CacheError as exc:
                if not self._is_failing:
                    self._is_failing = True
                    log.warning("state of images cannot be stored, trying again: %s", exc)
                await trio.sleep(FLUSH_RETRY_S)
            else:
                if self._is_failing:
                    self._is_failing = False
                    log.info("state of images is stored again")

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
        return await self._run(self._upsert, records, values)

    def touch(self, entry: ImageEntry) -> None:
        """See `CatalogStore`."""
        self._dirty[entry.number] = entry
        self._is_dirty.set()

    async def forget(self, number: int) -> None:
        """See `CatalogStore`."""
        self._dirty.pop(number, None)
        await self._run(self._forget, number)

    async def flush(self) -> None:
        """Write now what was touched.

        Raises:
            CacheError: it was not written; it stays touched.
        """
        dirty, self._dirty = self._dirty, {}
        if self._is_dirty.is_set():
            self._is_dirty = trio.Event()
        rows = [_local_row(entry) for entry in dirty.values()]
        try:
            await self._run(self._update, rows)
        except BaseException:
            for entry in dirty.values():
                self.touch(entry)
            raise

    async def close(self) -> None:
        """Write what was touched and close the file. Never fails: what cannot be written is logged."""
        try:
            await self.flush()
        except errors.CacheError as exc:
            log.warning("state of images was not stored: %s", exc)
        await self._threads.run(self._db.close)

    # --- in a thread ---------------------------------------------------------------------------------

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            return await self._threads.run(fn, *args)
        except sqlite3.Error as exc:
            raise errors.CacheError(f"{self._path}: {exc}") from exc

    def _upsert(self, records: Sequence[ImageRecord], values: Mapping[str, str]) -> dict[str, int]:
        numbers: dict[str, int] = {}
        next_number = self._next_number
        with _transaction(self._db):
            for record in records:
                found = self._db.execute("SELECT number FROM image WHERE image_id = ?", (record.image_id,)).fetchone()
                text = json.dumps({name: getattr(record, name) for name in _RECORD_FIELDS})
                if found is None:
                    number, next_number = next_number, next_number + 1
                    row = (number, record.image_id, text)
                    self._db.execute("INSERT INTO image (number, image_id, record) VALUES (?, ?, ?)", row)
                else:
                    number = found[0]
                    self._db.execute("UPDATE image SET record = ? WHERE number = ?", (text, number))
                numbers[record.image_id] = number
            stored = {**values, _NEXT_NUMBER: str(next_number)}
            self._db.executemany("INSERT OR REPLACE INTO value (key, value) VALUES (?, ?)", stored.items())
        self._next_number = next_number
        return numbers

    def _forget(self, number: int) -> None:
        with _transaction(self._db):
            self._db.execute("DELETE FROM image WHERE number = ?", (number,))

    def _update(self, rows: list[tuple[Any, ...]]) -> None:
        with _transaction(self._db):
            self._db.executemany(
                "UPDATE image SET verdict = ?, reason = ?, local = ?, is_gone = ? WHERE number = ?", rows
            )

    @classmethod
    def _open(cls, path: Path, numbers_from: int) -> "StateDatabase":
        try:
            try:
                return cls._read(path, numbers_from)
            except _DamagedError as exc:
                aside = _set_aside(path)
                log.warning("%s is damaged and was set aside as %s, begun anew: %s", path, aside, exc)
                return cls._read(path, numbers_from)
        except (_DamagedError, sqlite3.Error, OSError) as exc:
            raise errors.CacheError(f"{path}: {exc}") from exc

    @classmethod
    def _read(cls, path: Path, numbers_from: int) -> "StateDatabase":
        """Open and read all.

        Raises:
            _DamagedError: it is no state database of ours.
        """
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            entries = _read_all(db)
            stored = db.execute("SELECT value FROM value WHERE key = ?", (_NEXT_NUMBER,)).fetchone()
            known = [numbers_from + 1, int(stored[0]) if stored else 1, *(entry.number + 1 for entry in entries)]
        except BaseException as exc:
            db.close()
            if _is_damage(exc):
                raise _DamagedError(str(exc)) from exc
            raise
        return cls(path, db, entries, max(known))


def _is_damage(exc: BaseException) -> bool:
    if isinstance(exc, sqlite3.Error):
        # Errors of the Python module itself, such as text that is no UTF-8, have no code.
        return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGE_CODES
    return isinstance(exc, LookupError | ValueError | TypeError | AttributeError)


def _read_all(db: sqlite3.Connection) -> list[ImageEntry]:
    db.execute("PRAGMA journal_mode = WAL")
    # In WAL mode a power cut may take the last transactions, never the file; `numbers_from` covers those.
    db.execute("PRAGMA synchronous = NORMAL")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version == 0 and tables == 0:
        db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
    elif version != SCHEMA_VERSION:
        raise ValueError(f"its version is {version}, ours is {SCHEMA_VERSION}")
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)
    rows = db.execute("SELECT number, image_id, record, verdict, reason, local, is_gone FROM image ORDER BY number")
    return [_entry_of(*row) for row in rows]


def _entry_of(
    number: int, image_id: str, record: str, verdict: VerdictState, reason: str | None, local: str, is_gone: int
) -> ImageEntry:
    fields = json.loads(record)
    if fields["image_id"] != image_id or number <= 0 or verdict not in ("unchecked", "servable", "refused"):
        raise ValueError(f"image {number} is described wrongly")
    return ImageEntry(
        number=number,
        base_name=base_name_of(image_id),
        record=ImageRecord(**{name: fields.get(name) for name in _RECORD_FIELDS}),
        verdict=Verdict(state=verdict, reason=reason),
        local=LocalState(**{name: value for name, value in json.loads(local).items() if name in _LOCAL_FIELDS}),
        is_gone=bool(is_gone),
    )


def _local_row(entry: ImageEntry) -> tuple[Any, ...]:
    local = json.dumps({name: getattr(entry.local, name) for name in _LOCAL_FIELDS})
    return entry.verdict.state, entry.verdict.reason, local, int(entry.is_gone), entry.number


def _set_aside(path: Path) -> Path:
    """Rename the database and what stands beside it; the new name."""
    attempt = 1
    while (aside := path.with_name(f"{path.name}.damaged-{attempt}")).exists():
        attempt += 1
    os.rename(path, aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
