"""Twenty engines share in one process, over one Redis, while much happens by seed.

What is put depends on the prompt and on the weights of the node. A reset of the cluster changes the
weights of all nodes. A node that is cleared alone gets weights of its own, and so does a node that
starts apart. So bytes of before a clear are wrong bytes.

`MANY_ROUNDS=200 MANY_SEED=7 pytest -m soak tests/system/test_many_nodes.py` runs two hundred.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.common.request import KVResponseStatus
from flexkv.testing.redis_server import RedisServer

from .test_generations import generations_of, until_closed
from .test_peers import Node, until
from .test_remote import BLOCKS, TOKENS, contents, prompt

NODES = int(os.environ.get("MANY_NODES", "20"))
ROUNDS = int(os.environ.get("MANY_ROUNDS", "8"))
SEED = int(os.environ.get("MANY_SEED", "1"))
PROMPTS = 12
ROUND_S = 300.0
"""How long a round may take: twenty engines share two cores."""


class Member(Node):
    """An engine that computes with some weights.

    Attributes:
        weights: their number.
    """

    weights = 0

    async def put(self, seed: int, blocks: int = BLOCKS) -> None:
        """Put a prompt, as these weights compute it."""
        for cache, content in zip(self.caches, contents(self._content(seed)), strict=True):
            cache.copy_(content)
        tokens = prompt(seed, blocks)
        response = await self.manager.put(tokens, np.arange(len(tokens)))
        assert response.status is KVResponseStatus.SUCCESS

    async def get(self, seed: int, blocks: int = BLOCKS) -> int:
        """Get a prompt, check that these weights compute the same, and return the blocks."""
        for cache in self.caches:
            cache.zero_()
        tokens = prompt(seed, blocks)
        response = await self.manager.get(tokens, np.arange(len(tokens)))
        blocks = int(np.count_nonzero(response.return_mask)) // TOKENS
        for cache, content in zip(self.caches, contents(self._content(seed)), strict=True):
            assert torch.equal(cache[:, :blocks], content[:, :blocks]), f"seed {SEED}"
        return blocks

    def _content(self, seed: int) -> int:
        return 1000 * self.weights + seed

    @property
    def is_apart(self) -> bool:
        """Return whether it shares nothing."""
        return self.cluster.shared_generation is None

    async def until_joined(self) -> None:
        """Wait until Redis has told its generation."""
        await until(lambda: generations_of(self).is_known, ROUND_S)


class Soak:
    """The nodes, and what happens to them.

    Attributes:
        counts: of events, gets, and blocks that came.
    """

    def __init__(self, keys: dict[str, Any], redis: RedisServer) -> None:
        self.counts: Counter[str] = Counter()
        self._keys, self._redis, self._random = keys, redis, Random(SEED)
        self._weights, self._of_cluster = count(1), 0
        self._nodes: list[Member] = []

    async def run(self) -> None:
        """Run all rounds, and close the nodes."""
        try:
            for _ in range(NODES):
                await self._start()
            for _ in range(ROUNDS):
                async with asyncio.timeout(ROUND_S):
                    await self._round()
            for node in self._nodes:
                await until(lambda: node.manager.statistics().claims == 0, ROUND_S)  # noqa: B023
        finally:
            for node in self._nodes:
                await node.__aexit__(None, None, None)

    async def _start(self) -> None:
        node = Member(self._keys)
        await node.__aenter__()
        await node.until_joined()
        node.weights = next(self._weights) if node.is_apart else self._of_cluster
        self._nodes.append(node)

    async def _round(self) -> None:
        """Let all nodes work while something fails; then repair it, and maybe clear."""
        faults = [self._kill, self._kill, self._leave, self._flush, self._lose_redis, self._nothing]
        fault = self._random.choice(faults)
        self.counts[fault.__name__.strip("_")] += 1
        async with asyncio.TaskGroup() as tasks:
            victim = self._nodes.pop(self._random.randrange(len(self._nodes)))
            for node in self._nodes:
                tasks.create_task(self._work(node))
            await fault(victim)
        if victim not in self._nodes:
            await self._start()
        clear = self._random.choice([self._reset, self._clear_alone, self._nothing])
        self.counts[clear.__name__.strip("_")] += 1
        await clear(self._random.choice(self._nodes))

    async def _work(self, node: Member) -> None:
        for _ in range(4):
            seed = self._random.randrange(PROMPTS)
            if self._random.random() < 0.4:
                await node.put(seed)
            else:
                self.counts["blocks"] += await node.get(seed)
                self.counts["gets"] += 1

    # -- events ---------------------------------------------------------------------------------

    async def _nothing(self, node: Member) -> None:
        if node not in self._nodes:
            self._nodes.append(node)

    async def _kill(self, node: Member) -> None:
        """End a node in the middle, without a word to the others."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MetadataPlane, "leave", _says_nothing)
            await node.__aexit__(None, None, None)

    async def _leave(self, node: Member) -> None:
        await node.__aexit__(None, None, None)

    async def _flush(self, node: Member) -> None:
        await _redis_says(self._redis, "FLUSHALL")
        self._nodes.append(node)

    async def _lose_redis(self, node: Member) -> None:
        self._redis.kill()
        await asyncio.sleep(0)
        self._redis.start()
        self._nodes.append(node)

    async def _reset(self, node: Member) -> None:
        await until(lambda: node.cluster.state.is_store_up, ROUND_S)
        generation = await node.manager.reset_cluster()
        self._of_cluster = next(self._weights)
        for each in self._nodes:
            await until(lambda: each.cluster.shared_generation == generation, ROUND_S)  # noqa: B023
            each.weights = self._of_cluster

    async def _clear_alone(self, node: Member) -> None:
        node.manager.clear()
        node.weights = next(self._weights)
        await until_closed(self._keys, node)


async def _says_nothing(_: MetadataPlane) -> None:
    pass


async def _redis_says(server: RedisServer, *command: str) -> None:
    redis = RedisCommands("127.0.0.1", server.port, server.password, ROUND_S)
    await redis.run([command])
    await redis.close()


@pytest.mark.soak
async def test_twenty_nodes_get_no_wrong_byte(
    shared: dict[str, Any], redis_server: RedisServer
) -> None:
    """Whatever happens, every request ends, what comes is right, and nothing is left behind."""
    keys = {**shared, "enable_remote": False, "node_ttl_seconds": 6.0, "p2p_zone": "many"}
    soak = Soak(keys, redis_server)
    await soak.run()
    sys.stdout.write(f"seed {SEED}: {dict(soak.counts)}\n")
    assert soak.counts["gets"] > NODES * ROUNDS
