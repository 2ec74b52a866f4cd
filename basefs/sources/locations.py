"""Where Glance keeps an image, as far as it tells us. A location may hold a password: none is in a message or a log."""

import contextlib
import http
import json
from collections.abc import Iterator
from typing import Any

import requests

from basefs import errors
from basefs.sources.access import GlanceAccess
from basefs.sources.http_errors import error_of_status, translated


class GlanceLocations:
    """Asks for locations, first by the API that is made for services, then in the image's own record."""

    def __init__(self, access: GlanceAccess) -> None:
        self._access = access

    async def locations(self, image_id: str) -> tuple[str, ...]:
        """URLs of the image's data, in Glance's order; none where Glance does not tell them to us.

        `GET /v2/images/{id}/locations` (API 2.17) answers admin and the role `service`, whatever Glance's options.
        `locations` and `direct_url` of the image are there with show_multiple_locations and show_image_direct_url.

        Raises:
            ImageNotFoundError: Glance has no such image, or does not show it to us.
            SourceForbiddenError, SourceUnavailableError: it could not be asked.
        """
        return await self._access.call_metadata(self._locations, image_id)

    # --- in a thread ---------------------------------------------------------------------------------

    def _locations(self, image_id: str) -> tuple[str, ...]:
        path = f"/v2/images/{image_id}"
        with contextlib.suppress(errors.SourceForbiddenError, errors.ImageNotFoundError, _NotThisApiError):
            found = tuple(_urls(self._json(f"{path}/locations")))
            if found:
                return found
        record = self._json(path)
        if not isinstance(record, dict):
            raise errors.SourceUnavailableError(f"image {image_id}: the answer is not one of Glance")
        return tuple(_urls(record.get("locations"))) or tuple(_urls([{"url": record.get("direct_url")}]))

    def _json(self, path: str) -> Any:  # noqa: ANN401  whatever was answered
        with contextlib.closing(self._access.get(path, {})) as response:
            if response.status_code in (http.HTTPStatus.METHOD_NOT_ALLOWED, http.HTTPStatus.BAD_REQUEST):
                raise _NotThisApiError(f"{path}: Glance answered {response.status_code}")
            if response.status_code != http.HTTPStatus.OK:
                raise error_of_status(response.status_code, f"GET {path}")
            return _parsed(response, path)


class _NotThisApiError(errors.SourceUnavailableError):
    """Glance is older than the request."""


def _parsed(response: requests.Response, path: str) -> Any:  # noqa: ANN401  whatever was answered
    with translated(f"GET {path}"):
        content = response.content
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise errors.SourceUnavailableError(f"GET {path}: the answer is not one of Glance") from None


def _urls(found: Any) -> Iterator[str]:  # noqa: ANN401  whatever was answered
    for one in found if isinstance(found, list) else []:
        url = one.get("url") if isinstance(one, dict) else None
        if isinstance(url, str):
            yield url
