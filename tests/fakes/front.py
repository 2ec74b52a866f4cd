"""A misbehaving HTTP front: a Glance in memory, or a real one behind it, that fails when and how it is told.

    with MisbehavingFront() as front:                       # or MisbehavingFront(upstream=rig.glance_url)
        image_id = front.glance.add(b"...", name="disk")
        front.on("/file", "GET").respond(answers.status(503, {"Retry-After": "7"}), times=2)
        front.on("/file").after(1).respond(answers.chunked(), answers.cut(after=1000))
        ...
        assert front.count("/file") == 3

The first rule that fits a request, and is not used up, spoils its answer; without one the answer is right.
"""

import contextlib
import http.client
import http.server
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.answers import Answer, Fault, Request
from tests.fakes.memory_glance import MemoryGlance

_TICK_S = 0.02
_KEPT_OUT = ("connection", "transfer-encoding", "content-length", "keep-alive", "server", "date")


@dataclass(slots=True, eq=False)
class Rule:
    """Spoils the answers to the requests it fits. `hits` counts those it has spoilt."""

    path_part: str
    method: str | None
    is_ranged: bool | None
    faults: tuple[Fault, ...] = ()
    times: int | None = None
    to_let_pass: int = 0
    hits: int = 0
    is_instead: bool = False

    def instead(self) -> Self:
        """What it fits is not even forwarded: what was asked for is not done."""
        self.is_instead = True
        return self

    def after(self, requests: int) -> Self:
        """Let the first `requests` that fit pass unspoilt."""
        self.to_let_pass = requests
        return self

    def respond(self, *faults: Fault, times: int | None = None) -> Self:
        """Spoil with these faults, one after the other; only `times` times if that is given."""
        self.times = times
        self.faults = faults
        return self

    def fits(self, request: Request) -> bool:
        """Whether the rule is about this request; used up or not."""
        return (
            bool(self.faults)
            and self.path_part in request.path
            and self.method in (None, request.method)
            and self.is_ranged in (None, "range" in request.headers)
            and (self.times is None or self.hits < self.times)
        )


@dataclass(slots=True)
class _State:
    rules: list[Rule] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


class Route:
    """Answers the requests below a prefix."""

    def answer(self, request: Request) -> Answer:
        """The right answer."""
        raise NotImplementedError


