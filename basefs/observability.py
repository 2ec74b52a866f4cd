"""Logging: oslo.log as every OpenStack service has it, with secrets masked in whatever is written."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from oslo_config import cfg
from oslo_log import log as oslo_log
from oslo_utils import strutils

from basefs.log_writer import LogWriter, write_in_background

QUIET_LIBRARIES = [
    "keystoneauth=WARNING",
    "keystoneclient=WARNING",
    "glanceclient=WARNING",
    "urllib3=WARNING",
    "requests=WARNING",
    "hypercorn=WARNING",
    "stevedore=WARNING",
]
LOG_NAME = "basefs.log"
"""In log_dir, when log_file is not set."""
LINE_FORMAT = "%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(name)s %(message)s"
"""The same for the server (here) and the keeper (which knows the standard library only)."""


def set_up_logging(conf: cfg.ConfigOpts) -> LogWriter:
    """Send the server's records where [DEFAULT] of the configuration says: a file, journald, syslog, else stderr.

    A file may be renamed or truncated by logrotate at any time: oslo.log looks at its name before each record.
    """
    conf.set_default("default_log_levels", QUIET_LIBRARIES)
    for name in ("logging_context_format_string", "logging_default_format_string"):
        conf.set_default(name, LINE_FORMAT)
    conf.set_default("log_file", LOG_NAME if conf.log_dir else None)
    oslo_log.setup(conf, "basefs")
    mask_secrets(logging.getLogger())
    # What cannot be written is lost; a traceback of that could not be written either.
    logging.raiseExceptions = False
    return write_in_background(logging.getLogger())


def log_file_of(conf: cfg.ConfigOpts) -> Path | None:
    """The file that [DEFAULT] log_file and log_dir name, or None."""
    if not conf.log_file and not conf.log_dir:
        return None
    return Path(conf.log_dir or "/", conf.log_file or LOG_NAME)


def mask_secrets(logger: logging.Logger) -> None:
    """From now on no handler of `logger` writes a password or a token, in messages and tracebacks alike."""
    for handler in logger.handlers:
        if not isinstance(handler.formatter, _MaskingFormatter):
            handler.setFormatter(_MaskingFormatter(handler.formatter or logging.Formatter()))


class _MaskingFormatter(logging.Formatter):
    """What another formatter made of a record, without secrets."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        line = self._inner.format(record)
        if not record.exc_info:
            # oslo.log adds the exception being handled to what is logged meanwhile; our messages hold it already.
            line = line.removesuffix(f": {getattr(record, 'error_summary', '')}")
        text: str = strutils.mask_password(line)
        return text


class ConditionLog:
    """One record when a condition begins, not one each time somebody meets it.

    A condition is a key, e.g. `("glance",)` or `("refused", image_id)`. One that goes on is told again every
    `repeat_s` seconds. At most `keys_max` conditions are remembered; the least recently met is forgotten first.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        repeat_s: float = 3600.0,
        keys_max: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._repeat_s = repeat_s
        self._keys_max = keys_max
        self._clock = clock
        self._told_at_s: OrderedDict[object, float] = OrderedDict()

    def begins(self, key: object, level: int, message: str, *args: object) -> bool:
        """Log `message % args` unless the condition is known; whether it was logged."""
        now_s = self._clock()
        told_at_s = self._told_at_s.get(key)
        if told_at_s is not None and now_s - told_at_s < self._repeat_s:
            self._told_at_s.move_to_end(key)
            return False
        self._told_at_s[key] = now_s
        self._told_at_s.move_to_end(key)
        if len(self._told_at_s) > self._keys_max:
            self._told_at_s.popitem(last=False)
        self._logger.log(level, message, *args)
        return True
