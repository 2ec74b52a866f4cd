"""Image bytes over the Glance API: ranged GETs, and whole images where the store answers no ranges.

A 206 proves nothing by itself: status, Content-Range and the number of bytes are checked before the first
piece is delivered. There is no retry here; whoever wants the bytes knows how long it may wait.
"""

import http
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import quote

import requests

from basefs import errors
from basefs.concurrency.exchange import current_exchange
from basefs.concurrency.threads import BlockingCalls
from basefs.core.byte_ranges import range_header
from basefs.sources.access import GlanceAccess
from basefs.sources.base import Deliver, Digest, ProbeResult, new_hasher
from basefs.sources.bodies import content_length
from basefs.sources.body_pieces import Body
from basefs.sources.http_errors import error_of_status, retry_after_s, text_of_body, translated
from basefs.sources.range_answers import pieces_of_206
from basefs.sources.session import is_word_of_glance

RANGED_REASON = "Glance answered a Range with exactly its bytes"
_ERROR_PAGE_BYTES_MAX = 4096
_RANGE_REFUSED = (
    http.HTTPStatus.OK,
    http.HTTPStatus.BAD_REQUEST,
    http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
)


class GlanceSource:
    """`ImageSource` over one `GlanceAccess`."""

    def __init__(self, access: GlanceAccess, *, threads_max: int) -> None:
        self.requests = 0
        self.received_bytes = 0
        self._access = access
        self._threads = BlockingCalls("glance", threads_max=threads_max)
        # The counters are the only state that the threads share.
        self._counting = threading.Lock()

    async def probe(self, image_id: str, *, size: int, header_bytes: int) -> ProbeResult:
        """See `ImageSource.probe`."""
        return await self._access.call(self._threads, self._probe, image_id, size, min(header_bytes, size))

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_range`."""
        await self._access.call(self._threads, self._fetch_range, image_id, size, offset, length, piece_bytes, deliver)

    async def fetch_stream(
        self, image_id: str, *, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_stream`. A digest of an algorithm that hashlib does not know is not checked."""
        await self._access.call(self._threads, self._fetch_stream, image_id, size, piece_bytes, digest, deliver)

    # --- in threads ----------------------------------------------------------------------------------

    def _probe(self, image_id: str, size: int, length: int) -> ProbeResult:
        with self._gone_only_if_confirmed(image_id):
            # One odd answer may be a proxy's bad moment, and an image that is streamed is a slow one.
            with suppress(errors.RangeNotHonouredError):
                return self._probe_range(image_id, size, length)
            return self._probe_once(image_id, size, length)

    def _probe_range(self, image_id: str, size: int, length: int) -> ProbeResult:
        """What a range says that is honoured; RangeNotHonouredError otherwise."""
        with closing(self._get(image_id, (0, length))) as response:
            header = self._checked_start(response, image_id, size, length)
            return ProbeResult(kind="ranged", reason=RANGED_REASON, header=header)

    def _probe_once(self, image_id: str, size: int, length: int) -> ProbeResult:
        with closing(self._get(image_id, (0, length))) as response:
            try:
                header = self._checked_start(response, image_id, size, length)
            except errors.RangeNotHonouredError as exc:
                reason = str(exc)
            else:
                return ProbeResult(kind="ranged", reason=RANGED_REASON, header=header)
            if response.status_code == http.HTTPStatus.OK:
                self._check_whole(response, image_id, size)
                return ProbeResult(kind="streamed", reason=reason, header=self._start_of(response, image_id, length))
        with closing(self._get_whole(image_id, size)) as response:
            return ProbeResult(kind="streamed", reason=reason, header=self._start_of(response, image_id, length))

    def _fetch_range(
        self, image_id: str, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        with self._gone_only_if_confirmed(image_id):
            try:
                self._fetch_range_once(image_id, size, offset, length, piece_bytes, deliver)
            except errors.RangeNotHonouredError:
                # Raised before anything was delivered. See `_probe`.
                self._fetch_range_once(image_id, size, offset, length, piece_bytes, deliver)

    def _fetch_range_once(
        self, image_id: str, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        with closing(self._get(image_id, (offset, length))) as response:
            for piece in self._checked_range(response, image_id, size, offset, length, piece_bytes):
                if not deliver(offset, piece):
                    return
                offset += len(piece)

    def _fetch_stream(
        self, image_id: str, size: int, piece_bytes: int, digest: Digest | None, deliver: Deliver
    ) -> None:
        what = f"image {image_id}"
        hasher = None if digest is None else new_hasher(digest.algorithm)
        with self._gone_only_if_confirmed(image_id), closing(self._get_whole(image_id, size)) as response:
            offset = 0
            body = self._body(response, what)
            for piece in body.pieces(size, piece_bytes):
                if not deliver(offset, piece):
                    return
                if hasher is not None:
                    hasher.update(piece)
                offset += len(piece)
            if body.has_more():
                raise errors.SourceCorruptError(f"{what}: Glance sends more than the {size} bytes of the image")
        if hasher is not None and digest is not None and not digest.is_of(hasher):
            raise errors.SourceHashError(f"{what}: the bytes do not have the {digest.algorithm} that Glance states")

    @contextmanager
    def _gone_only_if_confirmed(self, image_id: str) -> Iterator[None]:
        """A 404 to the bytes makes the image gone only where Glance says 404 to its metadata, too."""
        try:
            yield
        except errors.ImageNotFoundError as exc:
            what = f"image {image_id}"
            with closing(self._access.get(f"/v2/images/{quote(image_id, safe='')}", {})) as response:
                if response.status_code == http.HTTPStatus.OK:
                    raise errors.SourceUnavailableError(f"{exc}, but it knows the image") from exc
                raise self._status_error(response, what) from exc

    def _get(self, image_id: str, span: tuple[int, int] | None) -> requests.Response:
        headers = {"Accept-Encoding": "identity", "Accept": "application/octet-stream"}
        if span is not None:
            headers["Range"] = range_header(*span)
        with self._counting:
            self.requests += 1
        return self._access.get(f"/v2/images/{quote(image_id, safe='')}/file", headers)

    def _get_whole(self, image_id: str, size: int) -> requests.Response:
        """The 200 to a plain GET; the caller closes it."""
        response = self._get(image_id, None)
        try:
            self._check_whole(response, image_id, size)
        except BaseException:
            response.close()
            raise
        return response

    def _check_whole(self, response: requests.Response, image_id: str, size: int) -> None:
        what = f"image {image_id}"
        if response.status_code != http.HTTPStatus.OK:
            raise self._status_error(response, what)
        stated = content_length(response, what)
        if stated is not None and stated != size:
            raise errors.SourceCorruptError(f"{what}: Glance sends {stated} bytes, the image's metadata say {size}")

    def _checked_range(
        self, response: requests.Response, image_id: str, size: int, offset: int, length: int, piece_bytes: int
    ) -> Iterator[memoryview]:
        """The body of a 206 in pieces, after it was found to be exactly what was asked for."""
        what = f"image {image_id}, bytes {offset} to {offset + length - 1}"
        if response.status_code != http.HTTPStatus.PARTIAL_CONTENT:
            raise self._range_status_error(response, what)
        yield from pieces_of_206(
            response,
            what,
            who="Glance",
            size=size,
            offset=offset,
            length=length,
            piece_bytes=piece_bytes,
            came=self._came,
        )

    def _checked_start(self, response: requests.Response, image_id: str, size: int, length: int) -> bytes:
        return b"".join(map(bytes, self._checked_range(response, image_id, size, 0, length, length)))

    def _start_of(self, response: requests.Response, image_id: str, length: int) -> bytes:
        return self._body(response, f"image {image_id}").all(length)

    def _body(self, response: requests.Response, what: str) -> Body:
        return Body(response, what, self._came)

    def _came(self, length: int) -> None:
        """So many bytes came of a body; 0: it ended."""
        with self._counting:
            self.received_bytes += length
        self._access.session.is_alive("glance")
        exchange = current_exchange()
        if exchange is not None:
            exchange.is_in_body = True

    def _range_status_error(self, response: requests.Response, what: str) -> errors.BasefsError:
        status = response.status_code
        if status == http.HTTPStatus.OK:
            return errors.RangeNotHonouredError(f"{what}: Glance answered 200, the whole image, to a Range")
        error = self._status_error(response, what)
        if status in _RANGE_REFUSED:
            return errors.RangeNotHonouredError(str(error))
        return error

    def _status_error(self, response: requests.Response, what: str) -> errors.BasefsError:
        """The error that an answer without the bytes means."""
        status = response.status_code
        if status == http.HTTPStatus.NO_CONTENT:
            # What Glance says when the data are gone from the store, or not there yet.
            return errors.SourceCorruptError(f"{what}: Glance answered 204: it has no data of this image")
        if status < http.HTTPStatus.MULTIPLE_CHOICES:
            return errors.SourceCorruptError(f"{what}: Glance answered {status}")
        with translated(what):
            page = response.raw.read(_ERROR_PAGE_BYTES_MAX, decode_content=False)
        if not is_word_of_glance(response):
            return errors.SourceUnavailableError(f"{what}: something before Glance answered 404 ({text_of_body(page)})")
        return error_of_status(status, what, detail=text_of_body(page), retry_after=retry_after_s(response.headers))
