"""TCP sockets between nodes: addresses, options, and how to connect.

An address is `ip:port`, or `[ip]:port` for IPv6. It names no host: nobody waits for a name server.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from ipaddress import ip_address

from flexkv.common.errors import ConfigError
from flexkv.common.sharing import check_local_ip

KEEP_IDLE_S, KEEP_INTERVAL_S, KEEP_PROBES = 10, 5, 3
"""A connection whose other machine is gone ends after 25 s, even if nothing is sent."""


def address_of(ip: str, port: int) -> str:
    """Return the address of a port."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def parts_of(address: str) -> tuple[str, int]:
    """Return the IP address and the port of an address.

    Raises:
        ValueError: it is not valid.
    """
    host, _, port = address.rpartition(":")
    ip = host.removeprefix("[").removesuffix("]")
    try:
        ip_address(ip)
        number = int(port)
    except ValueError:
        number = 0
    if not 0 < number < 1 << 16:
        raise ValueError(f"{address!r} is not an IP address and a port")
    return ip, number


def listening(local_ip: str, port: int, backlog: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    check_local_ip(local_ip)
    bound = socket.socket(_family(local_ip), socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((local_ip, port))
        bound.listen(backlog)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError("local_ip", local_ip, "is no address of this machine") from error
        why = f"cannot be listened on: {error.strerror or error}"
        raise ConfigError("p2p_port", address_of(local_ip, port), why) from error
    return bound


async def connected(address: str) -> socket.socket:
    """Connect to an address, and return the socket, which does not block.

    Raises:
        OSError: nobody listens there.
        ValueError: the address is not valid.
    """
    ip, port = parts_of(address)
    made = socket.socket(_family(ip), socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        set_options(made)
        await asyncio.get_running_loop().sock_connect(made, (ip, port))
    except BaseException:
        made.close()
        raise
    return made


def set_options(connection: socket.socket) -> None:
    """Send small messages at once, and notice a machine that is gone.

    Raises:
        OSError: the connection has ended already.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_PROBES)


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET
