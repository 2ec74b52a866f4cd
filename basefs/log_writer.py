"""Log records leave the loop through a queue: no disk, journal or syslog that hangs or fails reaches a reader.

A handler of the standard library raises out of `log.warning` when it cannot open a rotated file anew, and a write to a
log on a hanging disk would stop the trio loop, and with it every guest.
"""

import contextlib
import copy
import logging
import queue
import threading
from collections.abc import Sequence

RECORDS_MAX = 10_000
"""Records that wait for a log that takes none; further ones are lost, and counted."""
END_S = 2.0
"""What the end of the process waits for the log."""


class LogWriter(logging.Handler):
    """Hands records to `inner`, which a thread of its own works on. Emitting never waits and never fails.

    At `kill -9` the records of the last milliseconds may be lost.
    """

    def __init__(self, inner: Sequence[logging.Handler]) -> None:
        super().__init__()
        self.inner = list(inner)
        self.lost = 0
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(RECORDS_MAX)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        kept = copy.copy(record)
        # Now: the arguments may change before the thread comes to it.
        kept.msg, kept.args = _message_of(record), None
        try:
            self._records.put_nowait(kept)
        except queue.Full:
            self.lost += 1

    def _write(self) -> None:
        """Ends with `close`."""
        while (record := self._records.get()) is not None:
            for handler in self.inner:
                if record.levelno >= handler.level:
                    try:
                        handler.handle(record)
                    except (OSError, ValueError):  # a file that cannot be opened anew; one that was closed meanwhile
                        self.lost += 1

    def close(self) -> None:
        """Return when all is written; a log that hangs is not waited for longer than END_S, twice."""
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=END_S)
            self._thread.join(END_S)
        super().close()


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, LookupError):  # arguments that do not fit the message must end no request
        return f"{record.msg!r} with {record.args!r}"


def write_in_background(logger: logging.Logger) -> LogWriter:
    """From now on the handlers of `logger` work in a thread."""
    writer = LogWriter(logger.handlers)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(writer)
    return writer
