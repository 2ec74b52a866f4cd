"""HTTP to places that users' data name: only to addresses that are allowed, whatever a name resolves to.

What is looked at is the address that a connection is made to, each time one is made, so a name that changes its answer
leads nowhere. No proxy, no netrc, no cookies, no redirects.
"""

import http.cookiejar
import logging
import socket
from collections.abc import Mapping

import requests
import urllib3
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import connection as urllib3_connection

from basefs import errors
from basefs.concurrency.exchange import InterruptibleAdapter, PlainConnection, PlainPool, TlsConnection, TlsPool
from basefs.core.addresses import AllowedHosts

ADDRESSES_MAX = 3
"""So many addresses of a name are tried, each for the connect time-out."""


def guarded_session(hosts: AllowedHosts, *, verify: bool | str, connections_max: int) -> requests.Session:
    """A `requests` session whose connections go nowhere but where `hosts` lets them.

    A request to another address raises SourceForbiddenError. `verify`: as requests has it.
    """
    session = _Session()
    session.trust_env = False
    session.verify = verify
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    session.headers.clear()
    adapter = _adapter_class(hosts)(pool_connections=8, pool_maxsize=connections_max)
    for scheme in list(session.adapters):
        session.mount(scheme, adapter)
    return session


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: requests would read the whole body of a redirect that it is not to follow."""


class _NoQueries(logging.Filter):
    """urllib3 logs each request, with level DEBUG; a query may be a signature that lets anybody read."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_NoQueries())


def _adapter_class(hosts: AllowedHosts) -> type[InterruptibleAdapter]:
    class Plain(PlainConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(self, "http", hosts)

    class Tls(TlsConnection):
        def _new_conn(self) -> socket.socket:
            return _connected(self, "https", hosts)

    class GuardedPool(PlainPool):
        ConnectionCls = Plain  # type: ignore[mutable-override]  # a class attribute made to be overridden

    class GuardedTlsPool(TlsPool):
        ConnectionCls = Tls  # type: ignore[mutable-override]

    class Adapter(InterruptibleAdapter):
        pool_classes: Mapping[str, type[urllib3.HTTPConnectionPool]] = {"http": GuardedPool, "https": GuardedTlsPool}

    return Adapter


def _connected(made: PlainConnection | TlsConnection, scheme: str, hosts: AllowedHosts) -> socket.socket:
    """As urllib3's `_new_conn`, by addresses that were looked at."""
    try:
        found = socket.getaddrinfo(made.host, made.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as exc:
        raise NameResolutionError(made.host, made, socket.gaierror(str(exc))) from exc
    addresses = list(dict.fromkeys(str(where[0]) for *_, where in found))
    refusals = {address: hosts.connection_refusal(scheme, address, made.port) for address in addresses}
    if refusal := next(filter(None, refusals.values()), None):
        raise errors.SourceForbiddenError(
            f"{made.host} leads to an address that allowed_hosts does not have: {refusal}"
        )
    failure: OSError = OSError("no address")
    for address in addresses[:ADDRESSES_MAX]:
        try:
            return urllib3_connection.create_connection(
                (address, made.port), made.timeout, socket_options=made.socket_options
            )
        except OSError as exc:
            failure = exc
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(made, f"no connection to {made.host} in time") from failure
    raise NewConnectionError(made, f"no connection: {failure}") from failure