class MisbehavingFront:
    """Listens on a free port of the loopback from `__enter__` to `__exit__`."""

    def __init__(self, upstream: str | None = None, *, certfile: Path | None = None) -> None:
        self.glance = MemoryGlance()
        """What is served without an `upstream`."""
        self.upstream = upstream
        self._certfile = certfile
        self.tokens: set[str] | None = None
        """Tokens that are good; None: all, and none is needed."""
        self.extra_routes: dict[str, Route] = {}
        """Path prefixes answered by somebody else (a fake Keystone)."""
        self.connections = 0
        """How many were made so far."""
        self._state = _State()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.front = self
        if self._certfile is not None:
            self._server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._server.tls.load_cert_chain(self._certfile)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_TICK_S,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state.closing.set()
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens, without a version."""
        assert self._server is not None
        scheme = "http" if self._certfile is None else "https"
        return f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def open_connections(self) -> int:
        """How many a client has open, idle ones too."""
        assert self._server is not None
        return self._server.open_connections

    def conf_lines(self) -> str:
        """The [glance] section of a basefs.conf that reaches this front."""
        return f"[glance]\nauth_type = none\nendpoint_override = {self.url}\n"

    def on(self, path_part: str = "", method: str | None = None, *, ranged: bool | None = None) -> Rule:
        """A new rule for requests whose path has `path_part`; say `.respond(...)` next."""
        rule = Rule(path_part, method, ranged)
        with self._state.lock:
            self._state.rules.append(rule)
        return rule

    def behave(self) -> None:
        """Forget all rules."""
        with self._state.lock:
            self._state.rules.clear()

    def requests(self, path_part: str = "", method: str | None = None) -> list[Request]:
        """The requests that came so far, oldest first."""
        with self._state.lock:
            return [one for one in self._state.requests if path_part in one.path and method in (None, one.method)]

    def count(self, path_part: str = "", method: str | None = None) -> int:
        """How many such requests came so far."""
        return len(self.requests(path_part, method))

    # --- for the handler -----------------------------------------------------------------------------

    @property
    def closing(self) -> threading.Event:
        """Set when the front goes down."""
        return self._state.closing

    def answer(self, request: Request) -> Answer:
        """The answer, spoilt if a rule says so."""
        with self._state.lock:
            self._state.requests.append(request)
            rule = self._rule_for(request)
        answer = Answer(status=200) if rule and rule.is_instead else self._right_answer(request)
        for fault in rule.faults if rule else ():
            answer = fault(answer)
        return answer

    def _rule_for(self, request: Request) -> Rule | None:
        for rule in self._state.rules:
            if rule.fits(request):
                if rule.to_let_pass > 0:
                    rule.to_let_pass -= 1
                    return None
                rule.hits += 1
                return rule
        return None

    def _right_answer(self, request: Request) -> Answer:
        for prefix, route in self.extra_routes.items():
            if request.path.startswith(prefix):
                return route.answer(request)
        if self.tokens is not None and request.headers.get("x-auth-token") not in self.tokens:
            return Answer(status=401, headers={"WWW-Authenticate": "Keystone uri='here'"}, body=b"no good token")
        return self.glance.answer(request) if self.upstream is None else _forwarded(self.upstream, request)


def _forwarded(upstream: str, request: Request) -> Answer:
    parts = urllib.parse.urlsplit(upstream)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    target = request.path + (f"?{request.query}" if request.query else "")
    headers = {name: value for name, value in request.headers.items() if name not in (*_KEPT_OUT, "host")}
    with contextlib.closing(connection):
        connection.request(request.method, target, body=request.body or None, headers=headers)
        response = connection.getresponse()
        body = response.read()
    kept = {name: value for name, value in response.headers.items() if name.lower() not in _KEPT_OUT}
    whole = None
    if response.status == 206:
        plain = {name: value for name, value in request.headers.items() if name != "range"}
        again = Request(method=request.method, path=request.path, query=request.query, headers=plain)
        whole = _forwarded(upstream, again).body
    return Answer(status=response.status, headers=kept, body=body, whole=whole)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    front: MisbehavingFront
    tls: ssl.SSLContext | None = None

    def __init__(self, address: tuple[str, int], handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.front.connections += 1
        self._open.add(request)
        super().process_request(request, client_address)

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        """In the connection's own thread: a slow handshake holds up nobody else."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        with self.tls.wrap_socket(request, server_side=True) as wrapped:
            self._open.discard(request)
            self._open.add(wrapped)
            super().finish_request(wrapped, client_address)
            self._open.discard(wrapped)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""

    def close_connections(self) -> None:
        """End what is still open, so that the handlers' threads end."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_HEAD = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        headers: Mapping[str, str] = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(method=self.command, path=path, query=query, headers=headers, body=body)
        answer = self.server.front.answer(request)
        closing = self.server.front.closing
        while answer.wait_for is not None and not answer.wait_for.wait(_TICK_S):
            if closing.is_set():
                self.close_connection = True
                return
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            self.close_connection = True
        elif answer.is_reset and answer.cut_after is None:
            self._reset()
        else:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not answer.states_length:
            self.close_connection = True
        elif answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(answer.body)
        is_cut = answer.cut_after is not None and answer.cut_after < len(body)
        for piece in self._paced(body[: answer.cut_after], answer.bytes_per_s):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.is_chunked else piece)
        if is_cut:
            self._reset() if answer.is_reset else self._drop()
        elif answer.is_chunked:
            self.wfile.write(b"0\r\n\r\n")
        if answer.length is not None:
            self.close_connection = True

    def _paced(self, body: memoryview, bytes_per_s: float | None) -> Iterator[memoryview]:
        step = 1 << 20 if bytes_per_s is None else max(1, int(bytes_per_s * _TICK_S))
        for start in range(0, len(body), step):
            yield body[start : start + step]
            if bytes_per_s is not None and self.server.front.closing.wait(step / bytes_per_s):
                return

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Closing with linger 0 sends RST; the server's own shutdown_request would send FIN first.
        self.server._open.discard(self.connection)
        self.connection.close()
