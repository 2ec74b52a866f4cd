"""Blocking HTTP that ends when the task that waits for it is cancelled, not only when Glance answers.

A thread cannot be stopped, but the connection it reads from can be shut down from outside: then the thread's
read ends at once, and with it the call. Only making a connection cannot be ended so (CONNECT_TIMEOUT_S).
"""

import http.client
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple

import outcome
import trio
import urllib3
from keystoneauth1 import session
from urllib3.connection import HTTPConnection, HTTPSConnection

from basefs.concurrency.threads import BlockingCalls

if TYPE_CHECKING:
    from urllib3._base_connection import BaseHTTPConnection

EndpointName = Literal["glance", "keystone"]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_thread = threading.local()


class Exchange:
    """The requests of one call, all made in one thread; the loop looks on."""

    def __init__(self) -> None:
        self.endpoint: EndpointName = "glance"
        """Who is asked now, or was asked last. Written by the thread."""
        self.alive_at = math.inf
        """`time.monotonic()` of the last byte that came; the thread's beginning before the first."""
        self.is_in_body = False
        """Whether image bytes are coming."""
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_ended = False

    def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """`fn(*args)`; the connections that it uses are known here."""
        _thread.exchange = self
        self.alive_at = time.monotonic()
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

    def gives_back(self, connected: socket.socket) -> None:
        """The thread's request was answered: whoever asks next may have the connection, while this call goes on."""
        with self._lock:
            if self._socket is connected:
                self._socket = None

    def interrupt(self) -> None:
        """Make the request under way fail now; those that would follow in this call fail, too."""
        with self._lock:
            self._is_ended = True
            if self._socket is not None:
                _shut_down(self._socket)

    async def watch(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Runs `meanwhile` until it is cancelled; a request under way ends with that."""
        try:
            await meanwhile()
        finally:
            self.interrupt()


def current_exchange() -> Exchange | None:
    """The call that this thread works for; None outside of `run_interruptibly`."""
    exchange: Exchange | None = getattr(_thread, "exchange", None)
    return exchange


@contextmanager
def asking(endpoint: EndpointName) -> Iterator[None]:
    """The body asks `endpoint`; that stays noted when it fails."""
    exchange = current_exchange()
    if exchange is None:
        yield
        return
    before, exchange.endpoint = exchange.endpoint, endpoint
    yield
    exchange.endpoint = before


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):
        # Not the method of SSLSocket, which takes the TLS object away under the reading thread.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


async def run_interruptibly(
    threads: BlockingCalls,
    fn: Callable[[*Ts], T],
    *args: *Ts,
    exchange: Exchange | None = None,
    meanwhile: Callable[[], Awaitable[None]] = trio.sleep_forever,
) -> T:
    """The result of `fn(*args)` in a thread of `threads`.

    `meanwhile` runs beside it in the loop and must not end by itself; it may `interrupt` the `exchange`.
    Cancellation: shuts down the connection that the thread waits for, and then waits for the thread.
    """
    under_way = exchange or Exchange()

    async def call() -> T:
        return await threads.run(lambda: under_way.run(fn, *args))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(under_way.watch, meanwhile)
            result = await outcome.acapture(call)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup:
        # Nothing but our own cancellation gets out of the nursery: all else was captured.
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    return result.unwrap()


class Answer(http.client.HTTPResponse):
    """http.client's answer, whose body may be read into memory of ours."""

    def read_some_into(self, target: memoryview) -> int:
        """How many bytes of the body came into `target`, by one read of the socket at most; 0 at its end.

        Only for a body whose length is known. The connection may be used again once that has come.
        """
        if self.fp is None or self.length is None or self.chunked:
            return 0
        came = self.fp.readinto1(target[: self.length])
        self.length -= came
        if not came or not self.length:
            self.close()
        return came


class PlainConnection(HTTPConnection):
    """Known to the exchange that it is used in."""

    response_class = Answer  # type: ignore[mutable-override]  # made to be overridden

    def request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  urllib3's own signature
        """See urllib3."""
        _note(self)
        super().request(*args, **kwargs)


class TlsConnection(HTTPSConnection):
    """Known to the exchange that it is used in."""

    response_class = Answer  # type: ignore[mutable-override]  # made to be overridden

    def request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  urllib3's own signature
        """See urllib3."""
        _note(self)
        super().request(*args, **kwargs)


def _note(connection: HTTPConnection) -> None:
    if connection.sock is None:
        connection.connect()
    exchange = current_exchange()
    if exchange is not None and connection.sock is not None:
        exchange.uses(connection.sock)


def _give_back(connection: "BaseHTTPConnection | None") -> None:
    exchange, connected = current_exchange(), getattr(connection, "sock", None)
    if exchange is not None and connected is not None:
        exchange.gives_back(connected)


class PlainPool(urllib3.HTTPConnectionPool):
    """Its connections are no exchange's once they are back in it."""

    ConnectionCls = PlainConnection  # type: ignore[mutable-override]  # a class attribute made to be overridden

    def _put_conn(self, conn: "BaseHTTPConnection | None") -> None:
        _give_back(conn)
        super()._put_conn(conn)


class TlsPool(urllib3.HTTPSConnectionPool):
    """As PlainPool."""

    ConnectionCls = TlsConnection  # type: ignore[mutable-override]

    def _put_conn(self, conn: "BaseHTTPConnection | None") -> None:
        _give_back(conn)
        super()._put_conn(conn)


class InterruptibleAdapter(session.TCPKeepAliveAdapter):
    """A transport for `requests` whose connections `run_interruptibly` can shut down."""

    pool_classes: Mapping[str, type[urllib3.HTTPConnectionPool]] = {"http": PlainPool, "https": TlsPool}

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  requests' own signature
        """See requests."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = dict(self.pool_classes)
