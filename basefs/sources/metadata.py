"""Image metadata through python-glanceclient: lists and single images, as plain dictionaries."""

import http
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from basefs import errors
from basefs.core.safe_text import safe_text
from basefs.core.trace_property import PROPERTY, PROPERTY_CHARS_MAX
from basefs.sources.access import GlanceAccess
from basefs.sources.http_errors import error_of_status, text_of_error, translated

if TYPE_CHECKING:
    from glanceclient.v2 import client

PAGE_IMAGES = 200
SORT = "created_at:asc,id:asc"
IMAGES_MAX = 500_000
"""More than this in one list is no image catalog but an endless loop of pages."""
_FIELDS = (
    "id",
    "name",
    "size",
    "disk_format",
    "container_format",
    "status",
    "visibility",
    "os_hidden",
    "owner",
    "created_at",
    "updated_at",
    "checksum",
    "os_hash_algo",
    "os_hash_value",
    "img_signature",
)
_NOT_GLANCE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What python-glanceclient and its models raise over an answer that is no answer of Glance."""


class GlanceMetadata:
    """Lists and shows images. Every image is a dictionary with the fields of Glance that basefs uses."""

    def __init__(self, access: GlanceAccess, *, with_boot_traces: bool = False) -> None:
        """`with_boot_traces`: the images' property of that name, too, if it is not longer than one of ours."""
        self._access = access
        self._with_boot_traces = with_boot_traces
        self._client: client.Client | None = None

    async def list_images(self, *, updated_since: str | None = None) -> list[Mapping[str, Any]]:
        """All images that we may see, hidden, community and shared ones with pending members too.

        Args:
            updated_since: Only those changed at or after this time (`updated_at` of Glance, ISO 8601).

        Raises:
            SourceForbiddenError, SourceUnavailableError: the list could not be had whole.
        """
        return await self._access.call_metadata(self._list, updated_since)

    async def show_image(self, image_id: str) -> Mapping[str, Any]:
        """One image.

        Raises:
            ImageNotFoundError: Glance has no such image, or does not show it to us.
            SourceForbiddenError, SourceUnavailableError: it could not be had.
        """
        return await self._access.call_metadata(self._show, image_id)

    async def set_boot_trace(self, image_id: str, text: str) -> None:
        """Have Glance keep `text` as the image's property.

        Raises:
            ImageNotFoundError: Glance has no such image, or does not show it to us.
            SourceForbiddenError: we may not change it: it takes the role admin, or member in the project of its owner.
            SourceUnavailableError: it was not possible now, or Glance takes no more properties of the image.
        """
        await self._access.call_metadata(self._set_boot_trace, image_id, text)

    # --- in threads ----------------------------------------------------------------------------------

    def _list(self, updated_since: str | None) -> list[Mapping[str, Any]]:
        images = []
        try:
            for os_hidden in ("false", "true"):
                images += self._list_some(os_hidden, updated_since)
        except errors.ImageNotFoundError as exc:
            # A list cannot be absent: this is no Glance, or not its endpoint.
            raise errors.SourceUnavailableError(str(exc)) from exc
        return images

    def _list_some(self, os_hidden: str, updated_since: str | None) -> list[Mapping[str, Any]]:
        # Tried on Glance 33: without visibility=all community images are left out, without
        # member_status=all those shared with us but not accepted; os_hidden shows one kind or the other.
        filters = {"visibility": "all", "member_status": "all", "os_hidden": os_hidden}
        if updated_since is not None:
            filters["updated_at"] = f"gte:{updated_since}"
        images: list[Mapping[str, Any]] = []
        with _glanceclient_translated("list of images"):
            # Oldest first: an image made while we turn the pages comes last and is not missed. `sort`, not
            # two `sort_key`s: Glance 33 forgets one of those in its links to further pages, and a list of
            # 1,004 images then held 84 of them twice and 84 not at all.
            found = self._glance().images.list(filters=filters, page_size=PAGE_IMAGES, sort=SORT)
            for image in found:
                images.append(self._fields_of(image))
                if len(images) > IMAGES_MAX:
                    raise errors.SourceUnavailableError(f"list of images: more than {IMAGES_MAX}")
        return images

    def _show(self, image_id: str) -> Mapping[str, Any]:
        with _glanceclient_translated(f"image {image_id}"):
            return self._fields_of(self._glance().images.get(image_id))

    def _set_boot_trace(self, image_id: str, text: str) -> None:
        change = [{"op": "add", "path": f"/{PROPERTY}", "value": text}]  # "add" replaces what is there
        self._access.patch(f"/v2/images/{quote(image_id, safe='')}", change, f"image {image_id}")

    def _fields_of(self, image: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = {name: image[name] for name in _FIELDS if name in image}
        trace = image.get(PROPERTY) if self._with_boot_traces else None
        if isinstance(trace, str) and len(trace) <= PROPERTY_CHARS_MAX:
            fields[PROPERTY] = trace
        return fields

    def _glance(self) -> "client.Client":
        if self._client is None:
            # Here and not at the top: 0.4 s of import that a starting server need not wait for.
            from glanceclient.v2 import client

            self._client = client.Client(session=self._access.session, **self._access.adapter_options)
        return self._client


@contextmanager
def _glanceclient_translated(what: str) -> Iterator[None]:
    """`translated`, and python-glanceclient's errors too."""
    from glanceclient import exc as glance

    try:
        with translated(what):
            yield
    except glance.HTTPException as exc:
        status = exc.code if isinstance(exc.code, int) else http.HTTPStatus.BAD_REQUEST
        raise error_of_status(status, what, detail=safe_text(str(exc.details or ""))) from exc
    except (glance.ClientException, glance.BaseException) as exc:
        raise errors.SourceUnavailableError(f"{what}: {text_of_error(exc)}", may_be_away=True) from exc
    except _NOT_GLANCE as exc:
        text = f"{what}: the answer is not one of Glance ({text_of_error(exc)})"
        raise errors.SourceUnavailableError(text) from exc
