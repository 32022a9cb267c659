"""Peers that do not read what the server sends them: clients are cut off, agents never are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ClosedError
from flexkv.kvmanager import KVManager
from flexkv.server import server as server_module
from flexkv.server.address import socket_path
from flexkv.server.backend import ServerBackend
from flexkv.server.listen import Listener
from flexkv.server.server import Server
from flexkv.server.wire import Match, Matched, Settle, Settled, framed

from .caches import MODEL
from .serving import Peer

FLOOD = 100_000
ANSWERS = 2000
"""More than the kernel keeps for a peer that does not read."""


@pytest.fixture
async def served(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    """Serve in this process, to peers that may leave 16 KiB unread; yield the settings."""
    monkeypatch.setattr(server_module, "UNSENT_BYTES_MAX", 16 << 10)
    listener = Listener(socket_path(settings.server_recv_port))
    cache = settings.cache_config
    backend = ServerBackend(cache, cache.sized(MODEL))
    async with KVManager(MODEL, cache, backend=backend) as manager:
        server = Server(manager.engine, backend, listener)
        server.start()
        yield settings
        await server.close()
    listener.close()


def answers(settings: Settings, role: str, said: Any, kind: type) -> int:
    """Ask FLOOD times without reading an answer; then return how many there are, up to ANSWERS."""
    peer, count = Peer(settings, role, 1), 0
    peer.connected.socket.settimeout(10 if role == "client" else 0.5)
    with suppress(OSError):  # the server hangs up on a client, and stops reading from an agent
        for _ in range(FLOOD // 100):
            peer.connected.socket.sendall(framed(said) * 100)
    peer.connected.socket.settimeout(10)
    with suppress(OSError, ClosedError):
        for _ in range(ANSWERS):
            peer.hear(kind)
            count += 1
    peer.close()
    return count


async def test_a_client_that_does_not_read_is_cut_off(served: Settings) -> None:
    """A client that leaves too much unread loses its connection."""
    asked = Match(1, bytes(32), 0, False, False)
    assert await asyncio.to_thread(answers, served, "client", asked, Matched) < ANSWERS


async def test_an_agent_that_does_not_read_keeps_its_connection(served: Settings) -> None:
    """An agent is not cut off, as that would not stop its copies; it is served once it reads."""
    asked = Settle(1, tuple(range(20)))
    assert await asyncio.to_thread(answers, served, "agent", asked, Settled) == ANSWERS
