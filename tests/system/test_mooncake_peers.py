"""Engines that share host memory by Mooncake's TransferEngine, and what becomes of its faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv.io.peer.mooncake import MooncakeCounts
from flexkv.testing.redis_server import RedisServer

from .test_peers import Node, peer_tokens, until
from .test_remote import TOKENS, WHOLE


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a running Redis."""
    redis = RedisServer()
    redis.start()
    yield redis
    redis.close()


@pytest.fixture
def keys(server: RedisServer, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Return the keys of nodes that share with each other by Mooncake."""
    path = tmp_path / "mooncake.json"
    path.write_text(json.dumps({"engine_ip": "127.0.0.1", "protocol": "tcp"}))
    return {
        "enable_remote": False,
        "enable_p2p_cpu": True,
        "redis_port": server.port,
        "p2p_zone": request.node.name.partition("[")[0][-60:],
        "node_ttl_seconds": 3.0,
        "mooncake_config_path": str(path),
    }


def mooncake(node: Node) -> MooncakeCounts:
    """Return what a node has read by Mooncake."""
    counts = node.cluster.mooncake
    assert counts is not None
    return counts


async def until_lent(*nodes: Node) -> None:
    """Wait until the engines of some nodes run."""
    for node in nodes:
        await until(lambda: mooncake(node).endpoint != "")  # noqa: B023 -- called at once


async def test_a_node_gets_what_another_one_has(keys: dict[str, Any]) -> None:
    """Blocks of another node come by Mooncake, with the right bytes, and nothing stays held."""
    async with Node(keys) as first, Node(keys) as second:
        await until_lent(first, second)
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks["peer"] == WHOLE
        assert mooncake(second).blocks == WHOLE
        assert first.manager.statistics().claims == 0
