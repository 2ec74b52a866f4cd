"""The keeper's records, on stderr; where that is a file, it is one that logrotate may move. Standard library only."""

import logging
import os
import stat
import sys

LOG_MODE = 0o640


def set_up_log() -> None:
    """Write records of INFO and above to stderr, as `observability.LINE_FORMAT` has them."""
    handler = _RotatedStderr()
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # What cannot be written is lost; a traceback of that could not be written either.
    logging.raiseExceptions = False


class _RotatedStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """stderr, which follows the name of the file that it was; descriptors 1 and 2, which the next server inherits."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._path = _path_of(2)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`. Never fails."""
        if self._path is not None:
            _follow(self._path)
        super().emit(record)


def _path_of(fd: int) -> str | None:
    """The name of a regular file; None for a pipe, a terminal, the journal."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None


def _follow(path: str) -> None:
    """Let stdout and stderr be the file of that name, made if it is not there. If it cannot be, they stay."""
    try:
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(2)):
            return
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, LOG_MODE)
    except OSError:
        return
    try:
        for standard in (1, 2):
            os.dup2(fd, standard)
    finally:
        os.close(fd)
