"""The keeper's own socket: one JSON object asked, one answered, a connection. Standard library only.

Invariants:
- Nothing here waits: a client that says nothing, too much or reads nothing costs a connection of few, for seconds.
- Only root and our own user are heard.
"""

import contextlib
import json
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("basefs.keeper")

CLIENTS_MAX = 8
REQUEST_BYTES_MAX = 4096
SAY_LIMIT_S = 5.0
"""What a client has to say what it wants."""
PEER_CREDENTIALS = struct.Struct("3i")


class Request:
    """What a client asked for; `answer` it once, at any time."""

    def __init__(self, kind: str, connection: socket.socket) -> None:
        self.kind = kind
        self._connection = connection

    def answer(self, answer: dict[str, Any]) -> None:
        """Send the answer and close. It fits into the socket's empty buffer; a client that is gone misses it."""
        with contextlib.suppress(OSError), self._connection:
            self._connection.send(json.dumps(answer).encode())


class RequestSocket:
    """A listening Unix socket of mode 0600 at `path`, in place of one that an earlier keeper left.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._clients: list[tuple[socket.socket, float]] = []
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        # The lock on the cache directory is ours, so nobody who is alive has this socket.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Before bind, so that the file never has wider rights than these.
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(path)
            self._listener.listen(CLIENTS_MAX)
            self._inode = os.lstat(path).st_ino
        except OSError:
            self._listener.close()
            raise

    def fds(self) -> list[int]:
        """What to wait for; pass what became readable to `handle`."""
        listeners = [self._listener.fileno()] if len(self._clients) < CLIENTS_MAX else []
        return [*listeners, *(client.fileno() for client, _ in self._clients)]

    def due_s(self) -> float | None:
        """When the first client's time is over (time.monotonic()): call `handle` then, too."""
        return min((deadline_s for _, deadline_s in self._clients), default=None)

    def handle(self, ready: set[int]) -> Iterator[Request]:
        """What clients asked for."""
        now_s = time.monotonic()
        clients = list(self._clients)
        if self._listener.fileno() in ready:
            self._accept()  # It may have the number of an fd that was ready and closed since; its turn is next.
        for entry in clients:
            client, deadline_s = entry
            if client.fileno() in ready:
                self._clients.remove(entry)
                request = _read(client)
                if request is not None:
                    yield request
            elif now_s >= deadline_s:
                self._clients.remove(entry)
                client.close()

    def close(self) -> None:
        """Stop listening; the file goes, if it is still ours."""
        for client, _ in self._clients:
            client.close()
        self._clients.clear()
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        _, uid, _ = PEER_CREDENTIALS.unpack(credentials)
        if uid not in (0, os.geteuid()):
            client.close()
            return
        self._clients.append((client, time.monotonic() + SAY_LIMIT_S))


def _read(client: socket.socket) -> Request | None:
    """The request that came, in one piece; None, and the client is gone, for what is none."""
    try:
        message = json.loads(client.recv(REQUEST_BYTES_MAX))
        kind = message["request"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        client.close()
        return None
    return Request(str(kind), client)
