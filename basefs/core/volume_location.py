"""What a location of Glance's cinder store names (glance_store/_drivers/cinder/store.py: StoreLocation.parse_uri)."""

import re

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_LOCATION = re.compile(rf"cinder://(?:[^/?#@\s]+/)?({_UUID.pattern})")


def is_volume_id(text: str) -> bool:
    """Whether `text` is a UUID in the form in which Cinder writes them."""
    return _UUID.fullmatch(text) is not None


def volume_id_of(location: str) -> str | None:
    """The volume of `cinder://<store>/<volume id>` or `cinder://<volume id>`; None for anything else."""
    found = _LOCATION.fullmatch(location)
    return found[1].lower() if found else None
