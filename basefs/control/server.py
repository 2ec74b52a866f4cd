"""The control socket: HTTP over a Unix socket that only its owner may use, for the commands.

It shares the trio loop with the FUSE work, so it is bounded: at most REQUESTS_MAX requests at a time, of request bodies
only a boot trace is read, FILE_BYTES_MAX within BODY_DEADLINE_S at most, and a client that goes away ends what was done
for it alone.
"""

import functools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from basefs.control.api import API_PREFIX, MAP_CELLS_MAX, ServiceView
from basefs.control.listener import ControlListener
from basefs.core.trace_file import FILE_BYTES_MAX
from basefs.errors import (
    AmbiguousImageError,
    BadTraceError,
    BasefsError,
    DeadlineExceededError,
    ImageBusyError,
    ImageNotFoundError,
    ImageRefusedError,
    NoSuchEntryError,
    SourceError,
)

log = logging.getLogger(__name__)

REQUESTS_MAX = 32
HEAD_BYTES_MAX = 16 * 1024
IDLE_S = 30.0
BODY_DEADLINE_S = 10.0

STATUS_OF: dict[type[BasefsError], int] = {
    ImageNotFoundError: 404,
    NoSuchEntryError: 404,
    AmbiguousImageError: 409,
    BadTraceError: 400,
    ImageBusyError: 409,
    ImageRefusedError: 409,
    SourceError: 503,
    DeadlineExceededError: 503,
}


async def serve_control(
    view: ServiceView, listener: ControlListener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer commands until cancelled; `task_status.started()` when they are being answered.

    Belongs in the service nursery. The socket file is removed at the end.
    """
    try:
        async with trio.open_nursery() as nursery:
            # hypercorn takes over the descriptor and closes it.
            await nursery.start(
                functools.partial(serve_app, _application(view), listener.detach(), requests_max=REQUESTS_MAX)
            )
            task_status.started()
    finally:
        listener.close()


async def serve_app(
    app: ASGIApp, listening_fd: int, *, requests_max: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve `app` on a listening socket, whose descriptor is closed at the end; until cancelled."""
    config = Config()
    config.bind = [f"fd://{listening_fd}"]
    config.errorlog = _http_log()
    config.keep_alive_timeout = IDLE_S
    config.read_timeout = None
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    config.graceful_timeout = 0.0
    config.include_server_header = False
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve_http, _Bounded(app, requests_max=requests_max), config)
        task_status.started()


async def _serve_http(app: ASGIApp, config: Config, *, task_status: trio.TaskStatus[list[str]]) -> None:
    await serve(app, config, task_status=task_status, mode="asgi")  # type: ignore[arg-type]  # two spellings of ASGI


