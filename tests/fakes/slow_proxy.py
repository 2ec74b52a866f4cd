"""A TCP proxy on loopback whose answers trickle once it is told to: a store that is there and gives next to nothing."""

import contextlib
import socket
import threading
from typing import Self

_TRICKLE_BYTES = 100
_TRICKLE_S = 0.1


class SlowProxy:
    """To `host`, "<address>:<port>". Use it as a context manager; `is_slow` may be changed while bytes pass."""

    def __init__(self, host: str) -> None:
        address, _, port = host.rpartition(":")
        self._target = (address, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self._connections: list[socket.socket] = []
        self.is_slow = False

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        """Ends with the proxy."""
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._connections += [near, far]
                threading.Thread(target=self._pass, args=(near, far), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        """Ends with either of them."""
        with contextlib.suppress(OSError):
            while data := source.recv(_TRICKLE_BYTES if self.is_slow else 1 << 16):
                if self.is_slow:
                    self._ended.wait(_TRICKLE_S)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
