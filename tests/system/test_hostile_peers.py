"""Nodes that know the secret and keep to nothing else: what another one tells and holds for them.

`HOSTILE_SEEDS=100 pytest tests/system/test_hostile_peers.py` runs that many.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.index.keys import KeyChain
from flexkv.observe.logs import configure_logging
from flexkv.tiers.backend import LocalBackend
from flexkv.tiers.peer import _Node

from .hostile_peer import HostilePeer, Target
from .test_peers import Node, peer_tokens, until
from .test_remote import BLOCKS, TOKENS, WHOLE, prompt

SEEDS = int(os.environ.get("HOSTILE_SEEDS", "3"))
ATTACKERS, STEPS, PROMPTS = 3, 150, 3


@pytest.fixture
def keys(shared: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of nodes that share with each other, and with no other test's nodes."""
    return {**shared, "enable_remote": False, "node_ttl_seconds": 3.0, "cluster_secret": "known"}


async def target_of(owner: Node) -> Target:
    """Return what an attacker knows of a node, which gets prompts, and what it may hear."""
    engine = owner.manager.engine
    backend, node = engine._backend, engine._core.cluster
    assert isinstance(backend, LocalBackend)
    assert isinstance(node, _Node)
    size = engine.sizes.block_bytes[0]
    prompts, blocks, sums = [], {}, {}
    for seed in range(1, PROMPTS + 1):
        await owner.put(seed)
        chained = KeyChain(engine.sizes.spaces[0]).keys(prompt(seed, BLOCKS))
        prompts.append(chained)
        places = engine._residency.run(chained, 0, BLOCKS).ready[Tier.HOST].block_ids.tolist()
        assert len(places) == BLOCKS
        for position, place in enumerate(places, 1):
            key = chained[position * BLOCK_KEY_BYTES : (position + 1) * BLOCK_KEY_BYTES]
            blocks[key] = bytes(backend.arena.array[place, :size])
            sums[key] = int(node._host.sums[place])
    return Target(owner.cluster.address, node._key, node._identity, prompts, blocks, sums)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_hostile_peer_hears_what_it_was_granted_and_leaves_no_hold(
    keys: dict[str, Any], seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever peers say, they get blocks of their own grants only, and none again and again.

    The owner goes on storing and evicting meanwhile, and keeps nothing for them in the end.
    """
    configure_logging("info", as_json=True)
    async with Node(keys) as owner, Node(keys) as reader:
        target = await target_of(owner)
        attackers: list[HostilePeer] = []
        for number in range(ATTACKERS):
            attackers.append(HostilePeer(target, ATTACKERS * seed + number, attackers))

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each.run(STEPS)) for each in attackers]
            while not all(task.done() for task in running):
                for other in range(10, 16):
                    await owner.put(other)
                    await owner.put(1 + other % PROMPTS)
        assert sum(each.read_blocks for each in attackers) > 50
        assert sum(each.refused for each in attackers) > 20
        assert sum(each.too_often for each in attackers) > 0
        for each in attackers:
            each.close()

        await until(lambda: owner.cluster.connections <= 3)
        await until(lambda: owner.cluster.grants.grants == 0)
        assert owner.cluster.grants.pinned_blocks == 0
        told = owner.manager.statistics()
        assert told.tiers[Tier.HOST.label].pinned_blocks == 0
        assert told.claims == 0
        await owner.put(1)
        await until(lambda: peer_tokens(reader, 1) == WHOLE * TOKENS)
        assert await reader.get(1) == WHOLE
    assert "task_failed" not in capfd.readouterr().err
