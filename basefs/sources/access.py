"""The one way to Glance: a session, whether its endpoints are there, and who we are."""

import http
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import requests
import trio
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import loading, session
from keystoneauth1.identity.base import BaseIdentityPlugin
from oslo_config import cfg

from basefs import errors
from basefs.concurrency.anonymous import without_token
from basefs.concurrency.exchange import EndpointName, Exchange, asking, run_interruptibly
from basefs.concurrency.threads import BlockingCalls
from basefs.core.safe_text import safe_text
from basefs.sources.endpoints import Contact, Endpoints
from basefs.sources.http_errors import error_of_status, retry_after_s, text_of_body, translated
from basefs.sources.session import GlanceSession, http_session, without_version
from basefs.sources.tokens import TokenLife

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

METADATA_THREADS_MAX = 4
ANSWER_LIMIT_S = 21.0
"""Longest wait for the head of one answer; INACTIVITY_TIMEOUT_S does not see one that comes a byte at a time."""
BODY_SILENCE_S = 8.0
"""Longest silence inside the bytes of an image: Glance has the data by then, and a guest waits."""
SILENCE_S = 10.0
"""No sign of life from an endpoint for so long while a request waits: a probe asks whether it is there."""
PROBE_TIMEOUTS_S = (2.0, 2.5)
PROBED_IMAGE = "00000000-0000-0000-0000-000000000000"
"""Nobody's: the answer costs Glance a check of the token and one look into its database."""


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


