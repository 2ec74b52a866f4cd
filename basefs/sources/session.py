"""The one way to Glance: a keystoneauth session, what it found out about Glance, and who we are there."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, TypeVarTuple
from urllib.parse import urlsplit

import requests
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import loading, noauth, plugin, session
from oslo_config import cfg

from basefs import errors
from basefs.concurrency.threads import BlockingCalls
from basefs.sources.exchange import InterruptibleAdapter, run_interruptibly
from basefs.sources.http_errors import safe_text, translated
from basefs.sources.request_stats import HttpStats, request_kind

TlsVersion = Literal["1.2", "1.3"] | None
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CONNECT_TIMEOUT_S = 5.0
INACTIVITY_TIMEOUT_S = 20.0
"""Longest silence in the middle of an answer; a slow but steady body may take as long as it likes.

Shorter than a guest waits (SCSI: 30 s), longer than Glance needs to attach a volume for its cinder store.
"""
METADATA_THREADS_MAX = 4
_GATEWAY_STATUSES = (502, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """How the last contact with Glance ended. `reachable` is None before the first one.

    `error` and `error_at` (Unix time) are those of the last failure, also after Glance came back.
    """

    reachable: bool | None = None
    error: str | None = None
    error_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who we are to Glance, as far as the auth plugin knows, and where Glance is."""

    endpoint: str
    auth_type: str
    user_id: str | None = None
    user_name: str | None = None
    project_id: str | None = None
    project_name: str | None = None
    roles: tuple[str, ...] = ()


class GlanceSession(session.Session):
    """A keystoneauth session with our time-outs, and endpoints without a version.

    python-glanceclient and we append `/v2/...`; catalogs written for older clients end in `/v2` already.
    """

    answered_at: float = float("-inf")
    """`time.monotonic()` of the last answer of Glance itself (no gateway's 502, 503 or 504)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  keystoneauth's own signature
        super().__init__(*args, **kwargs)
        self.stats = HttpStats()

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
        began = time.monotonic()
        try:
            response: requests.Response = super().request(url, method, **kwargs)
        except (ksa.ClientException, requests.RequestException, OSError) as exc:
            self.stats.add(kind, getattr(exc, "http_status", None) or None, time.monotonic() - began)
            raise
        self.stats.add(kind, response.status_code, time.monotonic() - began)
        if is_to_glance and response.status_code not in _GATEWAY_STATUSES:
            self.answered_at = time.monotonic()
        return response

    def get_endpoint(
        self,
        auth: plugin.BaseAuthPlugin | None = None,
        **kwargs: Any,  # noqa: ANN401  keystoneauth's own signature
    ) -> str | None:
        """See keystoneauth; without a version at the end."""
        return _without_version(super().get_endpoint(auth, **kwargs))


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


class _Anonymous(noauth.NoAuth):
    """`auth_type = none` that sends no token at all; keystoneauth's sends "notused", which a Glance may refuse."""

    def get_headers(self, session: Any) -> dict[str, str]:  # noqa: ANN401, ARG002  (keystoneauth's signature)
        """No headers."""
        return {}


