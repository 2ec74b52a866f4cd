"""The lower directory's calls go to threads here, and its errors become ours here."""

import errno
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from basefs import errors
from basefs.concurrency.threads import BlockingCalls

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def in_our_words(os_error: OSError) -> errors.BasefsError:
    """The error to raise for what the lower file system said."""
    if os_error.errno == errno.ENOENT:
        return errors.NoSuchEntryError(str(os_error))
    if os_error.errno == errno.ENODATA:
        return errors.NoSuchAttributeError(str(os_error))
    return errors.LowerFileError(os_error)


class LowerCalls:
    """Runs blocking calls on the lower file system in threads."""

    def __init__(self, blocking: BlockingCalls) -> None:
        self._blocking = blocking

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)` in a thread; NoSuchEntryError, NoSuchAttributeError or LowerFileError.

        Cancellation: only before the call begins; what it opened is always delivered to the caller.
        """
        try:
            return await self._blocking.run(fn, *args)
        except OSError as exc:
            raise in_our_words(exc) from exc
