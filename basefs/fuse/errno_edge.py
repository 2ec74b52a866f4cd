"""The one table from our errors to errno, and the one place that catches everything.

Any exception but FUSEError that leaves a pyfuse3 handler ends the mount, so every handler of `operations.py`
is wrapped by `edge`. One record per outcome, here; a condition that lasts is not logged per read.
"""

import errno
import logging
import re
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from basefs import errors
from basefs.fuse.request_stats import RequestStats
from basefs.observability import ConditionLog

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Face(Protocol):
    """Whose methods are handlers."""

    stats: RequestStats


F = TypeVar("F", bound=Face)

ERRNO_OF: dict[type[errors.BasefsError], int] = {
    errors.BasefsError: errno.EIO,
    errors.ConfigError: errno.EIO,
    errors.MountError: errno.EIO,
    errors.ControlError: errno.EIO,
    errors.AmbiguousImageError: errno.EIO,
    errors.ImageBusyError: errno.EBUSY,
    errors.BadTraceError: errno.EIO,
    # Gone while it is open: its missing bytes cannot be had. At a lookup this becomes ImageRefusedError.
    errors.ImageNotFoundError: errno.EIO,
    # ENOENT is the clean fallback: nova then downloads, checks and converts the image itself.
    errors.ImageRefusedError: errno.ENOENT,
    errors.ImageDamagedError: errno.EIO,
    # Never ENOENT: whoever has it open, or an overlay on it, would take the base for deleted.
    errors.ImageQuarantinedError: errno.EIO,
    errors.SourceError: errno.EIO,
    errors.SourceUnavailableError: errno.EIO,
    errors.SourceForbiddenError: errno.EIO,
    errors.SourceCorruptError: errno.EIO,
    errors.SourceHashError: errno.EIO,
    errors.RangeNotHonouredError: errno.EIO,
    errors.StoreGoneError: errno.EIO,
    errors.VolumeError: errno.EIO,
    errors.NoVolumeError: errno.EIO,
    errors.VolumeRefusedError: errno.EIO,
    errors.VolumeGoneError: errno.EIO,
    errors.VolumeBusyError: errno.EIO,
    errors.CacheError: errno.EIO,
    errors.NoSuchEntryError: errno.ENOENT,
    # Never EPERM or EACCES: libvirt takes those for fatal where it tolerates EROFS and ENOTSUP.
    errors.ReadOnlyError: errno.EROFS,
    errors.NotSupportedError: errno.ENOTSUP,
    errors.NoSuchAttributeError: errno.ENODATA,
    errors.AttributeRangeError: errno.ERANGE,
    errors.BadHandleError: errno.EBADF,
    errors.LowerFileError: errno.EIO,  # its own errno is used; this is for one without
    errors.DeadlineExceededError: errno.EIO,
    errors.InternalError: errno.EIO,
}

RECORD_INTERVAL_S = 10.0
"""The same failure of the same operation on the same file gives one WARNING in so many seconds."""
OUTAGE_RECORD_INTERVAL_S = 600.0
"""The same for all files together, while an outage is on that was told already."""

NAME_MAX = 255

_NUMBER = re.compile(r"\b\d+\b")
_outages = ConditionLog(log, repeat_s=OUTAGE_RECORD_INTERVAL_S, clock=trio.current_time)
_conditions = ConditionLog(log, repeat_s=RECORD_INTERVAL_S, keys_max=1000, clock=trio.current_time)


def errno_of(error: errors.BasefsError) -> int:
    """What a process that made the call gets to see."""
    if isinstance(error, errors.LowerFileError) and error.os_error.errno:
        return error.os_error.errno
    return ERRNO_OF[type(error)]


def _record(operation: str, error: errors.BasefsError) -> None:
    if errno_of(error) != errno.EIO or isinstance(error, errors.LowerFileError):
        log.debug("%s: %s", operation, error)
        return
    if isinstance(error, errors.SourceUnavailableError) and error.is_outage:
        # The outage was told; this says, once, that somebody felt it.
        _outages.begins(operation, logging.WARNING, "%s answered EIO: %s", operation, error)
        return
    # Without its numbers, or each offset of a scan through an outage would be a failure of its own.
    key = (operation, _NUMBER.sub("", str(error)))
    _conditions.begins(key, logging.WARNING, "%s answered EIO: %s", operation, error)


def edge(
    handler: Callable[Concatenate[F, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[F, P], Coroutine[Any, Any, T]]:
    """The handler, from which nothing comes but its answer, FUSEError, and cancellation; its `stats` count it."""
    operation = handler.__name__.lstrip("_")

    @wraps(handler)
    async def wrapped(face: F, /, *args: P.args, **kwargs: P.kwargs) -> T:
        stats = face.stats
        ticket = stats.begin(operation)
        try:
            return await handler(face, *args, **kwargs)
        except pyfuse3.FUSEError as exc:
            stats.failed(operation, exc.errno)
            raise
        except errors.BasefsError as exc:
            _record(operation, exc)
            stats.failed(operation, errno_of(exc))
            raise pyfuse3.FUSEError(errno_of(exc)) from None
        except Exception:
            log.exception("bug in %s%r", operation, _plain(args))
            stats.failed(operation, errno.EIO, is_bug=True)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            stats.end(ticket)

    return wrapped


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments that a record may hold: numbers and names, no data."""
    return tuple(
        arg if isinstance(arg, int) or (isinstance(arg, bytes) and len(arg) <= NAME_MAX) else "..." for arg in args
    )
