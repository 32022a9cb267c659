"""A simulated inference engine that runs a workload on a manager and checks every byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv.common.request import KVResponse
from flexkv.common.terms import BlockKey
from flexkv.index.keys import KeyChain, block_keys
from flexkv.kvmanager import KVManager
from flexkv.testing.known_bytes import KnownDevice
from flexkv.testing.workload import Prompt


@dataclass
class Outcome:
    """The counts and times of a replay."""

    requests: int = 0
    tokens: int = 0
    loaded_tokens: int = 0
    stored_tokens: int = 0
    mismatched_blocks: int = 0
    get_s: list[float] = field(default_factory=list)
    put_s: list[float] = field(default_factory=list)


class FreeBlocks:
    """The free blocks of a device; a caller that wants more of them than there are waits."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._freed = asyncio.Condition()

    async def take(self, count: int) -> list[int]:
        """Take blocks as soon as there are enough; at once if there are enough now."""
        if len(self._free) < count:
            async with self._freed:
                await self._freed.wait_for(lambda: len(self._free) >= count)
                return self._popped(count)
        return self._popped(count)

    def _popped(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    async def give(self, blocks: list[int]) -> None:
        """Return blocks that were taken."""
        async with self._freed:
            self._free.extend(blocks)
            self._freed.notify_all()


def slots_of(blocks: list[int], tokens_per_block: int) -> NDArray[np.int64]:
    """Return the slots of all tokens of some device blocks."""
    firsts = np.array(blocks, np.int64)[:, None] * tokens_per_block
    return (firsts + np.arange(tokens_per_block)).ravel()


class SimulatedEngine:
    """A stand-in for an inference engine that keeps nothing on its device between requests.

    Each request gets what the cache has, checks every byte of it, "computes" the rest by filling
    its device blocks with their known bytes, puts the prompt, and frees its device blocks.
    """

    def __init__(self, manager: KVManager, device: KnownDevice, keys: KeyChain) -> None:
        self.outcome = Outcome()
        self._manager, self._device, self._keys = manager, device, keys
        self._free = FreeBlocks(device.kv_caches[0].shape[1])

    async def run(
        self,
        prompts: Iterable[Prompt],
        concurrency: int,
        time_scale: float,
        advance: Callable[[], None],
    ) -> Outcome:
        """Run all prompts in order, at most `concurrency` at once, and return the outcome.

        Args:
            prompts: the workload.
            concurrency: the most requests under way at once.
            time_scale: 1 = as fast as the workload says, 0.1 = ten times as fast, 0 = at once.
            advance: called at the end of each request.
        """
        room = asyncio.Semaphore(concurrency)
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                await asyncio.sleep(max(0.0, begin + prompt.at_s * time_scale - time.monotonic()))
                await room.acquire()
                group.create_task(self._in_turn(prompt, room, advance))
        return self.outcome

    async def _in_turn(
        self, prompt: Prompt, room: asyncio.Semaphore, advance: Callable[[], None]
    ) -> None:
        try:
            await self._request(prompt)
        finally:
            room.release()
            advance()

    async def _request(self, prompt: Prompt) -> None:
        keys = block_keys(self._keys.keys(prompt.tokens))
        tokens = prompt.tokens[: len(keys) * self._keys.tokens_per_block]
        blocks = await self._free.take(len(keys))
        try:
            await self._serve(tokens, blocks, keys)
        finally:
            self._device.clear(blocks)
            await self._free.give(blocks)

    async def _serve(
        self, tokens: NDArray[np.int64], blocks: list[int], keys: list[BlockKey]
    ) -> None:
        outcome = self.outcome
        slots = slots_of(blocks, self._keys.tokens_per_block)
        begin = time.perf_counter()
        got: KVResponse = await self._manager.get(tokens, slots)
        outcome.get_s.append(time.perf_counter() - begin)
        loaded = int(got.return_mask.sum()) // self._keys.tokens_per_block
        outcome.mismatched_blocks += self._device.mismatches(blocks[:loaded], keys[:loaded])
        self._device.fill(blocks[loaded:], keys[loaded:])
        begin = time.perf_counter()
        put = await self._manager.put(tokens, slots)
        outcome.put_s.append(time.perf_counter() - begin)
        outcome.requests += 1
        outcome.tokens += len(tokens)
        outcome.loaded_tokens += loaded * self._keys.tokens_per_block
        outcome.stored_tokens += int(put.return_mask.sum())
