"""The stores behind Glance that the operator configured; none by default."""

from oslo_config.cfg import ConfigOpts

from basefs.config import Settings
from basefs.core.addresses import AllowedHosts
from basefs.errors import ConfigError
from basefs.sources.http_store import HttpStore
from basefs.sources.rbd_store import RbdStore
from basefs.sources.s3_store import S3Store
from basefs.sources.store import Store
from basefs.sources.swift_store import open_swift


def open_stores(settings: Settings, conf: ConfigOpts, *, threads_max: int) -> list[Store]:
    """Those that are configured and in source_order. Nothing is sent yet.

    Raises:
        ConfigError: A section is not usable; names the option.
    """
    stores: list[Store] = []
    wanted = settings.source_order
    if settings.rbd is not None and "rbd" in wanted:
        stores.append(RbdStore(settings.rbd, threads_max=threads_max))
    if settings.s3 is not None and "s3" in wanted:
        stores.append(S3Store(settings.s3, threads_max=threads_max))
    if settings.swift is not None and "swift" in wanted:
        stores.append(open_swift(conf, settings.swift, threads_max=threads_max))
    if settings.http_location.allowed_hosts and "http" in wanted:
        stores.append(_http_store(settings, threads_max))
    return stores


def _http_store(settings: Settings, threads_max: int) -> HttpStore:
    options = settings.http_location
    try:
        hosts = AllowedHosts(options.allowed_hosts)
    except ValueError as exc:
        raise ConfigError(f"[http_location] allowed_hosts: {exc}") from None
    return HttpStore(hosts, cafile=options.cafile, insecure=options.insecure, threads_max=threads_max)
