"""web_origin.py FD DIRECTORY LIFELINE_FD: a web server with ranges, the origin that Glance's http store reads from."""

import functools
import http.server
import os
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.peers.range_server import Handler


def end_with(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os._exit(0)


class Server(http.server.ThreadingHTTPServer):
    """Listens on a socket that was handed over."""

    def __init__(self, listening: socket.socket, directory: str) -> None:
        handler = functools.partial(Handler, directory=directory)
        super().__init__(listening.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening


def main() -> None:
    listen_fd, directory, lifeline_fd = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if lifeline_fd >= 0:
        threading.Thread(target=end_with, args=(lifeline_fd,), daemon=True).start()
    Server(socket.socket(fileno=listen_fd), directory).serve_forever()


main()
