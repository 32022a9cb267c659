"""Another node of `benchmarks.sharing_beside`: it has prompts, and prints a line when it has them.

It ends when its input does. The second argument is its configuration.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from typing import Any, Self

import structlog

from benchmarks.rigs import LARGE, SMALL, cache_of, kv_caches, prompt, slots_of
from flexkv.kvmanager import KVManager


class Node:
    """The process of a node; a context manager."""

    def __init__(self, is_small: bool, first: int, prompts: int, blocks: int, **keys: Any) -> None:
        """Start it; it will have so many prompts from the first number on, of so many blocks."""
        said = {"small": is_small, "prompts": [first, prompts, blocks], "keys": keys}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sharing_node", json.dumps(said)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.prompts = range(first, first + prompts)

    def wait_ready(self) -> None:
        """Return once it has its prompts."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("a node has ended")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


async def serve(said: dict[str, Any]) -> None:
    """Share prompts until the input ends."""
    model = SMALL if said["small"] else LARGE
    first, prompts, blocks = said["prompts"]
    cache = cache_of((prompts + 1) * blocks, **said["keys"])
    async with KVManager(model, cache) as manager:
        manager.register_kv_caches(kv_caches(model, blocks))
        for number in range(first, first + prompts):
            await manager.put(prompt(number, blocks), slots_of(range(blocks)))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(serve(json.loads(sys.argv[1])))
