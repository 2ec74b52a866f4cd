"""From Glance's words to `ImageRecord`: what others wrote is checked before it is believed."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from basefs.catalog.records import ImageRecord
from basefs.core.trace_property import PROPERTY, PROPERTY_CHARS_MAX

_IMAGE_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}\Z")
"""Ids become file names below `.basefs`; Glance makes UUIDs and its database takes 36 characters."""
_TEXT_CHARS_MAX = 1024
_SIZE_MAX = 2**62


class ImageMetadata(Protocol):
    """What the catalog asks Glance; `sources/metadata.py` implements it."""

    async def list_images(self, *, updated_since: str | None = None) -> list[Mapping[str, Any]]:
        """All images that we may see, or those changed at or after `updated_since`.

        Raises:
            SourceForbiddenError, SourceUnavailableError: the list could not be had whole.
        """
        ...

    async def show_image(self, image_id: str) -> Mapping[str, Any]:
        """One image.

        Raises:
            ImageNotFoundError: Glance has no such image, or does not show it to us.
            SourceForbiddenError, SourceUnavailableError: it could not be had.
        """
        ...


def record_of(image: Mapping[str, Any]) -> ImageRecord | None:
    """The image as a record; None when the id or what the checks rest on is not usable."""
    image_id, status, size = image.get("id"), image.get("status"), image.get("size")
    if not isinstance(image_id, str) or not _IMAGE_ID.match(image_id) or not isinstance(status, str):
        return None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _SIZE_MAX:
        size = None
    return ImageRecord(
        image_id=image_id,
        name=_text(image, "name") or "",
        size=size,
        disk_format=_text(image, "disk_format"),
        container_format=_text(image, "container_format"),
        status=_text(image, "status") or "",
        visibility=_text(image, "visibility") or "",
        os_hidden=image.get("os_hidden") is True,
        owner=_text(image, "owner"),
        created_at=_text(image, "created_at") or "",
        updated_at=_text(image, "updated_at") or "",
        checksum=_text(image, "checksum"),
        os_hash_algo=_text(image, "os_hash_algo"),
        os_hash_value=_text(image, "os_hash_value"),
        is_signed=bool(image.get("img_signature")),
        boot_trace=_short_text(image, PROPERTY, PROPERTY_CHARS_MAX),
    )


def _text(image: Mapping[str, Any], key: str) -> str | None:
    value = image.get(key)
    if not isinstance(value, str):
        return None
    # JSON can carry half a surrogate pair, which no file and no database takes.
    return value[:_TEXT_CHARS_MAX].encode("utf-8", "replace").decode("utf-8")


def _short_text(image: Mapping[str, Any], key: str, chars_max: int) -> str | None:
    """ASCII text that is not longer than that; None for any other."""
    value = image.get(key)
    return value if isinstance(value, str) and len(value) <= chars_max and value.isascii() else None


def earlier(updated_at: str, seconds: float) -> str | None:
    """The time `seconds` before Glance's `updated_at`, in its form; None when it is no time."""
    try:
        when = datetime.fromisoformat(updated_at)
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)) - timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        return None
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_same_content(old: ImageRecord, new: ImageRecord) -> bool:
    """Whether everything that the checks rest on is the same, but `status`."""
    return (old.size, old.disk_format, old.container_format, old.checksum, old.os_hash_value, old.is_signed) == (
        new.size,
        new.disk_format,
        new.container_format,
        new.checksum,
        new.os_hash_value,
        new.is_signed,
    )
