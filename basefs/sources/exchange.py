"""Blocking HTTP that ends when the task that waits for it is cancelled, not only when Glance answers.

A thread cannot be stopped, but the connection it reads from can be shut down from outside: then the thread's
read ends at once, and with it the call. Only making a connection cannot be ended so (CONNECT_TIMEOUT_S).
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple

import outcome
import trio
import urllib3
from keystoneauth1 import session
from urllib3.connection import HTTPConnection, HTTPSConnection

from basefs.concurrency.threads import BlockingCalls

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_thread = threading.local()


class _Exchange:
    """The requests of one call, all made in one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_ended = False

    def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """`fn(*args)`; the connections that it uses are known here."""
        _thread.exchange = self
        try:
            return fn(*args)
        finally:
            _thread.exchange = None
            with self._lock:
                # What comes later must not touch a connection that is back in the pool.
                self._is_ended, self._socket = True, None

    def uses(self, connected: socket.socket) -> None:
        """The thread sends its next request here."""
        with self._lock:
            if not self._is_ended:
                self._socket = connected
                return
        _shut_down(connected)

    async def interrupt_when_cancelled(self) -> None:
        """Ends when it is cancelled; a request under way ends with it."""
        try:
            await trio.sleep_forever()
        finally:
            with self._lock:
                self._is_ended = True
                if self._socket is not None:
                    _shut_down(self._socket)


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):
        # Not the method of SSLSocket, which takes the TLS object away under the reading thread.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


async def run_interruptibly(threads: BlockingCalls, fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """The result of `fn(*args)` in a thread of `threads`.

    Cancellation: shuts down the connection that the thread waits for, and then waits for the thread.
    """
    exchange = _Exchange()

    async def call() -> T:
        return await threads.run(lambda: exchange.run(fn, *args))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.interrupt_when_cancelled)
            result = await outcome.acapture(call)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup:
        # Nothing but our own cancellation gets out of the nursery: all else was captured.
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    return result.unwrap()


class _Connection(HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  urllib3's own signature
        _note(self)
        super().request(*args, **kwargs)


class _TlsConnection(HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  urllib3's own signature
        _note(self)
        super().request(*args, **kwargs)


def _note(connection: HTTPConnection) -> None:
    if connection.sock is None:
        connection.connect()
    exchange: _Exchange | None = getattr(_thread, "exchange", None)
    if exchange is not None and connection.sock is not None:
        exchange.uses(connection.sock)


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[mutable-override]  # a class attribute made to be overridden


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection  # type: ignore[mutable-override]


class InterruptibleAdapter(session.TCPKeepAliveAdapter):
    """A transport for `requests` whose connections `run_interruptibly` can shut down."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  requests' own signature
        """See requests."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
