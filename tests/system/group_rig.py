"""A manager of a model with several KV groups, and requests that check every group's bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexkv.common.request import KVResponse
from flexkv.kvmanager import KVManager

from .groups import GroupCaches, Ids

PROMPT = np.arange(1000, 1040)
"""Ten blocks of the chain, five of the state."""
GROUPS = range(4)


class GroupRig:
    """A manager with the KV caches of several groups, and a copy of what was put."""

    def __init__(
        self, manager: KVManager, form: str = "loop", caches: GroupCaches | None = None
    ) -> None:
        self.manager, self.caches, self.form = manager, caches or GroupCaches(), form
        manager.register_kv_caches(self.caches.tensors)
        self.stored: dict[tuple[int, int], Any] = {}

    async def put(
        self, prompt: Any, groups: Sequence[int] = GROUPS, start: int = 0, **more: Any
    ) -> KVResponse:
        """Put the blocks of some groups from consecutive device blocks, and keep a copy."""
        places = self.caches.places(len(prompt), start, groups)
        for group in groups:
            for number, block in places[group].items():
                self.stored[group, number] = self.caches.bytes_of(group, [block])
        slots = self.caches.slots(len(prompt), *places)
        return await self.request("put", prompt, slots, **more)

    async def get(self, prompt: Any, places: Sequence[Ids], **more: Any) -> KVResponse:
        """Load a prompt into device blocks."""
        slots = self.caches.slots(len(prompt), *places)
        return await self.request("get", prompt, slots, **more)

    async def request(self, operation: str, *args: Any, **named: Any) -> KVResponse:
        """Run a get, put or prefetch in the rig's form, and return its response."""
        if "task" not in self.form:
            response: KVResponse = await getattr(self.manager, operation)(*args, **named)
            return response
        task_id = getattr(self.manager, f"{operation}_async")(*args, **named)
        return (await asyncio.to_thread(self.manager.wait, [task_id]))[task_id]

    def everything(self, prompt: Any) -> Sequence[Ids]:
        """Return device blocks for every block of every group, other than those of `put`."""
        return self.caches.places(len(prompt), 30)

    def check(self, places: Sequence[Ids], end: int, first: int = 0) -> None:
        """Check that each group has in its places what a prefix of `end` tokens needs."""
        for group in GROUPS:
            for number in self.caches.needed(group, end, first):
                loaded = self.caches.bytes_of(group, [places[group][number]])
                for layer, expected in zip(loaded, self.stored[group, number], strict=True):
                    assert np.array_equal(layer, expected), (group, number)


async def fill(rig: GroupRig, count: int = 6) -> None:
    """Put other prompts until nothing of earlier ones is left in host memory."""
    caches = GroupCaches(seed=9)
    for number in range(count):
        prompt = np.arange(40) + 100_000 + 1000 * number
        places = caches.places(len(prompt), 0)
        await rig.request("put", prompt, caches.slots(len(prompt), *places))
        await rig.manager.flush()
