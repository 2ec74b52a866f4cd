"""Images in S3, as Glance's s3 store keeps them: an object named by the image id. Ranged GETs over one session.

Requests are signed by botocore (87 us, measured) and sent by our own session: that can be interrupted, follows no
redirect, and reads bodies into one memory (`sources/body_pieces`). A client of botocore would be 13 MiB more.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast
from urllib.parse import quote, urlsplit

from requests import Response

from basefs.config.store_options import S3Settings
from basefs.core.store_location import S3_SCHEMES, host_of, is_listed, object_location
from basefs.sources.http_errors import translated
from basefs.sources.http_objects import TIMEOUTS_S, HttpObject, HttpObjects, open_object
from basefs.sources.session import http_session
from basefs.sources.store import StoreName

MISSING_LIBRARY = "botocore is not installed: pip install basefs[s3]"
_SAID = re.compile(rb"<(Code|Message)>([^<]{0,300})</\1>")


class S3Store(HttpObjects):
    """`Store` over one S3 service."""

    name: StoreName = "s3"

    def __init__(self, settings: S3Settings, *, threads_max: int) -> None:
        self._settings = settings
        # An error page repeats what was signed, and with whose key.
        super().__init__("s3", threads_max=threads_max, explain=_said)
        self._hosts = {host_of(settings.endpoint), *settings.location_hosts}
        self._session = http_session(None, None, connections_max=threads_max)
        self._signer = _signer(settings)
        self.missing = MISSING_LIBRARY if self._signer is None else None

    def refusal(self, image_id: str, location: str) -> str | None:
        """See `Store`."""
        if self.missing is not None:
            return self.missing
        try:
            found = object_location(location, S3_SCHEMES)
        except ValueError as exc:
            return f"the location is not one of Glance's s3 store: {exc}"
        if host_of(found.service) not in self._hosts:
            return "the location is in another S3 service than [s3] endpoint and location_hosts"
        if not is_listed(found.bucket, self._settings.buckets):
            return "the location's bucket is not in [s3] buckets"
        if found.key != image_id:
            return "the location's object has not the image's id as its name"
        return None

    async def open(self, location: str, *, image_id: str, size: int) -> HttpObject:
        """See `Store`."""
        found = object_location(location, S3_SCHEMES)
        url = self._url(found.bucket, found.key)
        return await open_object(self, f"image {image_id} in S3", partial(self._send, url), size)

    async def close(self) -> None:
        """See `Store`."""
        self._session.close()

    def _url(self, bucket: str, key: str) -> str:
        endpoint, name = self._settings.endpoint, quote(key, safe="")
        if not self._settings.is_virtual:
            return f"{endpoint}/{quote(bucket, safe='')}/{name}"
        parts = urlsplit(endpoint)
        return f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}/{name}"

    def _send(self, url: str, method: str, headers: Mapping[str, str]) -> Response:
        """See `http_objects.Send`."""
        settings = self._settings
        assert self._signer is not None
        with translated(f"{method} of S3"):
            return self._session.request(
                method,
                url,
                headers=self._signer.signed(method, url, headers),
                stream=True,
                allow_redirects=False,
                timeout=TIMEOUTS_S,
                verify=False if settings.insecure else settings.cafile or True,
            )


class _Signer:
    """Signature version 4, by botocore. Used from threads: it has no state of its own."""

    def __init__(self, settings: S3Settings, auth: Any, request: Any, credentials: Any) -> None:  # noqa: ANN401
        self._auth = auth(credentials(settings.access_key, settings.secret_key), "s3", settings.region)
        self._request = request

    def signed(self, method: str, url: str, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers with those that prove who asks. Valid for 15 minutes, for this method and URL."""
        request = self._request(method=method, url=url, headers=dict(headers))
        self._auth.add_auth(request)
        return cast("dict[str, str]", dict(request.headers.items()))


def _signer(settings: S3Settings) -> _Signer | None:
    """None where botocore is not installed."""
    try:
        # Here: it takes 0.3 s and 17 MiB, and few have images in S3.
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
    except ImportError:
        return None
    return _Signer(settings, S3SigV4Auth, AWSRequest, Credentials)


def _said(page: bytes) -> str:
    """Code and message of an error page of S3; not the rest, which may repeat the key that was used."""
    return ": ".join(found[2].decode("utf-8", "replace") for found in _SAID.finditer(page))
