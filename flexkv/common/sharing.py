"""Rules for what a node that shares blocks tells others, and asks of them."""

from __future__ import annotations

from ipaddress import ip_address

from flexkv.common.config_keys import HIDDEN
from flexkv.common.errors import ConfigError


def check_local_ip(local_ip: str) -> None:
    """Check that other nodes can connect to an address.

    Raises:
        ConfigError: it is no IP address, or not that of one node.
    """
    try:
        address = ip_address(local_ip)
    except ValueError as error:
        why = "must be the IP address of this node, as other nodes reach it"
        raise ConfigError("local_ip", local_ip, why) from error
    if address.is_unspecified or address.is_multicast:
        why = "must be the address of one node: other nodes connect to it"
        raise ConfigError("local_ip", local_ip, why)


def check_secrets(local_ip: str, *secrets: str) -> None:
    """Check that other machines need a secret to connect to an address.

    Raises:
        ConfigError: they reach it, and no secret is set.
    """
    if any(secrets) or ip_address(local_ip).is_loopback:
        return
    why = (
        f"anybody who reaches {local_ip} could read the cache: set cluster_secret, or key_secret "
        "or redis_password"
    )
    raise ConfigError("cluster_secret", HIDDEN, why)
