"""What outlives a server: fds that the keeper keeps for the next one (docs/DESIGN.md, section 2)."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFd:
    """An fd that the keeper keeps for the next server, and what the server that sent it noted about it."""

    key: str
    note: str
    fd: int


class Escrow(Protocol):
    """Where a server leaves its fds. Nothing here fails because the keeper is gone."""

    async def hold(self, key: str, note: str, fd: int) -> None:
        """Have a duplicate of `fd` kept for the next server, in place of what is kept under `key`.

        On return it is on its way: a server killed after that has lost nothing.

        Raises:
            OSError: there is no fd left to keep it with.
        """
        ...

    async def drop(self, key: str) -> None:
        """Have what is kept under `key` closed. When it returns: as `hold`."""
        ...
