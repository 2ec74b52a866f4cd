"""Names nova makes in `_base` (nova/virt/imagecache.py:44-52, nova/virt/libvirt/imagebackend.py)."""

import hashlib
import re

_BASE_NAME = re.compile(r"[0-9a-f]{40}\Z")

# nova-api stores "" for no kernel and no ramdisk, and the cache manager looks for them on every pass
# (nova/virt/imagecache.py:_list_running_instances skips None only): Glance need not be asked about that.
_NAME_OF_NO_IMAGE = hashlib.sha1(b"", usedforsecurity=False).hexdigest()


def base_name_of(image_id: str) -> str:
    """The name under which nova looks for an image: the SHA-1 of its id as text, 40 hex digits."""
    return hashlib.sha1(image_id.encode("utf-8"), usedforsecurity=False).hexdigest()


def is_base_name(name: str) -> bool:
    """Whether `name` can be the base name of an image: exactly 40 lower-case hex digits, not the SHA-1 of ""."""
    return _BASE_NAME.match(name) is not None and name != _NAME_OF_NO_IMAGE
