"""What a location of Glance's cinder store names (glance_store/_drivers/cinder/store.py: StoreLocation.parse_uri)."""

import re

_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_LOCATION = re.compile(rf"cinder://(?:[^/?#@\s]+/)?({_UUID})")


def volume_id_of(location: str) -> str | None:
    """The volume of `cinder://<store>/<volume id>` or `cinder://<volume id>`; None for anything else."""
    found = _LOCATION.fullmatch(location)
    return found[1].lower() if found else None
