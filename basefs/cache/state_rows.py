"""The state database's tables: schema, rows, and what is a damaged file. Blocking functions over a connection."""

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from basefs.catalog.records import ImageEntry, ImageRecord, LocalState, Verdict, VerdictState
from basefs.core.link_record import LinkRecord
from basefs.core.names import base_name_of

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
NEXT_NUMBER = "next_number"
GENERATION = "generation"
"""The value that counts transactions: of two copies of the database the one with more is the newer."""
_MODE_AT = 18
_NO_WAL = b"\1\1"
_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
"""SQLITE_ERROR: a table or column is not there."""
RECORD_FIELDS = tuple(field.name for field in dataclasses.fields(ImageRecord))
_LOCAL_FIELDS = tuple(field.name for field in dataclasses.fields(LocalState))
_LINK_FIELDS = tuple(field.name for field in dataclasses.fields(LinkRecord))


Statements = list[tuple[str, Sequence[Sequence[Any]]]]
"""SQL and the rows to run it with, for executemany: one transaction."""


class DamagedError(Exception):
    """The file is no state database of ours."""


def is_damage(exc: BaseException) -> bool:
    """Whether the error says that the file is no state database of ours."""
    if isinstance(exc, sqlite3.Error):
        # Errors of the Python module itself, such as text that is no UTF-8, have no code.
        return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGE_CODES
    return isinstance(exc, LookupError | ValueError | TypeError | AttributeError | RecursionError)


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables where there are none, and check all of what is there.

    Raises:
        sqlite3.Error, ValueError: see `is_damage`.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version == 0 and tables == 0:
        db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
    elif version != SCHEMA_VERSION:
        raise ValueError(f"its version is {version}, ours is {SCHEMA_VERSION}")
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)


def read_entries(db: sqlite3.Connection) -> list[ImageEntry]:
    """All images, by number."""
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
        record=ImageRecord(**{name: fields.get(name) for name in RECORD_FIELDS}),
        verdict=Verdict(state=verdict, reason=reason),
        local=_local_of(json.loads(local)),
        is_gone=bool(is_gone),
    )


def _local_of(fields: dict[str, Any]) -> LocalState:
    local = LocalState(**{name: value for name, value in fields.items() if name in _LOCAL_FIELDS})
    local.locations = tuple(map(str, local.locations))
    if (link := fields.get("link")) is not None:
        known = {name: value for name, value in link.items() if name in _LINK_FIELDS}
        local.link = LinkRecord(**known | {"attachments_before": tuple(known.get("attachments_before", ()))})
    return local


def local_row(entry: ImageEntry) -> tuple[Any, ...]:
    """What UPDATE_LOCAL takes."""
    fields = {name: getattr(entry.local, name) for name in _LOCAL_FIELDS}
    if entry.local.link is not None:
        fields["link"] = dataclasses.asdict(entry.local.link)
    local = json.dumps(fields)
    return entry.verdict.state, entry.verdict.reason, local, int(entry.is_gone), entry.number


def in_memory(content: bytes) -> sqlite3.Connection:
    """A database in memory with what `Connection.serialize` gave. sqlite3.Error: it is none."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        # A copy of a file in WAL mode says that it is one, and nothing in memory can be opened as such.
        db.deserialize(content[:_MODE_AT] + _NO_WAL + content[_MODE_AT + len(_NO_WAL) :])
    except BaseException:
        db.close()
        raise
    return db


def read_value(db: sqlite3.Connection, key: str, default: int) -> int:
    """A value that is a number."""
    found = db.execute("SELECT value FROM value WHERE key = ?", (key,)).fetchone()
    return int(found[0]) if found else default


def run_statements(db: sqlite3.Connection, statements: Statements) -> None:
    """All of them, or nothing."""
    with transaction(db):
        for sql, rows in statements:
            db.executemany(sql, rows)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
