"""The one way to Cinder: a session as `[cinder]` describes it, of which no request or answer is logged."""

import http
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from keystoneauth1 import exceptions as ksa
from keystoneauth1 import loading, session
from keystoneauth1.identity.base import BaseIdentityPlugin
from oslo_config import cfg

from basefs import errors
from basefs.concurrency.anonymous import without_token
from basefs.concurrency.exchange import InterruptibleAdapter
from basefs.config.volume_options import CINDER_SECTION, cinder_auth_section
from basefs.core.safe_text import safe_text
from basefs.volumes.cinder import Cinder

if TYPE_CHECKING:
    from cinderclient.v3 import client

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 90.0
"""attachments.update waits for the storage: Cinder's own limit inside is rpc_response_timeout, 60 s."""
CINDER_THREADS_MAX = 8
API_VERSION = "3.71"
"""The newest that was tried; an older Cinder has to know 3.54, for the mode of an attachment."""
_REQUEST_IDS = ("X-Openstack-Request-Id", "X-Compute-Request-Id")


class CinderSession(session.Session):
    """A keystoneauth session with our time-outs, whose answers (connection_info) never reach a log."""

    def request(  # type: ignore[override]  # 25 more keywords, handed on as they come
        self,
        url: str,
        method: str,
        **kwargs: Any,  # noqa: ANN401  keystoneauth's own signature
    ) -> requests.Response:
        """See keystoneauth; a 404 that is not Cinder's own is an error of its own.

        Raises:
            VolumeError: something before Cinder answered 404.
        """
        if self.timeout is None:
            kwargs["timeout"] = (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S)
        kwargs["log"] = False
        response = super().request(url, method, **kwargs)
        is_to_cinder = kwargs.get("endpoint_filter") is not None or kwargs.get("endpoint_override") is not None
        if (
            is_to_cinder
            and response.status_code == http.HTTPStatus.NOT_FOUND
            and not any(name in response.headers for name in _REQUEST_IDS)
        ):
            raise errors.VolumeError(f"{method} {safe_text(url)}: something before Cinder answered 404")
        return response


class _SessionLoader(loading.session.Session):
    @property
    def plugin_class(self) -> type[session.Session]:
        return CinderSession


def open_cinder(conf: cfg.ConfigOpts) -> Cinder:
    """Access to the Cinder that `[cinder]` describes. Nothing is sent yet, and cinderclient not yet imported.

    Args:
        conf: Loaded by `load_settings`.

    Raises:
        ConfigError: The options do not fit together.
    """
    try:
        auth = without_token(loading.load_auth_from_conf_options(conf, cinder_auth_section(conf)))
        http_session = requests.Session()
        adapter = InterruptibleAdapter(pool_connections=4, pool_maxsize=CINDER_THREADS_MAX)
        for scheme in list(http_session.adapters):
            http_session.mount(scheme, adapter)
        cinder_session = _SessionLoader().load_from_conf_options(conf, CINDER_SECTION, auth=auth, session=http_session)
        options = loading.load_adapter_from_conf_options(conf, CINDER_SECTION, session=cinder_session, auth=auth)
    except (ksa.ClientException, TypeError, ValueError) as exc:
        raise errors.ConfigError(f"[cinder]: {safe_text(str(exc))}") from exc
    if options.endpoint_override is None and not isinstance(auth, BaseIdentityPlugin):
        raise errors.ConfigError("[cinder] endpoint_override is not set; the auth plugin has no catalog to look it up")
    where = {
        "service_type": options.service_type,
        "service_name": options.service_name,
        "interface": options.interface,
        "region_name": options.region_name,
        "endpoint_override": _with_version(options.endpoint_override),
    }
    return Cinder(partial(_client, cinder_session, where), cinder_session, where, threads_max=CINDER_THREADS_MAX)


def _with_version(endpoint: str | None) -> str | None:
    """Cinderclient appends `/volumes/...`; a catalog's endpoint ends in /v3 or /v3/<project id>."""
    if endpoint is None or "v3" in urlsplit(endpoint).path.split("/"):
        return endpoint
    return f"{endpoint.rstrip('/')}/v3"


def _client(cinder_session: session.Session, where: dict[str, Any]) -> "client.Client":
    # Here and not at the top: 0.5 s of import that a server without links need not wait for.
    from cinderclient import api_versions
    from cinderclient.v3 import client

    return client.Client(session=cinder_session, api_version=api_versions.APIVersion(API_VERSION), **where)
