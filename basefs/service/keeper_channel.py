"""The server's end of the keeper socket (docs/DESIGN.md, section 1): one JSON object a datagram."""

import json
import socket
from typing import Any

import trio

from basefs import errors

MESSAGE_BYTES_MAX = 64 * 1024
FDS_MAX = 4


class KeeperChannel:
    """Datagrams to and from the keeper; the socket is the one with number `fd`."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def send(self, message: dict[str, Any]) -> None:
        """Tell the keeper something. A keeper that is gone is no reason to stop serving."""
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError:
            return

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and the fds that came with it.

        Raises:
            MountError: the keeper is gone.
        """
        await trio.lowlevel.wait_readable(self._socket)
        data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, FDS_MAX)
        if not data:
            raise errors.MountError("the keeper ended before the server was ready")
        message: dict[str, Any] = json.loads(data)
        return message, fds

    async def expect(self, kind: str) -> list[int]:
        """Wait for the message `kind`; the fds that came with it.

        Raises:
            MountError: the keeper is gone, or said something else.
        """
        message, fds = await self.receive()
        if message.get("type") != kind:
            raise errors.MountError(f"the keeper said {message.get('type')!r} where {kind!r} was due")
        return fds