class _Commands:
    """What a request of each route does with the service."""

    def __init__(self, view: ServiceView) -> None:
        self._view = view

    async def status(self, _request: Request) -> Response:
        return JSONResponse(self._view.status())

    async def images(self, _request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(self._view.images())

    async def image(self, request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(self._view.image(request.path_params["ref"]))

    async def image_map(self, request: Request) -> Response:
        await self._view.wait_known()
        cells = request.query_params.get("cells", "")
        # Not int(): that takes `1_0` and other scripts' digits.
        if not (cells.isascii() and cells.isdigit() and len(cells) < 6 and 1 <= int(cells) <= MAP_CELLS_MAX):
            return JSONResponse({"error": f"cells: {cells[:20]!r} is no number from 1 to {MAP_CELLS_MAX}"}, 400)
        return JSONResponse(await self._view.image_map(request.path_params["ref"], cells_max=int(cells)))

    async def warm(self, request: Request) -> Response:
        await self._view.wait_known()
        ref = request.path_params["ref"]
        if request.query_params.get("what") == "boot":
            return _ProgressResponse(self._view.warm_boot(ref))
        if request.query_params.get("wait", "true") == "true":
            return _ProgressResponse(self._view.warm(ref))
        return JSONResponse(await self._view.start_warm(ref), status_code=202)

    async def verify(self, request: Request) -> Response:
        await self._view.wait_known()
        return _ProgressResponse(self._view.verify(request.path_params.get("ref")))

    async def drain(self, _request: Request) -> Response:
        return _ProgressResponse(self._view.drain())

    async def traces(self, _request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(await self._view.traces())

    async def trace(self, request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(await self._view.trace(request.path_params["ref"]))

    async def put_trace(self, request: Request) -> Response:
        await self._view.wait_known()
        data = b""
        try:
            with trio.move_on_after(BODY_DEADLINE_S) as waiting:
                async with aclosing(request.stream()) as body:
                    while len(data) <= FILE_BYTES_MAX and (piece := await anext(body, b"")):
                        data += piece
        except ClientDisconnect:
            raise BadTraceError("it did not come whole") from None
        if waiting.cancelled_caught:
            raise BadTraceError(f"it did not come within {BODY_DEADLINE_S:g} s")
        if len(data) > FILE_BYTES_MAX:
            raise BadTraceError(f"it is longer than a boot trace may be ({FILE_BYTES_MAX} bytes)")
        return JSONResponse(await self._view.put_trace(request.path_params["ref"], data))

    async def evict(self, request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(await self._view.evict(request.path_params["ref"]))

    async def detach(self, request: Request) -> Response:
        await self._view.wait_known()
        force = request.query_params.get("force", "false") == "true"
        return JSONResponse(await self._view.detach(request.path_params["ref"], force=force))

    async def pin(self, request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(self._view.pin(request.path_params["ref"], pinned=True))

    async def unpin(self, request: Request) -> Response:
        await self._view.wait_known()
        return JSONResponse(self._view.pin(request.path_params["ref"], pinned=False))


def _application(view: ServiceView) -> Starlette:
    """The routes of docs/OPERATIONS.md over `view`."""
    commands = _Commands(view)
    # Image names may hold slashes: the reference is what lies between the prefix and the verb.
    application = Starlette(
        routes=[
            Route(f"{API_PREFIX}/status", commands.status, methods=["GET"]),
            Route(f"{API_PREFIX}/images", commands.images, methods=["GET"]),
            # Not under /images: GET has no verb there, and `x/map` may be an image's name.
            Route(f"{API_PREFIX}/maps/{{ref:path}}", commands.image_map, methods=["GET"]),
            Route(f"{API_PREFIX}/traces", commands.traces, methods=["GET"]),
            Route(f"{API_PREFIX}/traces/{{ref:path}}", commands.trace, methods=["GET"]),
            Route(f"{API_PREFIX}/traces/{{ref:path}}", commands.put_trace, methods=["PUT"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/warm", commands.warm, methods=["POST"]),
            Route(f"{API_PREFIX}/drain", commands.drain, methods=["POST"]),
            Route(f"{API_PREFIX}/verify", commands.verify, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/verify", commands.verify, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/evict", commands.evict, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/detach", commands.detach, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/pin", commands.pin, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}/unpin", commands.unpin, methods=["POST"]),
            Route(f"{API_PREFIX}/images/{{ref:path}}", commands.image, methods=["GET"]),
        ],
        exception_handlers={BasefsError: _answer_error},
    )
    # `v1/maps` is no other name of `v1/maps/`; starlette's redirect would stumble over a query that is no UTF-8.
    application.router.redirect_slashes = False
    return application


async def _answer_error(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, BasefsError)
    return JSONResponse({"error": str(exc)}, status_code=status_of(exc))


def status_of(exc: BasefsError) -> int:
    """The HTTP status that tells a client which kind of error it was; 500 for what it cannot act on."""
    return next((status for kind, status in STATUS_OF.items() if isinstance(exc, kind)), 500)


class _Bounded:
    """At most `requests_max` requests at a time; further ones are told to come back, not queued."""

    def __init__(self, app: ASGIApp, *, requests_max: int) -> None:
        self._app = app
        self._requests_max = requests_max
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._requests >= self._requests_max and scope["type"] == "http":
            refusal = JSONResponse({"error": f"{self._requests_max} requests are under way; try again"}, 503)
            await refusal(scope, receive, send)
            return

        async def send_if_there(message: Message) -> None:
            # hypercorn closes a connection while it is sending on it when the client goes away just then.
            try:
                await send(message)
            except (trio.BusyResourceError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                log.debug("a client went away before its answer was sent: %s", exc)

        self._requests += 1
        try:
            await self._app(scope, receive, send_if_there)
        finally:
            self._requests -= 1


class _ProgressResponse(Response):
    """One JSON line for each item of the generator, which is closed when the client goes away.

    An error before the first item is the whole answer; a later one becomes a last line with the state `failed`.
    """

    def __init__(self, progress: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__()
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_disconnect, receive, nursery.cancel_scope)
            async with aclosing(self._progress) as progress:
                await self._send_all(progress, scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _send_all(
        self, progress: AsyncGenerator[dict[str, Any], None], scope: Scope, receive: Receive, send: Send
    ) -> None:
        last: dict[str, Any] | None = None
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]}
        try:
            async for item in progress:
                if last is None:
                    await send(start)
                last = item
                await _send_line(send, item)
        except BasefsError as exc:
            if last is None:
                await JSONResponse({"error": str(exc)}, status_code=status_of(exc))(scope, receive, send)
                return
            await _send_line(send, {**last, "state": "failed", "error": str(exc)})
        if last is None:
            await send(start)
        await send({"type": "http.response.body", "body": b""})


async def _send_line(send: Callable[[dict[str, Any]], Awaitable[None]], item: dict[str, Any]) -> None:
    line = json.dumps(item).encode() + b"\n"
    await send({"type": "http.response.body", "body": line, "more_body": True})


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _http_log() -> logging.Logger:
    """Where hypercorn complains; its notes on connections are nobody's business."""
    http_log = logging.getLogger("basefs.control.http")
    http_log.setLevel(logging.WARNING)
    return http_log
