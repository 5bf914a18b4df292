"""Which addresses webhooks may connect to."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from service.requests.webhooks.addresses import may_connect

REFUSED = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::7f00:1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = [
    "1.1.1.1",
    "172.15.255.255",
    "172.32.0.1",
    "223.255.255.255",
    "2606:4700::1111",
    "::ffff:1.1.1.1",
    "64:ff9b::101:101",
]


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_not_on_the_internet_are_refused(address: str):
    assert not may_connect(address, [])


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_on_the_internet_are_accepted(address: str):
    assert may_connect(address, [])


def test_no_address_is_accepted_that_python_calls_private():
    draw = random.Random(0)
    edges = [a for text in REFUSED for a in (ip_address(text.partition("%")[0]),) if a.version == 4]
    near = [IPv4Address((int(edge) + step) % 2**32) for edge in edges for step in (-1, 1)]
    four = near + [IPv4Address(draw.getrandbits(32)) for _ in range(20_000)]
    six = [IPv6Address(draw.getrandbits(128)) for _ in range(2_000)]
    six += [IPv6Address(2 << 124 | draw.getrandbits(124)) for _ in range(2_000)]
    accepted = [address for address in four + six if may_connect(str(address), [])]
    assert all(address.is_global and not address.is_multicast for address in accepted)
    # and of IPv4 nothing else is refused, but some addresses of protocols
    refused = set(four) - set(accepted)
    protocols = ip_network("192.88.99.0/24"), ip_network("192.0.0.0/24")
    special = [a for a in refused if not a.is_global or a.is_multicast or a.is_reserved]
    assert all(any(a in network for network in protocols) for a in refused.difference(special))


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd00::7"])
def test_allowed_networks_are_accepted_in_every_form(address: str):
    networks = [ip_network("10.0.0.0/8"), ip_network("fd00::/64")]
    assert may_connect(address, networks)
    assert not may_connect("192.168.0.1", networks)
    assert not may_connect("::1", networks)
