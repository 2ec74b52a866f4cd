"""The options of where images are read from: [basefs] source_order, [http_location], [file_location]."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

from basefs.errors import ConfigError

HTTP_SECTION = "http_location"
FILE_SECTION = "file_location"
SOURCE_NAMES = ("volume", "rbd", "file", "s3", "swift", "http", "glance")

SOURCE_ORDER_OPT = cfg.ListOpt(
    "source_order",
    default=list(SOURCE_NAMES),
    help="Where an image is read, of all places that have it: the first one that works. What is left out is not used, "
    "but for glance, the last resort. volume (see template_image_handler) stands first or not at all. rbd, s3, swift, "
    "http and file are used only where their sections allow them.",
)

HTTP_OPTS: list[cfg.Opt] = [
    cfg.ListOpt(
        "allowed_hosts",
        default=[],
        help="Hosts that http(s) locations of images may name: host, host:port or [IPv6 address]:port, separated by "
        "commas; without a port 80 or 443 by the scheme. None: such locations are not read. Locations are data from "
        "users, and a host's paths say nothing of images: allow hosts that have nothing but what any user may read. A "
        "name must not lead to a loopback, link-local or metadata address, unless that address is listed, too.",
    ),
    cfg.StrOpt("cafile", help="PEM file of the authorities that https servers are checked with; default: the usual."),
    cfg.BoolOpt("insecure", default=False, help="Do not check the certificates of https servers."),
]

FILE_OPTS: list[cfg.Opt] = [
    cfg.ListOpt(
        "directories",
        default=[],
        help="Directories of Glance's file stores (filesystem_store_datadir) that are mounted on this host at the same "
        "path, separated by commas. file locations below them are read in place, nothing of them is copied into the "
        "cache. None: such locations are not read. basefs opens files as its own user, and follows no links.",
    ),
    cfg.BoolOpt(
        "any_name",
        default=False,
        help="Read files that are not called by the id of their image, as Glance's file store calls them. Only where "
        "nobody but operators can register locations.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLocationSettings:
    """`[http_location]`. The hosts are not taken apart yet."""

    allowed_hosts: tuple[str, ...]
    cafile: str | None
    insecure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLocationSettings:
    """`[file_location]`, checked: the paths are absolute, and as they are written."""

    directories: tuple[Path, ...]
    any_name: bool


def http_location_settings(conf: cfg.ConfigOpts) -> HttpLocationSettings:
    """What the section says.

    Raises:
        ConfigError: The cafile cannot be read.
    """
    section = conf[HTTP_SECTION]
    if section.cafile:
        try:
            Path(section.cafile).read_bytes()
        except OSError as exc:
            raise ConfigError(f"[http_location] cafile = {section.cafile}: {exc.strerror}") from None
    return HttpLocationSettings(
        allowed_hosts=tuple(section.allowed_hosts), cafile=section.cafile or None, insecure=section.insecure
    )


def file_location_settings(conf: cfg.ConfigOpts) -> FileLocationSettings:
    """What the section says.

    Raises:
        ConfigError: A directory is no absolute path, or the root.
    """
    section = conf[FILE_SECTION]
    problems = [
        f"[file_location] directories: {text!r} is no absolute path of a directory below /, without . and .."
        for text in section.directories
        if not text.startswith("/") or "\0" in text or {".", ".."} & set(text.split("/")) or not text.strip("/")
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    return FileLocationSettings(directories=tuple(map(Path, section.directories)), any_name=section.any_name)


def source_order_problems(order: Sequence[str], template_image_handler: str) -> Iterator[str]:
    """What is wrong with [basefs] source_order."""
    known = ", ".join(SOURCE_NAMES)
    for name in dict.fromkeys(order):
        if name not in SOURCE_NAMES:
            yield f"[basefs] source_order: there is no source {name!r}; there are {known}"
        elif order.count(name) > 1:
            yield f"[basefs] source_order names {name} more than once"
    if "volume" in order[1:]:
        yield "[basefs] source_order: volume stands first or not at all"
    if "volume" not in order and template_image_handler == "volume-linking":
        yield "[basefs] source_order leaves volume out, and template_image_handler = volume-linking shows nothing else"
