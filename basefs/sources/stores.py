"""The stores behind Glance that the operator configured; none by default."""

from basefs.config import Settings
from basefs.core.addresses import AllowedHosts
from basefs.errors import ConfigError
from basefs.sources.http_store import HttpStore
from basefs.sources.store import Store


def open_stores(settings: Settings, *, threads_max: int) -> list[Store]:
    """Those that are configured and in source_order. Nothing is sent yet.

    Raises:
        ConfigError: A section is not usable; names the option.
    """
    stores: list[Store] = []
    if settings.http_location.allowed_hosts:
        stores.append(_http_store(settings, threads_max))
    return [store for store in stores if store.name in settings.source_order]


def _http_store(settings: Settings, threads_max: int) -> HttpStore:
    options = settings.http_location
    try:
        hosts = AllowedHosts(options.allowed_hosts)
    except ValueError as exc:
        raise ConfigError(f"[http_location] allowed_hosts: {exc}") from None
    return HttpStore(hosts, cafile=options.cafile, insecure=options.insecure, threads_max=threads_max)
