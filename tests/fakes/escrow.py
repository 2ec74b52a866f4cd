"""Where a server leaves its fds, without a keeper."""

import contextlib
import os

from basefs.core.escrow import HeldFd


class MemoryEscrow:
    """`Escrow` in a dict of this process; `refuses` makes it fail as it does when no fd is left."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[str, int]] = {}
        self.refuses: OSError | None = None

    async def hold(self, key: str, note: str, fd: int) -> None:
        if self.refuses is not None:
            raise self.refuses
        await self.drop(key)
        self.kept[key] = (note, os.dup(fd))

    async def drop(self, key: str) -> None:
        if key in self.kept:
            os.close(self.kept.pop(key)[1])

    def held(self) -> list[HeldFd]:
        """What the next server gets; the fds are its own."""
        return [HeldFd(key=key, note=note, fd=os.dup(fd)) for key, (note, fd) in self.kept.items()]

    def close(self) -> None:
        for _, fd in self.kept.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.kept.clear()
