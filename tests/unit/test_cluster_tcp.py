"""Addresses of nodes are IP addresses with a port."""

from __future__ import annotations

import pytest

from flexkv.cluster import tcp
from flexkv.common.errors import ConfigError


async def test_an_address_that_is_taken_is_refused() -> None:
    """A port that cannot be bound is a mistake in the configuration, which names it."""
    with tcp.listening("127.0.0.1", 0, 16) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=f"p2p_port='127.0.0.1:{port}'"):
            tcp.listening("127.0.0.1", port, 16)


def test_an_address_of_another_machine_is_refused() -> None:
    """It is local_ip that is wrong then, not the port."""
    with pytest.raises(ConfigError, match=r"local_ip='192\.0\.2\.1': is no address of this"):
        tcp.listening("192.0.2.1", 0, 16)


@pytest.mark.parametrize("local_ip", ["0.0.0.0", "::", "node-7", "", "localhost"])
def test_an_address_that_others_cannot_use_is_refused(local_ip: str) -> None:
    """What is told to other nodes must be the IP address of one machine."""
    with pytest.raises(ConfigError, match="local_ip"):
        tcp.listening(local_ip, 0, 16)


@pytest.mark.parametrize("address", ["", "1.2.3.4", "host:80", "1.2.3.4:0", "1.2.3.4:99999"])
async def test_an_address_that_is_not_valid_is_not_connected_to(address: str) -> None:
    """An address in the cluster's records is an IP address and a port; no name is looked up."""
    with pytest.raises(ValueError, match="not an IP address and a port"):
        await tcp.connected(address)


def test_addresses_are_written_and_read() -> None:
    """What is written as an address is read as the same, for both kinds of IP addresses."""
    for ip in ("127.0.0.1", "2001:db8::1"):
        assert tcp.parts_of(tcp.address_of(ip, 7)) == (ip, 7)
