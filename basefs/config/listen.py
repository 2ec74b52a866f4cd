"""`host:port` of the configuration."""

import ipaddress

PORT_MAX = 65535


def listen_address(text: str) -> tuple[str, int] | None:
    """IP address and port of `127.0.0.1:9757` or `[::1]:9757`; None for an empty text, which means "not at all".

    Port 0 is any free one. A host name is refused: it may resolve to an address that others reach, too.

    Raises:
        ValueError: of another form; the message says what is wrong.
    """
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or int(port) > PORT_MAX:
        raise ValueError(f"{text} is not of the form ADDRESS:PORT, e.g. 127.0.0.1:9757 or [::1]:9757")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise ValueError(f"{host} is no IP address") from None
    if isinstance(address, ipaddress.IPv6Address) != (bare != host):
        raise ValueError(f"{text}: IPv6 addresses, and only those, stand in brackets")
    return str(address), int(port)
