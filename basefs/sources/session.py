"""The keystoneauth session with Glance: our time-outs, signs of life, and no answer that is not Glance's."""

import http
import time
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import plugin, session

from basefs import errors
from basefs.concurrency.exchange import EndpointName, InterruptibleAdapter, asking, current_exchange
from basefs.core.safe_text import safe_text
from basefs.sources.request_stats import HttpStats, request_kind

TlsVersion = Literal["1.2", "1.3"] | None
CONNECT_TIMEOUT_S = 5.0
INACTIVITY_TIMEOUT_S = 20.0
"""Longest silence in the middle of an answer; a slow but steady body may take as long as it likes.

Shorter than a guest waits (SCSI: 30 s), longer than Glance needs to attach a volume for its cinder store.
"""
REQUEST_ID = "X-Openstack-Request-Id"
"""Glance puts it on each of its answers, and nothing that stands before Glance does."""
_GATEWAY_STATUSES = (502, 503, 504)


class GlanceSession(session.Session):
    """A keystoneauth session with our time-outs, and endpoints without a version.

    python-glanceclient and we append `/v2/...`; catalogs written for older clients end in `/v2` already.
    """

    answered_at: float = float("-inf")
    """`time.monotonic()` of the last answer of Glance itself (no gateway's 502, 503 or 504)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  keystoneauth's own signature
        super().__init__(*args, **kwargs)
        self.stats = HttpStats()
        self.on_life: Callable[[EndpointName], None] = lambda _name: None
        """Called in the thread when an endpoint has answered, with no error of its server."""

    def request(  # type: ignore[override]  # 25 more keywords, handed on as they come
        self,
        url: str,
        method: str,
        **kwargs: Any,  # noqa: ANN401  keystoneauth's own signature
    ) -> requests.Response:
        """See keystoneauth; a call without `timeout` gets ours unless the operator set one."""
        if self.timeout is None:
            kwargs.setdefault("timeout", (CONNECT_TIMEOUT_S, INACTIVITY_TIMEOUT_S))
        if not url.endswith("/file"):
            # python-glanceclient asks for all as a stream, and leaves connections open over answers it refuses.
            kwargs["stream"] = False
        is_to_glance = kwargs.get("endpoint_filter") is not None or kwargs.get("endpoint_override") is not None
        kind = request_kind(url, kwargs.get("headers"), is_to_glance=is_to_glance)
        # After a 401 or a redirect keystoneauth asks again, and leaves the answer before open: with a stream, the
        # connection, too.
        answers: list[requests.Response] = []
        kwargs["hooks"] = {"response": lambda answer, **_kwargs: answers.append(answer)}
        began = time.monotonic()
        response: requests.Response | None = None
        try:
            response = super().request(url, method, **kwargs)
        except (ksa.ClientException, requests.RequestException, OSError) as exc:
            self.stats.add(kind, getattr(exc, "http_status", None) or None, time.monotonic() - began)
            raise
        finally:
            for answer in answers:
                if answer is not response:
                    answer.close()
            answers.clear()  # they know the hook, which knows the list
        self.stats.add(kind, response.status_code, time.monotonic() - began)
        if is_to_glance and response.status_code not in _GATEWAY_STATUSES:
            self.answered_at = time.monotonic()
        if response.status_code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            self.is_alive("glance" if is_to_glance else "keystone")
        if is_to_glance and not url.endswith("/file") and not is_word_of_glance(response):
            raise errors.SourceUnavailableError(f"{method} {safe_text(url)}: something before Glance answered 404")
        return response

    def is_alive(self, name: EndpointName) -> None:
        """Something came from the endpoint. For threads."""
        exchange = current_exchange()
        if exchange is not None:
            exchange.alive_at = time.monotonic()
        self.on_life(name)

    def get_auth_headers(
        self,
        auth: plugin.BaseAuthPlugin | None = None,
        **kwargs: Any,  # noqa: ANN401  keystoneauth's own signature
    ) -> dict[str, str] | None:
        """See keystoneauth; a failure is noted as Keystone's."""
        with asking("keystone"):
            headers: dict[str, str] | None = super().get_auth_headers(auth, **kwargs)
            return headers

    def get_endpoint(
        self,
        auth: plugin.BaseAuthPlugin | None = None,
        **kwargs: Any,  # noqa: ANN401  keystoneauth's own signature
    ) -> str | None:
        """See keystoneauth; without a version at the end."""
        with asking("keystone"):
            return without_version(super().get_endpoint(auth, **kwargs))


def is_word_of_glance(response: requests.Response) -> bool:
    """False for a 404 that a proxy, a wrong endpoint or a web server gave: it says nothing about an image."""
    return response.status_code != http.HTTPStatus.NOT_FOUND or REQUEST_ID in response.headers


class _HttpSession(requests.Session):
    """A `requests` session that looks for proxies and CA bundles in the environment once for each server.

    `requests` does so for each request, which took a third of the processor time of a small one.
    """

    def __init__(self) -> None:
        super().__init__()
        # An `auth` of any kind keeps it from looking into ~/.netrc, too.
        self.auth = _unchanged
        self._environment: dict[tuple[object, ...], dict[str, Any]] = {}

    def merge_environment_settings(  # type: ignore[override]  # of five arguments, unnamed in its types
        self,
        url: str,
        proxies: Any,  # noqa: ANN401  requests' own signature
        stream: bool | None,
        verify: Any,  # noqa: ANN401
        cert: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """See requests."""
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc, stream, verify, cert)
        if key not in self._environment:
            self._environment[key] = dict(super().merge_environment_settings(url, proxies, stream, verify, cert))
        return dict(self._environment[key])


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def http_session(tls_ciphers: str | None, tls_min_version: TlsVersion, *, connections_max: int) -> requests.Session:
    """A `requests` session that keeps a connection for each of our threads."""
    http = _HttpSession()
    adapter = InterruptibleAdapter(
        tls_ciphers=tls_ciphers,
        tls_min_version=tls_min_version,
        pool_connections=4,
        pool_maxsize=connections_max,
    )
    for scheme in list(http.adapters):
        http.mount(scheme, adapter)
    return http


def without_version(endpoint: str | None) -> str | None:
    """The URL without `/v1` or `/v2` at its end."""
    if endpoint is None:
        return None
    endpoint = endpoint.rstrip("/")
    head, _, tail = endpoint.rpartition("/")
    return head if tail in ("v1", "v2") else endpoint
