"""What locations of Glance's rbd, s3 and swift stores name (glance_store/_drivers: rbd.py, s3.py, swift/store.py).

Locations are data from users, and may hold a password: what stands before an `@` is left out of every result, and
no text of a location is in an error.
"""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

LOCATION_CHARS_MAX = 2048
"""Names of objects have 1024 bytes at most."""
S3_SCHEMES = ("s3", "s3+http", "s3+https")
SWIFT_SCHEMES = ("swift", "swift+http", "swift+https", "swift+config")


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdLocation:
    """`rbd://<fsid>/<pool>/<image>/<snapshot>`, decoded."""

    fsid: str
    pool: str
    image: str
    snapshot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectLocation:
    """An object in a bucket or container. `service` is the host and path that Glance's store has for the service.

    Of `swift+config://` it is the name of a section in Glance's own configuration.
    """

    scheme: str
    service: str
    bucket: str
    key: str


def rbd_location(location: str) -> RbdLocation:
    """What the location names.

    Raises:
        ValueError: it is not `rbd://<fsid>/<pool>/<image>/<snapshot>`.
    """
    _check_text(location)
    scheme, _, rest = location.partition("://")
    if scheme != "rbd":
        raise ValueError("it is no rbd:// location")
    # Each part was quoted by itself, so a slash in a name is none here.
    parts = [unquote(part, errors="strict") for part in rest.split("/")]
    if len(parts) != 4 or not all(parts):
        raise ValueError("it does not name cluster, pool, image and snapshot")
    if any(ord(char) < 0x20 or ord(char) == 0x7F for part in parts for char in part):
        raise ValueError("it holds a control character")
    fsid, pool, image, snapshot = parts
    return RbdLocation(fsid=fsid.lower(), pool=pool, image=image, snapshot=snapshot)


def object_location(location: str, schemes: tuple[str, ...]) -> ObjectLocation:
    """What a location `<scheme>://[<user>:<key>@]<host>[/<path>]/<bucket>/<object>` names.

    Nothing in it is decoded: glance_store writes these parts as they are.

    Raises:
        ValueError: it is none, or of another scheme.
    """
    _check_text(location)
    if location.count("://") != 1:
        raise ValueError("it has not exactly one scheme")
    scheme, _, rest = location.partition("://")
    if scheme in S3_SCHEMES:
        # Glance's s3 store once wrote keys as they are, and S3's may hold a slash; names of ours hold no @.
        rest = rest.rpartition("@")[2]
    parts = urlsplit(f"{scheme}://{rest}")
    if parts.scheme not in schemes:
        raise ValueError(f"its scheme is none of {', '.join(schemes)}")
    if parts.query or parts.fragment:
        raise ValueError("it has a query or a fragment")
    host = parts.netloc.rpartition("@")[2].lower()
    names = parts.path.strip("/").split("/")
    if not host or len(names) < 2 or not all(names) or {".", ".."} & set(names):
        raise ValueError("it does not name service, bucket and object")
    *path, bucket, key = names
    return ObjectLocation(scheme=parts.scheme, service="/".join([host, *path]), bucket=bucket, key=key)


def without_keys(location: str) -> str:
    """The location without the user and key that Glance's s3 and swift stores write there; any other as it is."""
    try:
        found = object_location(location, (*S3_SCHEMES, *SWIFT_SCHEMES))
    except ValueError:
        return location
    return f"{found.scheme}://{found.service}/{found.bucket}/{found.key}"


def may_be_kept(location: str) -> bool:
    """Whether a location has nothing in it that may be a key or a password: it may be written to a disk.

    A path may let somebody read the image; so does what is kept of the image's bytes.
    """
    return not set("@?#") & set(location)


def host_of(url: str) -> str:
    """Host, and port where it has one, in lower case, of a URL or of one without its scheme; "" for anything else."""
    try:
        return urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def is_listed(name: str, listed: tuple[str, ...]) -> bool:
    """Whether a name is one of those listed, where a `*` at the end of an entry stands for any rest."""
    return any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in listed)


def _check_text(location: str) -> None:
    if len(location) > LOCATION_CHARS_MAX:
        raise ValueError(f"it has more than {LOCATION_CHARS_MAX} characters")
    if not location.isascii() or not location.isprintable() or " " in location or "\\" in location:
        raise ValueError("it holds a character that no location has")
