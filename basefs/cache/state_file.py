"""The state database on the disk: a copy that is brought up to date by transactions, or as a whole.

Blocking functions, called one at a time; each may hang as long as the disk does.
"""

import logging
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from basefs.cache import state_rows
from basefs.cache.state_rows import DamagedError, Statements
from basefs.catalog.records import ImageEntry

log = logging.getLogger(__name__)

_SQLITE_WAIT_S = 0.5
"""For a lock that somebody else has on the file, such as an operator with sqlite3."""


class StateFile:
    """The file at `path`, for us alone; `-wal` stands beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._is_abandoned = False

    def abandon(self) -> None:
        """Nobody waits for `read` any more: it lets go of the file at its end, for another StateFile to have it."""
        self._is_abandoned = True

    def read(self) -> tuple[sqlite3.Connection, list[ImageEntry]]:
        """A copy in memory of what the file holds, and its images. The file is made if it is not there.

        A damaged one, or one of another version, is set aside as `<name>.damaged-<n>` with one WARNING.

        Raises:
            DamagedError, sqlite3.Error, OSError: it cannot be read or written.
        """
        try:
            try:
                return self._read()
            except DamagedError as exc:
                self._set_aside(exc)
                return self._read()
        finally:
            if self._is_abandoned:
                self.close()

    def apply(self, statements: Statements) -> None:
        """One transaction. sqlite3.Error: it was not written."""
        if self._db is None:
            raise sqlite3.OperationalError("the file is not open")
        state_rows.run_statements(self._db, statements)

    def replace(self, content: bytes) -> None:
        """Make the file hold `content`, what `Connection.serialize` gave. sqlite3.Error, OSError: it does not.

        It is opened anew: a connection that saw an error may go on seeing it.
        """
        self.close()
        copy = state_rows.in_memory(content)
        try:
            try:
                self._db = self._connect()
                copy.backup(self._db)
            except sqlite3.Error as exc:
                self.close()
                if not state_rows.is_damage(exc):
                    raise
                self._set_aside(exc)
                self._db = self._connect()
                copy.backup(self._db)
        finally:
            copy.close()

    def close(self) -> None:
        """Close the file; a closed one stays so."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_SQLITE_WAIT_S)
        try:
            # Before WAL, whose index is then in our memory and not in a mapped file: a mapped page that the disk cannot
            # give is a SIGBUS that ends the server (seen with EIO under a running one).
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            # In WAL mode a power cut may take the last transactions, never the file; `numbers_from` covers those.
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def _read(self) -> tuple[sqlite3.Connection, list[ImageEntry]]:
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._db = self._connect()
            state_rows.prepare(self._db)
            self._db.backup(copy)
            entries = state_rows.read_entries(copy)
            state_rows.read_value(copy, state_rows.NEXT_NUMBER, 0)
        except BaseException as exc:
            copy.close()
            self.close()
            if state_rows.is_damage(exc):
                raise DamagedError(str(exc)) from exc
            raise
        return copy, entries

    def _set_aside(self, why: Exception) -> None:
        """Rename the database and what stands beside it."""
        attempt = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{attempt}")).exists():
            attempt += 1
        os.rename(self.path, aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        log.warning("%s is damaged and was set aside as %s, begun anew: %s", self.path, aside, why)
