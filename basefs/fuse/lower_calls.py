"""The lower directory's calls go to threads here, and its errors become ours here."""

import errno
import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.fuse.lower_disk import Found, find_cached_name, find_name

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

    def __init__(self, blocking: BlockingCalls, *, status_in_memory: bool) -> None:
        """`status_in_memory`: the lower file system is of this host, so that fstat(2) of an open inode cannot block."""
        self._blocking = blocking
        self.status_in_memory = status_in_memory

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)` in a thread; NoSuchEntryError, NoSuchAttributeError or LowerFileError.

        Cancellation: only before the call begins; what it opened is always delivered to the caller.
        """
        try:
            return await self._blocking.run(fn, *args)
        except OSError as exc:
            raise in_our_words(exc) from exc

    async def find_name(self, parent_fd: int, name: bytes) -> Found:
        """An O_PATH fd on the entry and its status; what is in memory is had without a thread (5 us against 60)."""
        if self.status_in_memory:
            try:
                found = find_cached_name(parent_fd, name)
            except OSError as exc:
                raise in_our_words(exc) from exc
            if found is not None:
                return found
        return await self.run(find_name, parent_fd, name)

    async def status(self, fd: int) -> os.stat_result:
        """The status of an open inode now."""
        return os.fstat(fd) if self.status_in_memory else await self.run(os.fstat, fd)
