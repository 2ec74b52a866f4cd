"""Volumes and files in place that reader processes may have open, too, and how it is known that none has any more.

With a volume a reader gets a *lease*: the write end of a pipe, which it closes after the volume, and which the kernel
closes after it when the reader dies. So the pipe's read end tells its end when no reader has the volume open, whichever
server gave it to them, and whether they are alive, stopped or killed meanwhile.

Invariant: a lease's read end is in escrow before a reader gets the write end, and leaves it when no reader has one. A
volume is detached after that. Owned by the trio loop.
"""

import contextlib
import os
from collections.abc import Collection, Iterable

import trio

from basefs import errors
from basefs.cache.reader_table import Entry, ReaderTable, Share
from basefs.core.escrow import Escrow, HeldFd

LEASE_PREFIX = "volume-lease/"
"""Keys in escrow: with the image number."""
RETURN_LIMIT_S = 15.0
"""A reader closes what was revoked at once; one that hangs is killed by the keeper (`watchdog_s`)."""


class Lending:
    """One volume or file to readers, from its first share to `revoke`. `lease_fd`, if there is one, is its own."""

    def __init__(self, number: int, table: ReaderTable, lease_fd: int = -1) -> None:
        self._number = number
        self._table = table
        self._lease_fd = lease_fd
        self._entry: Entry | None = None
        self._is_revoked = False

    @property
    def is_lent(self) -> bool:
        """Whether readers may serve it."""
        return self._entry is not None

    def share(self, data_fd: int, size: int) -> Share | None:
        """What a reader needs; None when there is no room for it, or once it is revoked."""
        if self._entry is None and not self._is_revoked:
            # What an earlier server told readers says the same until then.
            self._table.revoke_inherited(self._number)
            self._entry = self._table.list(self._number)
        if self._entry is None:
            return None
        return Share(
            number=self._number,
            entry=self._entry.word,
            serial=self._entry.serial,
            size=size,
            chunk_shift=0,
            data_fd=data_fd,
            ready_fd=-1,
            lease_fd=self._lease_fd,
        )

    def revoke(self) -> None:
        """No reader answers with its bytes from here on, whichever server told it of them; each closes it soon."""
        if self._is_revoked:
            return
        self._is_revoked = True
        self._table.revoke_inherited(self._number)
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.revoke()
        fd, self._lease_fd = self._lease_fd, -1
        if fd >= 0:
            os.close(fd)


class VolumeLeases:
    """The leases of all attached volumes, by image number. `table` is None where there are no readers."""

    def __init__(self, table: ReaderTable | None, escrow: Escrow) -> None:
        self._table = table
        self._escrow = escrow
        self._ends: dict[int, int] = {}
        self._lent: dict[int, Lending] = {}

    async def restore(self, held: Iterable[HeldFd], numbers: Collection[int]) -> None:
        """Go on with the leases of earlier servers, whose fds are ours from here; not with those of other images."""
        for one in held:
            number = int(one.key.removeprefix(LEASE_PREFIX))
            self._ends[number] = one.fd
            if number not in numbers:
                if self._table is not None:
                    self._table.revoke_inherited(number)
                await self._forget(number)

    async def lend(self, number: int) -> Lending | None:
        """Let readers have the image's volume, which is attached and in escrow; None where that cannot be."""
        if self._table is None:
            return None
        lease_fd = -1
        with contextlib.suppress(OSError):  # no fd is left: readers hand on what is read of it
            lease_fd = await self._new_lease(number)
        if lease_fd < 0:
            self._table.revoke_inherited(number)
            return None
        self._lent[number] = lending = Lending(number, self._table, lease_fd)
        return lending

    async def _new_lease(self, number: int) -> int:
        end = self._ends.get(number)
        if end is None:
            end, first = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.close(first)
            self._ends[number] = end
            try:
                await self._escrow.hold(f"{LEASE_PREFIX}{number}", "", end)
            except OSError:
                await self._forget(number)
                raise
        return os.open(f"/proc/self/fd/{end}", os.O_WRONLY | os.O_CLOEXEC)

    async def take_back(self, number: int) -> None:
        """Return when no reader has the image's volume open.

        Raises:
            VolumeError: one still has.
        """
        lending = self._lent.pop(number, None)
        if lending is not None:
            lending.revoke()
        elif self._table is not None:
            self._table.revoke_inherited(number)
        end = self._ends.get(number)
        if end is None:
            return
        with trio.move_on_after(RETURN_LIMIT_S) as waiting:
            while not _is_returned(end):
                await trio.lowlevel.wait_readable(end)
        if waiting.cancelled_caught:
            raise errors.VolumeError("a reader process has it open still")
        await self._forget(number)

    async def _forget(self, number: int) -> None:
        os.close(self._ends.pop(number))
        await self._escrow.drop(f"{LEASE_PREFIX}{number}")


def _is_returned(end: int) -> bool:
    """Whether nobody has the other end: nothing is ever written to it."""
    try:
        return os.read(end, 1) == b""
    except BlockingIOError:
        return False
