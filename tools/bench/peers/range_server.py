"""range_server.py DIRECTORY [ORIGINS]: a web server with byte ranges, what rclone, nbdkit and qemu read from.

Says `{"port": N}` on standard output and ends with its standard input. Bodies go by sendfile: it is as fast as Python
can be. ORIGINS is a JSON object of file names and URLs: bodies of those files are asked for there, range by range, so
that whoever cannot speak to Glance pays for Glance's answers as well.
"""

import functools
import http.client
import http.server
import json
import os
import re
import sys
import threading
from http import HTTPStatus
from typing import ClassVar
from urllib.parse import urlsplit

PIECE_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes of a Range header for a file of `size` bytes; None if it cannot be satisfied."""
    found = _RANGE.match(header)
    if found is None or found.groups() == ("", ""):
        return None
    if not found[1]:
        length = min(int(found[2]), size)
        return (size - length, length) if length else None
    first = int(found[1])
    last = min(int(found[2]), size - 1) if found[2] else size - 1
    return (first, last - first + 1) if first <= last else None


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files and listings of one directory."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    origins: ClassVar[dict[str, str]] = {}
    upstream: http.client.HTTPConnection | None = None

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with the file, a range of it, or the directory's listing."""
        if os.path.isdir(self.translate_path(self.path)):
            super().do_GET()
        else:
            self._send(with_body=True)

    def do_HEAD(self) -> None:
        """Answer as GET would, without the body."""
        if os.path.isdir(self.translate_path(self.path)):
            super().do_HEAD()
        else:
            self._send(with_body=False)

    def _send(self, *, with_body: bool) -> None:
        try:
            fd = os.open(self.translate_path(self.path), os.O_RDONLY)
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            info = os.fstat(fd)
            wanted = self.headers.get("Range")
            where = byte_range(wanted, info.st_size) if wanted else (0, info.st_size)
            if where is None:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            first, length = where
            self.send_response(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(length))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", self.date_time_string(int(info.st_mtime)))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{info.st_size}")
            self.end_headers()
            if with_body:
                self._send_body_of_origin(first, length) if self.path[1:] in self.origins else self._send_body(
                    fd, first, length
                )
        finally:
            os.close(fd)

    def _send_body_of_origin(self, offset: int, length: int) -> None:
        where = urlsplit(self.origins[self.path[1:]])
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(str(where.hostname), where.port, timeout=60)
        self.upstream.request("GET", where.path, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        answer = self.upstream.getresponse()
        try:
            while piece := answer.read(PIECE_BYTES):
                self.wfile.write(piece)
                length -= len(piece)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has enough
            pass
        if length or answer.status != HTTPStatus.PARTIAL_CONTENT:
            self.close_connection = True

    def finish(self) -> None:
        """End what the connection had open."""
        if self.upstream is not None:
            self.upstream.close()
        super().finish()

    def _send_body(self, fd: int, offset: int, length: int) -> None:
        try:
            while length:
                sent = os.sendfile(self.connection.fileno(), fd, offset, length)
                offset, length = offset + sent, length - sent
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has enough
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    """A thread a connection; one that breaks is no event."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Say nothing of a connection that broke."""


def main() -> None:
    if len(sys.argv) > 2:
        Handler.origins = json.loads(sys.argv[2])
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=sys.argv[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