class GlanceAccess:
    """A session with Glance. `call` is the one way to use it from the loop.

    `contact` is owned by the loop; the session is used from threads, which keystoneauth and urllib3 allow.
    """

    def __init__(self, glance_session: GlanceSession, adapter_options: dict[str, Any], *, auth_type: str) -> None:
        self.session = glance_session
        self.adapter_options = adapter_options
        """Arguments for an `Adapter` (or a glanceclient) over the session."""
        self.contact = Contact()
        self._auth_type = auth_type
        self._metadata_calls = BlockingCalls("glance-metadata", threads_max=METADATA_THREADS_MAX)

    async def call(self, threads: BlockingCalls, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)` in a thread of `threads`; `contact` learns how it went.

        Cancellation: ends a request under way by shutting its connection down, and waits for the thread.
        """
        began = time.monotonic()
        try:
            result = await run_interruptibly(threads, fn, *args)
        except errors.BasefsError as exc:
            answered = self.session.answered_at >= began
            if not answered or isinstance(exc, errors.SourceUnavailableError | errors.SourceForbiddenError):
                self.contact = Contact(reachable=answered, error=str(exc), error_at=time.time())
            raise
        self.contact = Contact(reachable=True, error=self.contact.error, error_at=self.contact.error_at)
        return result

    async def call_metadata(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """`call` in the few threads kept for metadata, which image bytes never occupy."""
        return await self.call(self._metadata_calls, fn, *args)

    def get(self, path: str, headers: dict[str, str]) -> requests.Response:
        """Glance's answer to a GET, whatever its status, its body not yet read. Blocks: for threads.

        The caller closes the response. `headers` go out as they are (glanceclient would encode the `=` of a
        Range). A 401 has been tried once more with a new token, where the plugin can get one.
        """
        options = self.adapter_options
        with translated(f"GET {path}"):
            return self.session.request(
                path,
                "GET",
                endpoint_override=options["endpoint_override"],
                endpoint_filter={
                    key: options[key] for key in ("service_type", "service_name", "interface", "region_name")
                },
                headers=headers,
                stream=True,
                raise_exc=False,
                log=False,
            )

    async def identity(self) -> Identity:
        """Who we are to Glance. Asks Keystone when there is no token yet.

        Raises:
            SourceForbiddenError, SourceUnavailableError: no token or no endpoint can be had.
        """
        # Not `call`: Keystone answering says nothing about Glance.
        return await run_interruptibly(self._metadata_calls, self._identity)

    def _identity(self) -> Identity:
        with translated("who are we"):
            self.session.get_auth_headers()
            options = self.adapter_options
            endpoint = options["endpoint_override"] or self.session.get_endpoint(
                **{key: options[key] for key in ("service_type", "service_name", "interface", "region_name")}
            )
            if endpoint is None:
                raise errors.SourceUnavailableError("the service catalog has no fitting image endpoint")
            get_access = getattr(self.session.auth, "get_access", None)
            if get_access is None:
                return Identity(endpoint=safe_text(endpoint), auth_type=self._auth_type)
            access = get_access(self.session)
            return Identity(
                endpoint=safe_text(endpoint),
                auth_type=self._auth_type,
                user_id=access.user_id,
                user_name=access.username,
                project_id=access.project_id,
                project_name=access.project_name,
                roles=tuple(access.role_names or ()),
            )

    def close(self) -> None:
        """Close idle connections. Requests under way end by themselves."""
        self.session.session.close()


class _SessionLoader(loading.session.Session):
    @property
    def plugin_class(self) -> type[session.Session]:
        return GlanceSession


def open_glance(conf: cfg.ConfigOpts, *, threads_max: int, group: str = "glance") -> GlanceAccess:
    """Access to the Glance that `[glance]` describes. Nothing is sent yet.

    Args:
        conf: Loaded, with keystoneauth's session, auth and adapter options registered in `group`.
        threads_max: Requests for image bytes at a time, for which connections are kept.
        group: The section.

    Raises:
        ConfigError: The options do not fit together, or name an auth plugin that is not there.
    """
    section = conf[group]
    try:
        auth = loading.load_auth_from_conf_options(conf, group)
        if auth is None:
            raise errors.ConfigError(f"[{group}] auth_type is not set")
        if isinstance(auth, noauth.NoAuth):
            auth = _Anonymous(endpoint=auth.endpoint)
        http = _http_session(
            section.tls_ciphers, section.tls_min_version, connections_max=threads_max + METADATA_THREADS_MAX
        )
        glance_session = _SessionLoader().load_from_conf_options(conf, group, auth=auth, session=http)
        assert isinstance(glance_session, GlanceSession)
        adapter = loading.load_adapter_from_conf_options(conf, group, session=glance_session, auth=auth)
    except (ksa.ClientException, TypeError, ValueError) as exc:
        raise errors.ConfigError(f"[{group}]: {safe_text(str(exc))}") from exc
    auth_type = conf[section.auth_section or group].auth_type
    endpoint = adapter.endpoint_override
    if endpoint is None:
        # Plugins without a catalog (none, admin_token, http_basic) hold the endpoint themselves.
        endpoint = getattr(auth, "endpoint", None)
    options = {
        "service_type": adapter.service_type or "image",
        "service_name": adapter.service_name,
        "interface": adapter.interface,
        "region_name": adapter.region_name,
        "endpoint_override": _without_version(endpoint),
    }
    return GlanceAccess(glance_session, options, auth_type=auth_type)


def _http_session(tls_ciphers: str | None, tls_min_version: TlsVersion, *, connections_max: int) -> requests.Session:
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


def _without_version(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    endpoint = endpoint.rstrip("/")
    head, _, tail = endpoint.rpartition("/")
    return head if tail in ("v1", "v2") else endpoint
