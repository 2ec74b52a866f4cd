"""The server's end of the keeper socket (docs/DESIGN.md, section 1): one JSON object a datagram.

Datagrams leave in the order in which they were posted. What the socket does not take at once waits in an outbox,
with fds of its own, for `deliver`. A keeper that is gone is no reason to stop serving: nothing here fails then.
"""

import array
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from basefs import errors
from basefs.core.escrow import HeldFd
from basefs.reader_layout import LAYOUT

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 64 * 1024
FDS_MAX = 253
"""Linux puts no more into one datagram (SCM_MAX_FD)."""
READER_FDS = 3
HOLD_WAIT_S = 1.0
"""A keeper that takes nothing for so long (it was stopped, say) keeps no open(2) on the mount waiting."""


@dataclass(slots=True, kw_only=True)
class _Posted:
    """A datagram that waits in the outbox; its fds are ours."""

    data: bytes
    fds: list[int]
    sent: trio.Event = field(default_factory=trio.Event)


class KeeperChannel:
    """Datagrams to and from the keeper; the socket is the one with number `fd`.

    `held` are the fds that earlier servers gave to the keeper, until `take` handed them out; `begun` is the message
    `begin`. Both are there after `begin`.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._outbox: deque[_Posted] = deque()
        self._has_outbox = trio.Event()
        self.held: list[HeldFd] = []
        self.begun: dict[str, Any] = {}
        self.is_connected = True
        """Whether the keeper lives, as far as is known."""
        self.on_reader: Callable[[int, list[int]], None] = _close_all
        """Called with each reader that the keeper connects: its number, and its fds, which are the callee's."""
        self.is_stopped = False
        """Whether it said `stop`: the mount stays, another server takes over."""

    # --- to the keeper -------------------------------------------------------------------------------

    def send(self, message: dict[str, Any]) -> None:
        """Tell the keeper something, now or when the socket takes it."""
        self._post(message, ())

    async def hold(self, key: str, note: str, fd: int) -> None:
        """See `Escrow`. A keeper that takes nothing is waited for HOLD_WAIT_S; the datagram is then sent later."""
        await self._wait_sent(self._post({"type": "hold", "key": key, "note": note}, (fd,)))

    async def drop(self, key: str) -> None:
        """See `Escrow`. When it returns: as `hold`."""
        await self._wait_sent(self._post({"type": "drop", "key": key}, ()))

    def _post(self, message: dict[str, Any], fds: Sequence[int]) -> _Posted | None:
        """None if the datagram has left; else it waits in the outbox."""
        data = json.dumps(message).encode()
        if not self._outbox and self._try_send(data, fds):
            return None
        posted = _Posted(data=data, fds=[os.dup(fd) for fd in fds])
        self._outbox.append(posted)
        self._has_outbox.set()
        return posted

    async def _wait_sent(self, posted: _Posted | None) -> None:
        if posted is not None:
            with trio.move_on_after(HOLD_WAIT_S):
                await posted.sent.wait()

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        """False if the socket is full. True also when the keeper is gone: then nobody will ever take it."""
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._socket.sendmsg([data], rights, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as exc:
            log.debug("the keeper takes no message: %s", exc)
        return True

    # --- from the keeper -----------------------------------------------------------------------------

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and the fds that came with it.

        Raises:
            MountError: the keeper is gone.
        """
        await trio.lowlevel.wait_readable(self._socket)
        try:
            data, fds = _receive(self._socket)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self.is_connected = False
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

    async def begin(
        self, *, version: str, options: dict[str, str], not_applied: list[str], config_error: str = ""
    ) -> bool:
        """Say `loaded` and wait for our turn, as a standby for long. False: we are not needed, stop.

        `config_error` is why the configuration in force is not that of the files.

        Raises:
            MountError: the keeper is gone, or said something else.
        """
        loaded = {"version": version, "options": options, "not_applied": not_applied, "config_error": config_error}
        self.send({"type": "loaded", "reader_layout": LAYOUT, **loaded})
        while True:
            message, fds = await self.receive()
            if message.get("type") == "held":
                items = zip(message["items"], fds, strict=True)
                self.held += [HeldFd(key=key, note=note, fd=fd) for (key, note), fd in items]
            elif message.get("type") == "begin":
                self.begun = message
                return True
            elif message.get("type") == "stop":
                return False
            else:
                raise errors.MountError(f"the keeper said {message.get('type')!r} where 'begin' was due")

    def take(self, prefix: str) -> list[HeldFd]:
        """Those of `held` whose keys begin with `prefix`; the caller owns their fds from here."""
        taken = [one for one in self.held if one.key.startswith(prefix)]
        self.held = [one for one in self.held if not one.key.startswith(prefix)]
        return taken

    async def listen(self) -> bool:
        """Answer pings until the keeper says `stop` (True) or is gone (False).

        A ping is answered here, in the loop that also answers the kernel: an answer proves that it turns.
        """
        with contextlib.suppress(errors.MountError):
            while True:
                message, fds = await self.receive()
                if message.get("type") == "reader" and len(fds) == READER_FDS:
                    self.on_reader(int(message.get("number", 0)), fds)
                    continue
                for fd in fds:
                    os.close(fd)
                if message.get("type") == "ping":
                    self.send({"type": "pong", "n": message.get("n")})
                elif message.get("type") == "stop":
                    self.is_stopped = True
                    return True
        return False

    async def deliver(self) -> None:
        """Send what waits in the outbox. Ends when it is cancelled."""
        while True:
            await self._has_outbox.wait()
            await self._empty_outbox()
            self._has_outbox = trio.Event()

    async def flush(self) -> None:
        """Return when the outbox is empty, HOLD_WAIT_S later at the latest."""
        await self._wait_sent(self._outbox[-1] if self._outbox else None)

    async def _empty_outbox(self) -> None:
        while self._outbox:
            await trio.lowlevel.wait_writable(self._socket)
            first = self._outbox[0]
            if self._try_send(first.data, first.fds):
                self._outbox.popleft()
                first.sent.set()
                for fd in first.fds:
                    os.close(fd)


def _close_all(_number: int, fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One datagram, and its fds, which no child inherits: `socket.recv_fds` of Python 3.11 ignores flags."""
    fds = array.array("i")
    room = socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)
