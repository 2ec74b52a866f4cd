"""Names nova makes in `_base` (nova/virt/imagecache.py:44-52, nova/virt/libvirt/imagebackend.py)."""

import hashlib
import re

_BASE_NAME = re.compile(r"[0-9a-f]{40}\Z")


def base_name_of(image_id: str) -> str:
    """The name under which nova looks for an image: the SHA-1 of its id as text, 40 hex digits."""
    return hashlib.sha1(image_id.encode("utf-8"), usedforsecurity=False).hexdigest()


def is_base_name(name: str) -> bool:
    """Whether `name` can be the base name of an image: exactly 40 lower-case hex digits."""
    return _BASE_NAME.match(name) is not None
