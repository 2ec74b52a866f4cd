"""Options that are right one by one and wrong together."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from basefs import mounts
from basefs.config.listen import listen_address
from basefs.config.settings import Settings
from basefs.config.source_options import source_order_problems
from basefs.errors import ConfigError
from basefs.keeper_spec import REQUEST_SOCKET_SUFFIX

PAGE_BYTES = 4096
CACHE_REQUESTS_MIN = 8
"""Requests in flight that a cache must have room for."""
SOCKET_PATH_BYTES_MAX = 107
"""sun_path of Linux without its NUL."""


def check_together(settings: Settings) -> None:
    """Returns when the settings can be used as they are.

    Raises:
        ConfigError: Names every option concerned, and why.
    """
    problems = [*_size_problems(settings), *_time_problems(settings), *_path_problems(settings)]
    try:
        listen_address(settings.metrics_listen)
    except ValueError as exc:
        problems.append(f"[basefs] metrics_listen: {exc}")
    problems += source_order_problems(settings.source_order, settings.template_image_handler)
    if not settings.nova_user:
        problems.append("[basefs] nova_user is empty")
    if problems:
        raise ConfigError("; ".join(problems))


def cache_endpoint_problem(url: str | None) -> str | None:
    """Why `[glance] cache_endpoint` cannot be used; None: it can, or is not set. The text has no part of the value."""
    if not url:
        return None
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return "it is no URL"
    if parts.scheme not in ("http", "https") or not host:
        return "it must be http://HOST[:PORT] or https://HOST[:PORT]"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "it must have no user, no query and no fragment: it is asked with Glance's token"
    return None


def _size_problems(settings: Settings) -> Iterator[str]:
    chunk_bytes = settings.chunk_bytes
    if chunk_bytes & (chunk_bytes - 1):
        yield f"[basefs] chunk_bytes = {chunk_bytes} is no power of two"
    elif settings.fetch_request_bytes_max % chunk_bytes:
        yield (
            f"[basefs] fetch_request_bytes_max = {settings.fetch_request_bytes_max} is no multiple of "
            f"chunk_bytes = {chunk_bytes}"
        )
    cache_least = CACHE_REQUESTS_MIN * settings.fetch_request_bytes_max
    if 0 < settings.cache_max_bytes < cache_least:
        yield (
            f"[basefs] cache_max_bytes = {settings.cache_max_bytes} is less than {CACHE_REQUESTS_MIN} times "
            f"fetch_request_bytes_max = {settings.fetch_request_bytes_max}; 0 is no limit"
        )
    if settings.read_ahead_bytes % PAGE_BYTES:
        yield f"[basefs] read_ahead_bytes = {settings.read_ahead_bytes} is no multiple of {PAGE_BYTES}"


def _time_problems(settings: Settings) -> Iterator[str]:
    if settings.catalog_full_refresh_s < settings.catalog_refresh_s:
        yield (
            f"[basefs] catalog_full_refresh_s = {settings.catalog_full_refresh_s:g} is less than "
            f"catalog_refresh_s = {settings.catalog_refresh_s:g}"
        )
    if settings.other_io_deadline_s > settings.guest_io_deadline_s:
        yield (
            f"[basefs] other_io_deadline_s = {settings.other_io_deadline_s:g} is more than "
            f"guest_io_deadline_s = {settings.guest_io_deadline_s:g}"
        )


def _path_problems(settings: Settings) -> Iterator[str]:
    mountpoint = settings.mountpoint
    yield from _mountpoint_problems(mountpoint)
    for name, path in (
        ("cache_dir", settings.cache_dir),
        ("control_socket", settings.control_socket),
        ("instances_path", settings.instances_path),
    ):
        if path.is_relative_to(mountpoint):
            yield f"[basefs] {name} = {path} lies on the mount point {mountpoint}"
    if mountpoint.is_relative_to(settings.cache_dir):
        yield f"[basefs] mountpoint = {mountpoint} lies in cache_dir = {settings.cache_dir}"
    if settings.cache_dir.is_relative_to(settings.control_socket):
        yield f"[basefs] control_socket = {settings.control_socket} is the cache directory or above it"
    path_bytes_max = SOCKET_PATH_BYTES_MAX - len(REQUEST_SOCKET_SUFFIX)
    if len(os.fsencode(settings.control_socket)) > path_bytes_max:
        yield f"[basefs] control_socket = {settings.control_socket} is longer than {path_bytes_max} bytes"


def _mountpoint_problems(mountpoint: Path) -> Iterator[str]:
    if mountpoint == Path("/"):
        yield "[basefs] mountpoint is the root directory"
        return
    if any(mount.is_basefs and mountpoint.is_relative_to(mount.mountpoint) for mount in mounts.mount_table()):
        return  # A stat would ask the server, which may hang, or be this very process.
    try:
        is_directory = stat.S_ISDIR(os.stat(mountpoint).st_mode)
    except OSError as exc:
        yield f"[basefs] mountpoint = {mountpoint}: {exc.strerror}"
        return
    if not is_directory:
        yield f"[basefs] mountpoint = {mountpoint} is no directory"
