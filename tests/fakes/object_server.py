"""A web server of objects, as S3 and Swift are to who reads: HEAD, ranged GET, entity tags. It fails as it is told."""

import contextlib
import hashlib
import http.server
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Self

_RANGE = re.compile(r"bytes=(\d+)-(\d+)\Z")
_PIECE = 64 * 1024
Special = Callable[[str, Mapping[str, str]], tuple[int, dict[str, str]] | None]


class ObjectServer:
    """`objects` by path. Use it as a context manager; everything may be changed while it is asked."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.allows: Callable[[str, str, Mapping[str, str]], bool] = lambda _method, _path, _headers: True
        """Whether a request (method, path, headers) is answered; else with 403."""
        self.refusal = (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
        self.special: Special = lambda _path, _headers: None
        """Another answer to a path, without a body."""
        self.extra_headers: dict[str, str] = {}
        self.without_tag = False
        self.is_away = False
        self.cuts = False
        self.hold: threading.Event | None = None
        """While set, no request is answered."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        outer = self

        class Handler(_Handler):
            server_of_objects = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold is not None:
            self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients leave when they like."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of_objects: ObjectServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: what is asked is in `requests`."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        world = self.server_of_objects
        headers = {name.title(): value for name, value in self.headers.items()}
        world.requests.append((self.command, self.path, headers))
        if world.hold is not None:
            world.hold.wait()
        if world.is_away:
            self._cut()
            return
        special = world.special(self.path, headers)
        if special is not None:
            self._send(special[0], special[1], b"", with_body)
        elif not world.allows(self.command, self.path, headers):
            self._send(world.refusal[0], {}, world.refusal[1], with_body)
        elif self.path not in world.objects:
            self._send(404, {}, b"<Error><Code>NoSuchKey</Code></Error>", with_body)
        else:
            self._send_object(world.objects[self.path], headers, with_body)

    def _send_object(self, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        world = self.server_of_objects
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        answer = dict(world.extra_headers) if world.without_tag else {"ETag": tag, **world.extra_headers}
        if headers.get("If-Match", tag) != tag:
            self._send(412, {}, b"", with_body)
            return
        asked = _RANGE.match(headers.get("Range", ""))
        if asked is None:
            self._send(200, answer, data, with_body)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first > last:
            self._send(416, {}, b"", with_body)
            return
        answer["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, answer, data[first : last + 1], with_body, cut=world.cuts)

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, with_body: bool, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: max(_PIECE, len(body) // 2) + 5] if cut else body)
        if cut:
            self._cut(gently=True)

    def _cut(self, *, gently: bool = False) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            if not gently:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
