"""The proxy with which the wire between nodes is spoiled."""

from __future__ import annotations

import asyncio
import socket
from random import Random

from flexkv.cluster.tcp import address_of, connected
from flexkv.testing.faulty_tcp import GREETING, Fault, FaultyTcp


async def all_of(end: socket.socket) -> bytes:
    """Return what the other end says until it ends."""
    got = b""
    while chunk := await asyncio.get_running_loop().sock_recv(end, 100):
        got += chunk
    return got


async def test_a_frozen_connection_goes_on_once_the_wire_is_healed() -> None:
    """What either end says after that arrives without another heal, and so does the end of it."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        wire = FaultyTcp(Random(1))
        near = await connected(wire.before(address_of(*listening.getsockname()[:2])))
        far, _ = await loop.sock_accept(listening)
    wire.arm(Fault("freeze", GREETING, True, 0, 1))
    await loop.sock_sendall(near, b"held up")
    while not wire.met["freeze"]:  # noqa: ASYNC110 -- the proxy's state
        await asyncio.sleep(0)
    wire.heal()
    async with asyncio.timeout(20):
        await loop.sock_sendall(far, b"answer")
        far.shutdown(socket.SHUT_WR)
        assert await all_of(near) == b"answer"
        near.shutdown(socket.SHUT_WR)
        assert await all_of(far) == b"held up"
    near.close()
    far.close()
    await wire.close()
