"""Which kind of store a location of Glance is one of, and where that is: by its scheme and host, nothing else."""

import re
from collections.abc import Mapping
from typing import Literal, get_args
from urllib.parse import urlsplit

SourceName = Literal["volume", "rbd", "file", "s3", "swift", "http", "glance"]
SOURCE_NAMES: tuple[SourceName, ...] = get_args(SourceName)

_KIND_OF_SCHEME: Mapping[str, SourceName] = {
    "cinder": "volume",
    "rbd": "rbd",
    "file": "file",
    "filesystem": "file",
    "s3": "s3",
    "s3+http": "s3",
    "s3+https": "s3",
    "swift": "swift",
    "swift+http": "swift",
    "swift+https": "swift",
    "swift+config": "swift",
    "http": "http",
    "https": "http",
}
"""Schemes of glance_store's drivers (`get_schemes`)."""
_HOST = re.compile(r"(?:[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?")


def kind_of(location: str) -> SourceName | None:
    """The kind of source that reads such locations; None for a scheme that none does."""
    scheme, colon, _ = location.partition(":")
    return _KIND_OF_SCHEME.get(scheme.lower()) if colon else None


def endpoint_of(location: str) -> str:
    """Where the location's store is (host and port, a cluster's id), never user and password; "" if that is not clear.

    Whoever has the same answers and fails as one. A key with a slash in it ends the host for a parser of URLs, so what
    has an @ behind its host, or is no plain host, is told nothing of.
    """
    try:
        parts = urlsplit(location)
    except ValueError:  # of brackets that are no IPv6 address
        return ""
    host = parts.netloc.rpartition("@")[2].lower()
    return host if _HOST.fullmatch(host) and "@" not in location.partition(parts.netloc)[2] else ""