class GlanceAccess:
    """A session with Glance. `call` is the one way to use it from the loop.

    `endpoints` is owned by the loop; the session is used from threads, which keystoneauth and urllib3 allow.
    """

    def __init__(self, glance_session: GlanceSession, adapter_options: dict[str, Any], *, auth_type: str) -> None:
        self.session = glance_session
        self.adapter_options = adapter_options
        """Arguments for an `Adapter` (or a glanceclient) over the session."""
        self._auth_type = auth_type
        self._metadata_calls = BlockingCalls("glance-metadata", threads_max=METADATA_THREADS_MAX)
        probes: dict[EndpointName, Callable[[], None]] = {"glance": self._probe_glance}
        auth = glance_session.auth
        self._token = TokenLife(auth) if isinstance(auth, BaseIdentityPlugin) else None
        if self._token is not None:
            probes["keystone"] = self._probe_keystone
        self.endpoints = Endpoints(probes, has_token=self._has_token, changed=self._endpoint_changed)
        glance_session.on_life = self._on_life

    @property
    def contact(self) -> Contact:
        """How the last contact ended."""
        return self.endpoints.contact

    async def call(self, threads: BlockingCalls, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of `fn(*args)` in a thread of `threads`; `endpoints` learns how it went.

        Raises SourceUnavailableError at once while an outage is on.
        Cancellation: ends a request under way by shutting its connection down, and waits for the thread.
        """
        self.endpoints.check()
        began = time.monotonic()
        exchange = Exchange()
        try:
            result = await run_interruptibly(
                threads, fn, *args, exchange=exchange, meanwhile=partial(self._look_on, exchange)
            )
        except errors.BasefsError as exc:
            answered = self.session.answered_at >= began
            if isinstance(exc, errors.SourceUnavailableError) and exc.may_be_away:
                self.endpoints.failed(exchange.endpoint, exc)
            if not answered or isinstance(exc, errors.SourceUnavailableError | errors.SourceForbiddenError):
                self.endpoints.contact = Contact(reachable=answered, error=str(exc), error_at=time.time())
            raise
        self.endpoints.answered("glance")
        self.endpoints.contact = replace(self.endpoints.contact, reachable=True)
        return result

    async def _look_on(self, exchange: Exchange) -> None:
        """Beside a call: makes it fail when nothing comes for too long, or an outage begins. Runs until cancelled."""
        outage = self.endpoints.outage
        while not outage.is_on:
            limit_s = BODY_SILENCE_S if exchange.is_in_body else ANSWER_LIMIT_S
            quiet_s = time.monotonic() - exchange.alive_at  # -inf before its thread has begun
            if quiet_s >= limit_s:
                break
            endpoint = self.endpoints[exchange.endpoint]
            silent_s = time.monotonic() - max(exchange.alive_at, endpoint.alive_at)
            if silent_s >= SILENCE_S and endpoint.breaker.state == "closed":
                text = f"no answer to anything for {SILENCE_S:g} s"
                self.endpoints.failed(endpoint.name, errors.SourceUnavailableError(text, may_be_away=True))
            pause_s = min(limit_s - quiet_s, SILENCE_S if silent_s >= SILENCE_S else SILENCE_S - silent_s, 1.0)
            await outage.next_change(trio.current_time() + pause_s)
        exchange.interrupt()
        await trio.sleep_forever()

    # --- probes ---------------------------------------------------------------------------------------

    def _probe_glance(self) -> None:
        """Ask Glance for an image that nobody has. For a thread."""
        with translated("probe"), suppress(errors.ImageNotFoundError):
            path = f"/v2/images/{PROBED_IMAGE}"
            response = self._request(path, {}, stream=False, timeout=PROBE_TIMEOUTS_S)
            if response.status_code >= http.HTTPStatus.BAD_REQUEST:
                raise error_of_status(response.status_code, "probe", retry_after=retry_after_s(response.headers))

    def _probe_keystone(self) -> None:
        """Get a token, and keep it. For a thread."""
        auth = self.session.auth
        assert isinstance(auth, BaseIdentityPlugin)
        with translated("a new token"), asking("keystone"):
            auth.auth_ref = auth.get_auth_ref(self.session)

    def _has_token(self) -> bool:
        return self._token is None or self._token.ends_in_s() > 0

    def _on_life(self, name: EndpointName) -> None:
        self.endpoints[name].alive_at = time.monotonic()

    def _endpoint_changed(self, name: EndpointName) -> None:
        endpoint = self.endpoints[name]
        if name == "keystone" and self._token is not None:
            self._token.is_stretched = endpoint.breaker.state != "closed"
        if endpoint.breaker.state == "open":
            # What is pooled may lead to a host that is no more.
            self.session.session.close()

    async def call_metadata(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """`call` in the few threads kept for metadata, which image bytes never occupy."""
        return await self.call(self._metadata_calls, fn, *args)

    def get(self, path: str, headers: dict[str, str]) -> requests.Response:
        """Glance's answer to a GET, whatever its status, its body not yet read. Blocks: for threads.

        The caller closes the response. `headers` go out as they are (glanceclient would encode the `=` of a
        Range). A 401 has been tried once more with a new token, where the plugin can get one.
        """
        with translated(f"GET {path}"):
            return self._request(path, headers, stream=True)

    def patch(self, path: str, change: list[dict[str, str]], what: str) -> None:
        """Have Glance change an image by a JSON patch. Blocks: for threads.

        Raises:
            ImageNotFoundError, SourceForbiddenError, SourceUnavailableError: it did not.
        """
        headers = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
        with translated(f"PATCH {path}"):
            response = self._request(path, headers, method="PATCH", data=json.dumps(change))
        if response.status_code != http.HTTPStatus.OK:
            detail = text_of_body(response.content)
            raise error_of_status(
                response.status_code, what, detail=detail, retry_after=retry_after_s(response.headers)
            )

    def _request(
        self,
        path: str,
        headers: dict[str, str],
        *,
        method: str = "GET",
        **options: Any,  # noqa: ANN401
    ) -> requests.Response:
        adapter = self.adapter_options
        return self.session.request(
            path,
            method,
            endpoint_override=adapter["endpoint_override"],
            endpoint_filter={key: adapter[key] for key in ("service_type", "service_name", "interface", "region_name")},
            headers=headers,
            raise_exc=False,
            log=False,
            **options,
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
        auth = without_token(auth)
        http = http_session(
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
        "endpoint_override": without_version(endpoint),
    }
    return GlanceAccess(glance_session, options, auth_type=auth_type)
