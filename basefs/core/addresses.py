"""Which network addresses no location may lead to, and which hosts an operator allows. Locations are from users."""

import ipaddress
import re
from collections.abc import Iterable, Iterator

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"))
)
"""Where clouds tell an instance its secrets: AWS and most others, AWS by IPv6, Alibaba, Oracle, Azure."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?")
_ENTRY = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
PORTS = {"http": 80, "https": 443}
PORTS_END = 1 << 16


def address_refusal(address: str) -> str | None:
    """Why nothing may be asked at the address unless it is allowed by itself; None where nothing speaks against it.

    An address in an address (IPv4 in IPv6, 6to4, Teredo, NAT64) counts as both. Private networks are no reason: stores
    are in them.
    """
    try:
        whole = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "it is no address"
    for one in _with_embedded(whole):
        if one in _METADATA:
            return "it is a cloud's metadata service"
        for kind in ("loopback", "link_local", "multicast", "unspecified", "reserved"):
            if getattr(one, f"is_{kind}"):
                return f"it is a {kind.replace('_', '-')} address"
    return None


def _with_embedded(address: IPAddress) -> Iterator[IPAddress]:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            yield address.ipv4_mapped
            return  # the IPv4 address by another name
        if address in _NAT64:
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
            return
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
    yield address


class AllowedHosts:
    """`host`, `host:port`, `[IPv6]`, `[IPv6]:port` of an operator; without a port that of the scheme."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ValueError, which names the entry, for one that is none of these."""
        self._hosts: set[tuple[str, int | None]] = set()
        for entry in entries:
            found = _ENTRY.fullmatch(entry.strip().lower())
            host = plain_host(found["six"] or found["name"]) if found else None
            port = int(found["port"]) if found and found["port"] else None
            if host is None or (port is not None and not 0 < port < PORTS_END):
                raise ValueError(f"{entry!r} is no host, host:port or [IPv6 address]:port")
            self._hosts.add((host, port))

    def __bool__(self) -> bool:
        return bool(self._hosts)

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        return iter(sorted(self._hosts, key=str))

    def allows(self, scheme: str, host: str, port: int) -> bool:
        """Whether the host, as the location writes it, is allowed."""
        return (host, port) in self._hosts or (PORTS.get(scheme) == port and (host, None) in self._hosts)

    def connection_refusal(self, scheme: str, address: str, port: int) -> str | None:
        """Why no connection is made to the address that an allowed host turned out to have."""
        refusal = address_refusal(address)
        host = plain_host(address.partition("%")[0])
        return None if host and self.allows(scheme, host, port) else refusal


def plain_host(text: str) -> str | None:
    """The host in one spelling: a name in lower case, an address as `ipaddress` writes it; None if it is neither.

    Numbers that a resolver takes for addresses (2130706433, 0x7f.1) stay names, and are what they resolve to.
    """
    lower = text.lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(lower))
    except ValueError:
        return lower if _NAME.fullmatch(lower) and ".." not in lower else None
