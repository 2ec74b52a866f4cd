"""A ranged request of the HTTP cache in front of Glance (`[glance] cache_endpoint`): what must be true of its answer.

Connections of its own, so that nothing that the tier does is taken for Glance's doing. Only image bytes are asked for,
always as `GET <endpoint>/v2/images/<id>/file` with `Range: bytes=<first>-<last>`: one spelling for one thing, for a
cache's sake. It gets the token that Glance would get, and never follows a redirect with it.
"""

import http
import threading
import time
from contextlib import closing
from urllib.parse import quote

import requests
from oslo_config import cfg

from basefs import errors
from basefs.concurrency.exchange import Exchange, current_exchange, run_interruptibly
from basefs.concurrency.threads import BlockingCalls
from basefs.core.byte_ranges import range_header
from basefs.core.safe_text import safe_text
from basefs.sources.access import GlanceAccess
from basefs.sources.base import Deliver
from basefs.sources.bodies import check_content_range, content_length
from basefs.sources.body_pieces import Body
from basefs.sources.http_errors import translated
from basefs.sources.session import http_session

CONNECT_TIMEOUT_S = 2.0
"""Shorter than Glance's: a tier is near, and Glance is asked next."""
SILENCE_S = 12.0
"""Longest wait for the answer's head, and silence in its body. A tier that waits for Glance gives up before (nginx: 10
s), and a guest's disk driver later (SCSI: 30 s), so there is time to ask Glance."""


class CacheTier:
    """The tier at `url`, asked from threads of its own, with the token and the TLS settings of `access`."""

    def __init__(self, access: GlanceAccess, connections: requests.Session, url: str, *, threads_max: int) -> None:
        self.url = url
        self.requests = 0
        self.received_bytes = 0
        self._access = access
        self._connections = connections
        self._threads = BlockingCalls("cache-tier", threads_max=threads_max)
        # The counters are the only state that the threads share.
        self._counting = threading.Lock()

    async def fetch_range(
        self, image_id: str, *, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver
    ) -> None:
        """See `ImageSource.fetch_range`. A status says nothing about the image, for it may be the tier's own.

        Raises:
            SourceUnavailableError: no bytes, or not all; `may_be_away` where the tier itself did not answer.
            SourceCorruptError, RangeNotHonouredError: other bytes than asked for; none was delivered.
            SourceForbiddenError, SourceUnavailableError (without `may_be_away`): there is no token to ask with.
        """
        exchange = Exchange()
        try:
            await run_interruptibly(
                self._threads, self._fetch, image_id, size, offset, length, piece_bytes, deliver, exchange=exchange
            )
        except errors.SourceUnavailableError as exc:
            if exchange.endpoint == "keystone" and exc.may_be_away:
                # Not the tier's fault. Glance's own way asks for a token, too, and keeps account of Keystone.
                raise errors.SourceUnavailableError(str(exc)) from exc
            raise

    def close(self) -> None:
        """Close idle connections: they may lead to a host that is no more."""
        self._connections.close()

    # --- in threads ----------------------------------------------------------------------------------

    def _fetch(self, image_id: str, size: int, offset: int, length: int, piece_bytes: int, deliver: Deliver) -> None:
        what = f"image {image_id}, bytes {offset} to {offset + length - 1}, from the cache tier"
        with translated(what), closing(self._get(image_id, offset, length)) as response:
            if response.status_code != http.HTTPStatus.PARTIAL_CONTENT:
                raise errors.SourceUnavailableError(f"{what}: it answered {response.status_code}")
            check_content_range(response, what, size, offset, length)
            stated = content_length(response, what)
            if stated != length:
                raise errors.SourceCorruptError(f"{what}: it says that {stated} bytes come")
            for piece in Body(response, what, self._came).pieces(length, piece_bytes):
                if not deliver(offset, piece):
                    return
                offset += len(piece)

    def _get(self, image_id: str, offset: int, length: int) -> requests.Response:
        session = self._access.session
        headers = {
            **(session.get_auth_headers() or {}),
            "Accept-Encoding": "identity",
            "Accept": "application/octet-stream",
            "Range": range_header(offset, length),
        }
        with self._counting:
            self.requests += 1
        return self._connections.get(
            f"{self.url}/v2/images/{quote(image_id, safe='')}/file",
            headers=headers,
            stream=True,
            allow_redirects=False,
            timeout=(CONNECT_TIMEOUT_S, SILENCE_S),
            verify=session.verify,
            cert=session.cert,
        )

    def _came(self, length: int) -> None:
        with self._counting:
            self.received_bytes += length
        exchange = current_exchange()
        if exchange is not None:
            exchange.alive_at = time.monotonic()


def open_tier(conf: cfg.ConfigOpts, access: GlanceAccess, *, threads_max: int) -> CacheTier | None:
    """The tier that `[glance] cache_endpoint` names; None without one. Nothing is sent yet.

    Raises:
        ConfigError: The TLS options cannot be used.
    """
    section = conf.glance
    if not section.cache_endpoint:
        return None
    try:
        connections = http_session(section.tls_ciphers, section.tls_min_version, connections_max=threads_max)
    except (TypeError, ValueError) as exc:
        raise errors.ConfigError(f"[glance]: {safe_text(str(exc))}") from exc
    connections.headers["User-Agent"] = "basefs"
    return CacheTier(access, connections, section.cache_endpoint.rstrip("/"), threads_max=threads_max)
