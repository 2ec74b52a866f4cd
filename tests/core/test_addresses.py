"""Where a location may lead, and where not."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs.core.addresses import AllowedHosts, address_refusal, plain_host


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "169.254.1.1", "169.254.169.254", "fe80::1%eth0", "fe80::1",
        "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "224.0.0.1", "ff02::1", "255.255.255.255",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::169.254.169.254",
        "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "none", "", "127.1",
    ],
)  # fmt: skip
def test_nobody_is_led_to_the_node_itself_or_to_a_clouds_metadata(address: str) -> None:
    assert address_refusal(address)


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "192.168.7.7", "172.16.0.1", "8.8.8.8", "2001:db8::1", "fd00::5", "64:ff9b::8.8.8.8"]
)
def test_stores_in_private_networks_may_be_asked(address: str) -> None:
    assert address_refusal(address) is None


def test_a_host_is_allowed_with_its_port_or_that_of_the_scheme() -> None:
    hosts = AllowedHosts(["Images.Example", "other:8080", "[2001:DB8::1]:81", "10.0.0.1"])
    assert hosts.allows("http", "images.example", 80)
    assert hosts.allows("https", "images.example", 443)
    assert not hosts.allows("http", "images.example", 443)
    assert not hosts.allows("http", "images.example", 8080)
    assert hosts.allows("https", "other", 8080)
    assert not hosts.allows("http", "other", 80)
    assert hosts.allows("http", "2001:db8::1", 81)
    assert not hosts.allows("http", "example", 80)
    assert not AllowedHosts([])


@pytest.mark.parametrize(
    "entry", ["", "http://x", "x:0", "x:65536", "x:y", "u@x", "[::1", "a b", "x/y", "*", "-x", "a..b", "[name]:80"]
)
def test_what_is_no_host_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is no host, host:port"):
        AllowedHosts([entry])


def test_an_address_that_is_refused_can_be_allowed_by_itself() -> None:
    hosts = AllowedHosts(["localhost", "127.0.0.1:8080", "2130706433"])
    assert hosts.connection_refusal("http", "127.0.0.1", 80) == "it is a loopback address"
    assert hosts.connection_refusal("http", "127.0.0.1", 8080) is None
    assert hosts.connection_refusal("http", "::1", 8080) == "it is a loopback address"
    assert hosts.connection_refusal("http", "10.0.0.1", 9) is None


@given(st.ip_addresses())
def test_an_address_in_another_is_refused_with_it(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if address.version == 4 and address_refusal(str(address)):
        for wrapped in (f"::ffff:{address}", f"64:ff9b::{address}"):
            assert address_refusal(wrapped)
    assert plain_host(str(address)) == str(address)
