"""A node that bounds what it sends to others, and its reader."""

from __future__ import annotations

from typing import Any

from flexkv.common.config import MB
from flexkv.tiers.peer import _Node

from .test_peers import Node, peer_tokens, until
from .test_remote import TOKENS, WHOLE


async def test_the_rate_of_what_is_sent_is_in_bytes(shared: dict[str, Any]) -> None:
    """With p2p_out_mb_per_s a prompt comes whole, in grants of what can be sent in a second."""
    keys = {**shared, "enable_remote": False}
    async with Node(keys, p2p_out_mb_per_s=0.4) as owner, Node(keys) as reader:
        await owner.put(1)
        await until(lambda: peer_tokens(reader, 1) == WHOLE * TOKENS)
        assert await reader.get(1) == WHOLE
        node = owner.manager.engine._core.cluster
        assert isinstance(node, _Node)
        assert node._sending._rate._per_s == 0.4 * MB
        assert owner.cluster.grants.granted > 1
        (read,) = reader.cluster.read.values()
        assert (read.blocks, read.failed, read.missing) == (WHOLE, 0, 0)
        assert owner.cluster.lent_bytes == read.bytes
