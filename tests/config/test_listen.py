"""The address of the metrics."""

import pytest

from basefs.config.listen import listen_address
from basefs.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("127.0.0.1:9757", ("127.0.0.1", 9757)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_an_ip_address_and_a_port(text: str, address: tuple[str, int] | None) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize(
    "text", ["9757", ":9757", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "::1:9757", "[127.0.0.1]:9757", "[::1]:٣"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"IP address|form ADDRESS:PORT|brackets"):
        listen_address(text)


def test_a_host_name_stops_every_command(config_file) -> None:
    with pytest.raises(ConfigError, match=r"\[basefs\] metrics_listen: localhost is no IP address"):
        config_file.settings(metrics_listen="localhost:9757")
