"""`GET /metrics` over HTTP, on an address of its own. Imported late: hypercorn and starlette are slow to load.

It shares the trio loop with the FUSE work, so it is bounded: the text is made at most once in TEXT_KEPT_S, in a
thread, however many ask for it.
"""

import logging
import math
import socket
from collections.abc import Callable, Iterable

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from basefs.control.server import serve_app
from basefs.service.metrics_table import Sample
from basefs.service.metrics_text import CONTENT_TYPE, metrics_text

log = logging.getLogger(__name__)

REQUESTS_MAX = 4
TEXT_KEPT_S = 1.0
BIND_RETRY_S = 2.0
BIND_PATIENCE_S = 5.0
"""A server that is being replaced may hold the port for so long before anybody needs to know."""
BACKLOG = 16


async def serve_metrics(address: tuple[str, int], take: Callable[[], list[Sample]]) -> None:
    """Answer scrapes until cancelled. An address that cannot be had is one WARNING, and tried again and again."""
    listener = await _bound(address)
    text = MetricsText(take)

    async def metrics(_request: Request) -> Response:
        return Response(await text.get(), media_type=CONTENT_TYPE)

    app = Starlette(routes=[Route("/metrics", metrics, methods=["GET"])])
    host, port = listener.getsockname()[:2]
    log.info("metrics are at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
    await serve_app(app, listener.detach(), requests_max=REQUESTS_MAX)


async def _bound(address: tuple[str, int]) -> socket.socket:
    """A listening socket; waits until there is one."""
    warn_at = trio.current_time() + BIND_PATIENCE_S
    while True:
        try:
            return _listen(address)
        except OSError as exc:
            if trio.current_time() >= warn_at:
                log.warning("no metrics: cannot listen on %s port %d: %s; trying again", *address, exc.strerror)
                warn_at = math.inf
        await trio.sleep(BIND_RETRY_S)


def _listen(address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections of the last server, in TIME_WAIT, must not keep the address.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class MetricsText:
    """The text, kept for TEXT_KEPT_S; made once for all who ask meanwhile."""

    def __init__(self, take: Callable[[], Iterable[Sample]]) -> None:
        self._take = take
        self._text = b""
        self._made_at = -math.inf
        self._making = trio.Lock()

    async def get(self) -> bytes:
        """What `GET /metrics` answers, at most TEXT_KEPT_S old."""
        async with self._making:
            if trio.current_time() - self._made_at >= TEXT_KEPT_S:
                self._text = await trio.to_thread.run_sync(metrics_text, self._take())
                self._made_at = trio.current_time()
        return self._text
