"""Images behind `http://` and `https://` locations, by ranges: Glance's http store, or what users registered.

A location is data from users: nothing is asked but of hosts that the operator allows (`[http_location] allowed_hosts`),
whose paths say nothing of images, so allowing a host allows all of it. The object that was opened is known by its ETag,
else by its date; every answer has to be about that one.
"""

import http
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from basefs import errors
from basefs.concurrency.exchange import run_interruptibly
from basefs.concurrency.threads import BlockingCalls
from basefs.core.addresses import PORTS, AllowedHosts, plain_host
from basefs.core.byte_ranges import parse_content_range, range_header
from basefs.sources.base import Deliver
from basefs.sources.guarded_http import guarded_session
from basefs.sources.http_errors import error_of_status, retry_after_s, translated
from basefs.sources.range_answers import pieces_of_206
from basefs.sources.store import StoreName

TIMEOUTS_S = (3.0, 10.0)
"""To connect, and the longest silence; who reads has given up before."""
WHO = "the web server"
_GONE = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE)


@dataclass(frozen=True, slots=True)
class _Place:
    """A location, taken apart once: what is checked is what is asked for."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, which may be a secret."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if PORTS[self.scheme] == self.port else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def _place_of(location: str) -> _Place:
    """Raises ValueError, without any part of the location, if it is none that is asked for."""
    if not all("!" <= char <= "~" for char in location) or "\\" in location:
        raise ValueError("it holds characters that no URL has")
    try:
        parts = urlsplit(location)
        port = parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    scheme = parts.scheme.lower()
    if scheme not in PORTS:
        raise ValueError("its scheme is not http or https")
    if "@" in parts.netloc:
        raise ValueError("it holds a user or password, which is sent nowhere")
    if parts.fragment:
        raise ValueError("it has a fragment")
    host = plain_host(parts.hostname or "")
    if host is None or port == 0:
        raise ValueError("it has no plain host and port")
    query = f"?{parts.query}" if parts.query else ""
    return _Place(scheme, host, port or PORTS[scheme], (parts.path or "/") + query)


class HttpStore:
    """See `Store`."""

    def __init__(self, hosts: AllowedHosts, *, cafile: str | None, insecure: bool, threads_max: int) -> None:
        self.name: StoreName = "http"
        self.missing: str | None = None
        self.requests = 0
        self.received_bytes = 0
        self._hosts = hosts
        self._session = guarded_session(
            hosts, verify=False if insecure else cafile or True, connections_max=threads_max
        )
        self._threads = BlockingCalls("web servers", threads_max=threads_max)
        # The counters are the only state that the threads share.
        self._counting = threading.Lock()

    def refusal(self, image_id: str, location: str) -> str | None:  # noqa: ARG002  paths say nothing of images
        """See `Store.refusal`."""
        try:
            place = _place_of(location)
        except ValueError as exc:
            return str(exc)
        if not self._hosts.allows(place.scheme, place.host, place.port):
            return "its host is not in [http_location] allowed_hosts"
        return None

    async def open(self, location: str, *, image_id: str, size: int) -> "HttpObject":
        """See `Store.open`: one request, for the first byte."""
        found = HttpObject(self, _place_of(location), image_id, size)
        await self.call(found.look)
        return found

    async def call(self, fn: Callable[[], None]) -> None:
        """`fn()` in a thread; cancelled, its connection is shut down."""
        await run_interruptibly(self._threads, fn)

    @contextmanager
    def answer(self, place: _Place, headers: dict[str, str]) -> Iterator[requests.Response]:
        """The answer to a GET, its body not yet read. For threads."""
        with self._counting:
            self.requests += 1
        headers = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "basefs", **headers}
        with translated(f"GET from {place.host}"):
            response = self._session.get(
                place.url, headers=headers, stream=True, timeout=TIMEOUTS_S, allow_redirects=False
            )
        with closing(response):
            yield response

    def came(self, length: int) -> None:
        """So many bytes came of a body. For threads."""
        with self._counting:
            self.received_bytes += length

    async def close(self) -> None:
        """See `Store.close`."""
        self._session.close()


class HttpObject:
    """See `StoreObject`; `look` first. Without ETag and date of a server only the size tells objects apart."""

    def __init__(self, store: HttpStore, place: _Place, image_id: str, size: int) -> None:
        self.size = size
        self._store = store
        self._place = place
        self._what = f"image {image_id} at {place.host}"
        self._identity: tuple[str | None, str | None] = (None, None)
        """ETag and Last-Modified of the answer to `look`."""

    def look(self) -> None:
        """Ask for the first byte: whether the object is there, as long as it should be, and read by ranges.

        Raises:
            SourceError: see `Store.open`.
        """
        with self._store.answer(self._place, {"Range": range_header(0, 1)}) as response:
            self._check_status(response)
            self._identity = _identity_of(response)
            for _ in self._pieces(response, 0, 1, 1):
                pass
            if parse_content_range(response.headers["Content-Range"]).total is None:
                raise errors.RangeNotHonouredError(f"{self._what}: {WHO} does not tell the size of what it has")

    async def fetch_range(self, *, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        """See `StoreObject.fetch_range`."""
        await self._store.call(lambda: self._fetch(offset, length, piece_bytes, deliver))

    def _fetch(self, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        headers = {"Range": range_header(offset, length)}
        etag, _ = self._identity
        if etag is not None and not etag.startswith("W/"):  # a weak one never matches
            headers["If-Match"] = etag
        with self._store.answer(self._place, headers) as response:
            self._check_status(response)
            if _identity_of(response) != self._identity:
                raise errors.StoreGoneError(f"{self._what}: {WHO} has another object there now")
            for piece in self._pieces(response, offset, length, piece_bytes):
                if not deliver(offset, piece):
                    return
                offset += len(piece)

    def _pieces(self, response: requests.Response, offset: int, length: int, piece_bytes: int) -> Iterator[memoryview]:
        return pieces_of_206(
            response,
            self._what,
            who=WHO,
            size=self.size,
            offset=offset,
            length=length,
            piece_bytes=piece_bytes,
            came=self._store.came,
        )

    def _check_status(self, response: requests.Response) -> None:
        """Return for a 206; the error that another answer means is raised."""
        status = response.status_code
        if status == http.HTTPStatus.PARTIAL_CONTENT:
            return
        said = f"{self._what}: {WHO} answered {status}"
        if status in _GONE:
            raise errors.StoreGoneError(said)
        if status == http.HTTPStatus.PRECONDITION_FAILED:
            raise errors.StoreGoneError(f"{said}: it has another object there now")
        if response.is_redirect or http.HTTPStatus.MULTIPLE_CHOICES <= status < http.HTTPStatus.BAD_REQUEST:
            raise errors.SourceForbiddenError(f"{said}: redirects are not followed")
        if status == http.HTTPStatus.OK:
            raise errors.RangeNotHonouredError(f"{said}, the whole object, to a Range")
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise errors.SourceCorruptError(f"{said}: it has fewer bytes than the image")
        raise error_of_status(status, self._what, retry_after=retry_after_s(response.headers), who=WHO)

    async def close(self) -> None:
        """See `StoreObject.close`: connections are the store's."""


def _identity_of(response: requests.Response) -> tuple[str | None, str | None]:
    etag = response.headers.get("ETag")
    # Servers behind one name may have written the file at different times, and agree on what it is.
    return etag, None if etag is not None else response.headers.get("Last-Modified")
