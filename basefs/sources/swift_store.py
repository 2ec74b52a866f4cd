"""Images in Swift, as Glance's swift store keeps them: an object named by the image id, large ones behind a manifest.

Swift answers ranges of a manifest (static or dynamic) as of any object, and gives it an entity tag that is made of
those of its segments, so one that was replaced is noticed there, too. Tokens come from any plugin of keystoneauth,
among them TempAuth's `v1password`, which python-swiftclient brings.
"""

import http
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from keystoneauth1 import exceptions as ksa
from keystoneauth1 import loading, session
from keystoneauth1.identity.base import BaseIdentityPlugin
from oslo_config import cfg
from requests import Response

from basefs import errors
from basefs.concurrency.anonymous import without_token
from basefs.config.auth_sections import auth_section_of
from basefs.config.store_options import SWIFT_SECTION, SwiftSettings
from basefs.core.safe_text import safe_text
from basefs.core.store_location import SWIFT_SCHEMES, ObjectLocation, host_of, is_listed, object_location
from basefs.sources.http_errors import translated
from basefs.sources.http_objects import TIMEOUTS_S, HttpObject, HttpObjects, open_object
from basefs.sources.session import http_session
from basefs.sources.store import StoreName
from basefs.sources.tokens import TokenLife

_ACCOUNT_PREFIX = "AUTH_"


class SwiftAccess:
    """Who we are to Swift, and where it is. Used from threads, which keystoneauth and urllib3 allow."""

    def __init__(self, swift_session: session.Session, endpoint_filter: Mapping[str, Any], auth_url: str) -> None:
        self.session = swift_session
        self.auth_url = auth_url
        self._filter = dict(endpoint_filter)
        self._override = self._filter.pop("endpoint_override")

    def storage_url(self) -> str:
        """The URL of the account, without a slash at its end. May ask Keystone."""
        url = self._override or self.session.get_endpoint(**self._filter)
        if not url:
            raise errors.SourceUnavailableError("the service catalog has no fitting object-store endpoint")
        return str(url).rstrip("/")

    @property
    def hosts(self) -> set[str]:
        """By which Glance's locations may name the service."""
        return {host_of(url) for url in (self.auth_url, self._override or "") if url}

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Response:
        """The answer to one request, its body unread. A 401 has been tried once more with a new token."""
        response = self._request_once(method, path, headers)
        if response.status_code == http.HTTPStatus.UNAUTHORIZED and self.session.invalidate():
            response.close()
            response = self._request_once(method, path, headers)
        return response

    def _request_once(self, method: str, path: str, headers: Mapping[str, str]) -> Response:
        token = self.session.get_auth_headers() or {}
        answer: Response = self.session.session.request(
            method,
            f"{self.storage_url()}/{path}",
            headers={**headers, **token},
            stream=True,
            allow_redirects=False,
            timeout=TIMEOUTS_S,
            verify=self.session.verify,
            cert=self.session.cert,
        )
        return answer


class SwiftStore(HttpObjects):
    """`Store` over one account of Swift."""

    name: StoreName = "swift"
    missing: str | None = None

    def __init__(self, settings: SwiftSettings, access: SwiftAccess, *, threads_max: int) -> None:
        self._settings = settings
        self._access = access
        super().__init__("swift", threads_max=threads_max)
        self._hosts = {*access.hosts, *settings.location_hosts}

    def refusal(self, image_id: str, location: str) -> str | None:
        """See `Store`."""
        try:
            found = object_location(location, SWIFT_SCHEMES)
        except ValueError as exc:
            return f"the location is not one of Glance's swift store: {exc}"
        if found.scheme == "swift+config":
            if found.service not in map(str.lower, self._settings.config_references):
                return "the location's reference is not in [swift] config_references"
        elif host_of(found.service) not in self._hosts:
            return "the location is in another Swift than [swift] auth_url, endpoint_override and location_hosts"
        if not is_listed(found.bucket, self._settings.containers):
            return "the location's container is not in [swift] containers"
        if found.key != image_id:
            return "the location's object has not the image's id as its name"
        return None

    async def open(self, location: str, *, image_id: str, size: int) -> HttpObject:
        """See `Store`."""
        found = object_location(location, SWIFT_SCHEMES)
        return await open_object(self, f"image {image_id} in Swift", partial(self._send, found), size)

    async def close(self) -> None:
        """See `Store`."""
        self._access.session.session.close()

    def _send(self, place: ObjectLocation, method: str, headers: Mapping[str, str]) -> Response:
        """See `http_objects.Send`."""
        with translated(f"{method} of Swift"):
            account = place.service.rpartition("/")[2]
            ours = self._access.storage_url().rpartition("/")[2]
            # Glance's multi-tenant mode: each project's images are in its own account.
            if account.startswith(_ACCOUNT_PREFIX) and account != ours:
                raise errors.SourceForbiddenError("the location is in another account of Swift than ours")
            path = f"{quote(place.bucket, safe='')}/{quote(place.key, safe='')}"
            return self._access.request(method, path, headers)


def open_swift(conf: cfg.ConfigOpts, settings: SwiftSettings, *, threads_max: int) -> SwiftStore:
    """The Swift that `[swift]` describes. Nothing is sent yet.

    Raises:
        ConfigError: The options do not fit together, or name an auth plugin that is not there.
    """
    try:
        auth = loading.load_auth_from_conf_options(conf, auth_section_of(conf, SWIFT_SECTION))
        if auth is None:
            raise errors.ConfigError(f"[{SWIFT_SECTION}] auth_type is not set")
        auth = without_token(auth)
        transport = http_session(None, None, connections_max=threads_max)
        swift_session = loading.session.Session().load_from_conf_options(
            conf, SWIFT_SECTION, auth=auth, session=transport
        )
        adapter = loading.load_adapter_from_conf_options(conf, SWIFT_SECTION, session=swift_session, auth=auth)
    except (ksa.ClientException, TypeError, ValueError) as exc:
        raise errors.ConfigError(f"[{SWIFT_SECTION}]: {safe_text(str(exc))}") from exc
    swift_session.timeout = swift_session.timeout or TIMEOUTS_S[1]
    if isinstance(auth, BaseIdentityPlugin):
        TokenLife(auth)
    override = adapter.endpoint_override or getattr(auth, "endpoint", None)
    endpoint_filter = {
        "endpoint_override": override,
        "service_type": adapter.service_type or "object-store",
        "service_name": adapter.service_name,
        "interface": adapter.interface,
        "region_name": adapter.region_name,
    }
    access = SwiftAccess(swift_session, endpoint_filter, getattr(auth, "auth_url", None) or "")
    return SwiftStore(settings, access, threads_max=threads_max)
