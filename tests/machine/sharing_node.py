"""An engine that shares its blocks, in a network of its own, which a test tells what to do.

Its input has requests and its output answers, a line of JSON each, with the number of the request;
several are under way at once. The bytes of a block depend on its prompt alone, and are compared
after each get. It ends with its input.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from psutil import Process

from flexkv.cluster import strangers
from flexkv.cluster.allowance import Allowance
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import FlexKVError
from flexkv.common.terms import Tier
from flexkv.io.peer import mooncake
from flexkv.kvmanager import KVManager
from flexkv.testing.namespaces import enter
from flexkv.tiers.backend import LocalBackend

PER_BLOCK = 16
BLOCKS = 32
"""Blocks of a prompt."""
BLOCK_BYTES = 256 << 10
PROMPT_BYTES = BLOCKS * BLOCK_BYTES
AREAS = 8
"""How many prompts have room on the device."""
HOST_BLOCKS = 192
MODEL = ModelConfig(
    num_layers=4, num_kv_heads=8, head_size=128, dtype="float16", model_id="a model"
)
PR_SET_PDEATHSIG = 1


def prompt(seed: int) -> NDArray[np.int64]:
    """Return the tokens of a prompt."""
    return np.arange(BLOCKS * PER_BLOCK) + 100_000 * seed


@lru_cache(maxsize=16)
def content(seed: int) -> NDArray[np.uint16]:
    """Return the bytes of a prompt's blocks, by layer."""
    shape = MODEL.num_layers, 2, BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)


class SharingNode:
    """One engine with a device of its own."""

    def __init__(self, keys: dict[str, Any]) -> None:
        cache = CacheConfig(tokens_per_block=PER_BLOCK, num_cpu_blocks=HOST_BLOCKS, **keys)
        self.manager = KVManager(MODEL, cache)
        shape = 2, AREAS * BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size
        self._caches = [np.zeros(shape, np.uint16) for _ in range(MODEL.num_layers)]

    def register(self) -> None:
        """Register the device's memory."""
        self.manager.register_kv_caches([each.view(np.float16) for each in self._caches])

    def _slots(self, area: int) -> NDArray[np.int64]:
        return np.arange(BLOCKS * PER_BLOCK) + area * BLOCKS * PER_BLOCK

    async def put(self, seed: int, area: int = 0) -> dict[str, Any]:
        """Put a prompt."""
        own = slice(area * BLOCKS, (area + 1) * BLOCKS)
        for cache, values in zip(self._caches, content(seed), strict=True):
            cache[:, own] = values
        response = await self.manager.put(prompt(seed), self._slots(area))
        return {"status": response.status.value}

    async def get(self, seed: int, area: int = 0) -> dict[str, Any]:
        """Get a prompt; return how many blocks came, whether all are right, and the time."""
        own = slice(area * BLOCKS, (area + 1) * BLOCKS)
        for cache in self._caches:
            cache[:, own] = 0
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        response = await self.manager.get(prompt(seed), self._slots(area))
        took_s = loop.time() - begun_s
        count = int(np.count_nonzero(response.return_mask)) // PER_BLOCK
        there = slice(own.start, own.start + count)
        pairs = zip(self._caches, content(seed), strict=True)
        right = all(np.array_equal(cache[:, there], values[:, :count]) for cache, values in pairs)
        return {"blocks": count, "right": right, "took_s": took_s, "status": response.status.value}

    async def clear(self) -> dict[str, Any]:
        """Forget what host memory has; it is still known what others have."""
        return {"blocks": self.manager.clear(Tier.HOST)}

    async def known(self, seed: int) -> dict[str, Any]:
        """Return how many blocks of a prompt are here, and how many other nodes are said to have.

        What others have is counted behind what is here.
        """
        found = self.manager.match(prompt(seed))
        far = sum(found.far_tokens_by_tier.values())
        return {"own": found.tokens // PER_BLOCK, "far": far // PER_BLOCK}

    async def facts(self) -> dict[str, Any]:
        """Return what is in use now, and what was moved."""
        told = self.manager.statistics()
        host = told.tiers[Tier.HOST.label]
        routes = {name: route.blocks for name, route in told.routes.items()}
        return {
            "claims": told.claims, "runs": told.runs_in_flight, "waiting": told.requests_waiting,
            "pinned": host.pinned_blocks, "reserved": host.reserved_blocks,
            "draining": host.draining_blocks, "ready": host.ready_blocks,
            "read": routes.get("peer→host", 0),
            "missing": told.missing_tiers, "health": told.tiers[Tier.PEER.label].reads,
            "descriptors": len(os.listdir("/proc/self/fd")), "tasks": len(asyncio.all_tasks()),
            "memory_bytes": Process().memory_info().rss,
            "mooncake": None if (cluster := told.cluster) is None or cluster.mooncake is None
            else msgspec.to_builtins(cluster.mooncake),
        }  # fmt: skip

    async def digest(self) -> dict[str, Any]:
        """Return a digest of all of host memory."""
        backend = self.manager.engine._backend
        assert isinstance(backend, LocalBackend)
        return {"digest": hashlib.blake2b(backend.arena.buffer).hexdigest()}

    async def window(self) -> dict[str, Any]:
        """Return a digest of the window that Mooncake writes to, and in which life that is."""
        tiers = self.manager.engine._backend.tiers()
        parts = next(each for each in tiers if each.tier is Tier.PEER)
        mover = parts.port._transport._mooncake._mover  # type: ignore[attr-defined]
        memory = None if mover.ready is None else mover.ready._window._memory
        digest = "" if memory is None else hashlib.blake2b(memory).hexdigest()
        return {"digest": digest, "life": mover.lives}


async def serve(keys: dict[str, Any]) -> None:
    """Do what the test says until the input ends."""
    node = SharingNode(keys)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def do(number: int, what: str, words: dict[str, Any]) -> None:
        try:
            answer = await getattr(node, what)(**words)
        except FlexKVError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps({"number": number, **answer}) + "\n")
        sys.stdout.flush()

    async with node.manager, asyncio.TaskGroup() as tasks:
        node.register()
        sys.stdout.write(json.dumps({"number": 0}) + "\n")
        sys.stdout.flush()
        while line := await reader.readline():
            tasks.create_task(do(*json.loads(line)))


def main() -> None:
    """Run the engine of the configuration in the second argument, in the network of the first."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    enter(int(sys.argv[1]))
    os.dup2(os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    logging.basicConfig(level=logging.INFO)
    mooncake.PAUSE_S = mooncake.PAUSE_MAX_S = 0.1  # an engine that has failed is tried at once
    everything = Allowance(1 << 30, 1e9)  # a stranger is to be heard, not shut out
    strangers.LIMITS = strangers.StrangerLimits(everything, everything, everything)
    asyncio.run(serve(json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
