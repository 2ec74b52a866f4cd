"""Objects in a store that speaks HTTP, read by range: what the S3 and the Swift store share. For one object each.

What is read is what was opened: each answer is compared with the entity tag of the HEAD that opened it, and each GET
carries it where a server can be expected to heed that.
"""

import http
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TypeVar, TypeVarTuple

import requests
import trio

from basefs import errors
from basefs.concurrency.exchange import Exchange, current_exchange, run_interruptibly
from basefs.concurrency.threads import BlockingCalls
from basefs.core.byte_ranges import range_header
from basefs.sources.base import Deliver
from basefs.sources.bodies import content_length
from basefs.sources.http_errors import retry_after_s, text_of_body, translated
from basefs.sources.range_answers import pieces_of_206

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TIMEOUTS_S = (5.0, 8.0)
"""To connect; and the longest silence, also inside an answer: a guest waits, and other sources may be asked."""
SILENCE_S = 10.0
"""Longest time without a whole piece of an answer: TIMEOUTS_S does not see a head that comes a byte at a time."""
_ERROR_PAGE_BYTES_MAX = 4096
_GONE = (
    http.HTTPStatus.NOT_FOUND,
    http.HTTPStatus.GONE,
    http.HTTPStatus.PRECONDITION_FAILED,
    # The range lies inside of what was opened.
    http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
)
_REFUSED = (http.HTTPStatus.BAD_REQUEST, http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
"""400 too: S3 says so to credentials that expired and to a wrong region, and our requests are always the same."""

_MANIFEST_HEADERS = ("X-Object-Manifest", "X-Static-Large-Object")
"""Of a large object in Swift, dynamic and static."""

Send = Callable[[str, Mapping[str, str]], requests.Response]
"""`send(method, headers)` asks for one object, follows no redirect, reads no body; in a thread. Raises our errors."""
Explain = Callable[[bytes], str]
"""What an error page of the store says, without anything that is secret."""


class HttpObjects:
    """A store's threads and counters; the base of such stores."""

    def __init__(self, thread_name: str, *, threads_max: int, explain: Explain = text_of_body) -> None:
        self.requests = 0
        self.received_bytes = 0
        self.explain = explain
        self._threads = BlockingCalls(thread_name, threads_max=threads_max)
        # The counters are the only state that the threads share.
        self._counting = threading.Lock()

    async def call(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)` in a thread. Cancellation: shuts its connection down, and waits for the thread."""
        exchange = Exchange()

        async def end_silence() -> None:
            """Runs until it is cancelled."""
            # Threads tell signs of life by a plain store, not by an event. (-inf before the thread has begun.)
            while (quiet_s := time.monotonic() - exchange.alive_at) < SILENCE_S:  # noqa: ASYNC110
                await trio.sleep(min(SILENCE_S, SILENCE_S - quiet_s))
            exchange.interrupt()
            await trio.sleep_forever()

        return await run_interruptibly(self._threads, fn, *args, exchange=exchange, meanwhile=end_silence)

    def sent(self) -> None:
        """A request goes out. For threads."""
        with self._counting:
            self.requests += 1

    def came(self, length: int) -> None:
        """So many bytes of a body came. For threads."""
        with self._counting:
            self.received_bytes += length
        exchange = current_exchange()
        if exchange is not None:
            exchange.alive_at = time.monotonic()


class HttpObject:
    """`StoreObject` over HTTP. Made by `open_object`."""

    def __init__(self, store: HttpObjects, what: str, send: Send, size: int, headers: Mapping[str, str]) -> None:
        self.size = size
        self._store = store
        self._what = what
        self._send = send
        self._seen = _identity(headers)
        tag = self._seen.get("ETag", "")
        # A weak tag fits no If-Match, and radosgw compares it with the manifest's own, which it tells nobody: 412 for
        # each large object of Swift. The answer's tag is compared anyway. Swift tells tags without their quotes.
        is_plain = tag and not tag.startswith("W/") and not any(name in headers for name in _MANIFEST_HEADERS)
        self._condition = {"If-Match": f'"{tag.strip(chr(34))}"'} if is_plain else {}

    async def fetch_range(self, *, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        """See `StoreObject`. Cancellation: shuts the connection down, and waits for the thread."""
        await self._store.call(self._fetch, offset, length, piece_bytes, deliver)

    async def close(self) -> None:
        """See `StoreObject`. There is nothing to let go of: connections are the store's."""

    def _fetch(self, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        what = f"{self._what}, bytes {offset} to {offset + length - 1}"
        headers = {"Range": range_header(offset, length), "Accept-Encoding": "identity", **self._condition}
        self._store.sent()
        with closing(self._send("GET", headers)) as response:
            self._check(response, what)
            for piece in pieces_of_206(
                response,
                what,
                who="the store",
                size=self.size,
                offset=offset,
                length=length,
                piece_bytes=piece_bytes,
                came=self._store.came,
            ):
                if not deliver(offset, piece):
                    return
                offset += len(piece)

    def _check(self, response: requests.Response, what: str) -> None:
        """Return for a 206 of the object that was opened."""
        if response.status_code == http.HTTPStatus.OK:
            raise errors.RangeNotHonouredError(f"{what}: the store answered 200, the whole object, to a Range")
        if response.status_code != http.HTTPStatus.PARTIAL_CONTENT:
            raise _error_of(response, what, self._store.explain)
        if any(response.headers.get(name, "").strip('"') != value.strip('"') for name, value in self._seen.items()):
            raise errors.StoreGoneError(f"{what}: the object was replaced since it was opened")


async def open_object(store: HttpObjects, what: str, send: Send, size: int) -> HttpObject:
    """The object that a HEAD finds; `what` names it for people, and is no secret.

    Raises: as `Store.open`.
    """
    return await store.call(_open, store, what, send, size)


def _open(store: HttpObjects, what: str, send: Send, size: int) -> HttpObject:
    store.sent()
    with closing(send("HEAD", {"Accept-Encoding": "identity"})) as response:
        if response.status_code != http.HTTPStatus.OK:
            raise _error_of(response, what, store.explain)
        stated = content_length(response, what)
        if stated is None:
            raise errors.RangeNotHonouredError(f"{what}: the store does not tell the object's length")
        if stated != size:
            raise errors.SourceCorruptError(f"{what}: the store has {stated} bytes, the image's metadata say {size}")
        return HttpObject(store, what, send, size, response.headers)


def _identity(headers: Mapping[str, str]) -> dict[str, str]:
    """What tells one object from another under the same name: its entity tag, else when it was written."""
    for name in ("ETag", "X-Timestamp", "Last-Modified"):
        value = headers.get(name, "")
        if value:
            return {name: value}
    return {}


def _error_of(response: requests.Response, what: str, explain: Explain) -> errors.BasefsError:
    """The error that an answer without the bytes means."""
    status = response.status_code
    with translated(what):
        page = response.raw.read(_ERROR_PAGE_BYTES_MAX, decode_content=False)
    detail = explain(page)
    message = f"{what}: the store answered {status}" + (f" ({detail})" if detail else "")
    if status in _GONE:
        return errors.StoreGoneError(message)
    if status in _REFUSED:
        return errors.SourceForbiddenError(message)
    # 3xx too: no redirect is followed.
    is_server_error = status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
    return errors.SourceUnavailableError(
        message, retry_after_s=retry_after_s(response.headers), may_be_away=is_server_error
    )
