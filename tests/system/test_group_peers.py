"""Models with several KV groups over peers: prefixes come whole, or shorter, never wrong.

Nodes share over a real Redis: one has computed prompts, and another one asks for them.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.request import Operation
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.tiers.parts import ClusterStatistics

from .group_rig import GROUPS, PROMPT, GroupRig
from .groups import MODEL, GroupCaches, cache_config
from .test_group_remote import BLOCKS, CHUNK, END, PREFIXES, STATE, WINDOW, moved_end, needed

PATIENCE_S = 30.0
SEEDS = int(os.environ.get("GROUP_PEER_SEEDS", "2"))
NEEDED = sum(map(len, needed(END).values()))
"""How many blocks of all groups the whole prompt needs."""


@pytest.fixture
def zone(shared: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of nodes that share with each other, and with no other test's nodes."""
    return {**shared, "num_ssd_blocks": 0}


@asynccontextmanager
async def node(folder: Path, zone: dict[str, Any], **changes: Any) -> AsyncIterator[GroupRig]:
    """Yield an engine that shares blocks with others."""
    async with KVManager(MODEL, cache_config(folder, **{**zone, **changes})) as manager:
        yield GroupRig(manager)
        manager.engine.residency.validate()


@asynccontextmanager
async def pair(
    folder: Path, zone: dict[str, Any], **changes: Any
) -> AsyncIterator[tuple[GroupRig, GroupRig]]:
    """Yield a node that has a prompt, and one that knows it."""
    async with node(folder, zone, **changes) as first, node(folder, zone) as second:
        await first.put(PROMPT)
        second.stored = first.stored
        await until(lambda: far_tokens(second) == END)
        yield first, second


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 -- the state of another node
            await asyncio.sleep(0.01)


def far_tokens(rig: GroupRig, prompt: Any = PROMPT) -> int:
    """Return how many tokens of a prompt a node could fetch from others."""
    return sum(rig.manager.match(prompt).far_tokens_by_tier.values())


def cluster(rig: GroupRig) -> ClusterStatistics:
    """Return what a node knows of its cluster."""
    told = rig.manager.statistics().cluster
    assert told is not None
    return told


def forget(rig: GroupRig, group: int, positions: list[int]) -> None:
    """Drop blocks of the prompt from a node's host memory, at positions in the chain."""
    keys = rig.manager.engine.requests.intake(Operation.PREFETCH, PROMPT).keys
    residency = rig.manager.engine.residency
    for _, found, ids in residency.survey(keys, 0, BLOCKS, False, group):
        places = ids[0]
        if places is not None:
            residency.forget(Tier.HOST, places[np.isin(found.array, positions)])


async def test_what_one_node_has_another_gets(tmp_path: Path, zone: dict[str, Any]) -> None:
    """A get brings all blocks of all groups that it needs, and no others."""
    async with pair(tmp_path, zone) as (_, second):
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert second.manager.statistics().routes["peer→host"].blocks == NEEDED
        (read,) = cluster(second).read.values()
        assert (read.blocks, read.missing, read.failed, read.wrong) == (NEEDED, 0, 0, 0)
        assert moved_end(await second.get(PROMPT, places)) == END
        assert second.manager.statistics().routes["peer→host"].blocks == NEEDED


async def test_a_prefetch_brings_all_that_a_get_needs(tmp_path: Path, zone: dict[str, Any]) -> None:
    """Before it a match finds all with peers; after it, all is here."""
    async with pair(tmp_path, zone) as (_, second):
        before = second.manager.match(PROMPT)
        assert (before.tokens, before.far_tokens_by_tier) == (0, {Tier.PEER: END})
        await second.manager.prefetch(PROMPT)
        assert second.manager.match(PROMPT).tokens == END
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert second.manager.statistics().routes["peer→host"].blocks == NEEDED


async def test_leaves_alone_are_fetched_to_a_chain_that_is_here(
    tmp_path: Path, zone: dict[str, Any]
) -> None:
    """Where a node has the chain without its leaves, only these come from another one."""
    async with pair(tmp_path, zone) as (_, second):
        await second.put(PROMPT, (0,))
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        fetched = second.manager.statistics().routes["peer→host"]
        assert fetched.blocks == NEEDED - BLOCKS


async def test_leaves_come_from_several_nodes(tmp_path: Path, zone: dict[str, Any]) -> None:
    """The groups of a prefix may lie with different nodes: each is asked for what it has."""
    async with (
        node(tmp_path, zone) as first,
        node(tmp_path, zone) as second,
        node(tmp_path, zone) as third,
    ):
        await first.put(PROMPT)
        for group in (WINDOW, STATE):
            forget(first, group, [*range(BLOCKS)])
        await second.put(PROMPT)
        forget(second, CHUNK, [*range(BLOCKS)])
        third.stored = {**first.stored, **second.stored}
        places = third.everything(PROMPT)
        await until(lambda: far_tokens(third) == END)
        assert moved_end(await third.get(PROMPT, places)) == END
        third.check(places, END)
        assert len(cluster(third).read) == 2


def longest_without(group: int, at: int) -> int:
    """Return where the longest prefix ends that does not need a block of a group."""
    return max([end for end in PREFIXES if at not in needed(end)[group]], default=0)


@pytest.mark.parametrize("group", GROUPS)
async def test_a_block_that_no_node_has_cuts_the_prefix(
    tmp_path: Path, zone: dict[str, Any], group: int
) -> None:
    """Where a node lacks a block of a group, others load the longest prefix without it."""
    at = needed(END)[group][-1]
    expected = longest_without(group, at)
    async with pair(tmp_path, zone) as (first, second):
        forget(first, group, [at])
        await until(lambda: far_tokens(second) == expected)
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == expected
        second.check(places, expected)
        assert 0 < expected < END
        (read,) = cluster(second).read.values()
        assert (read.missing, read.wrong) == (0, 0)


@pytest.mark.parametrize("group", GROUPS)
async def test_a_block_that_is_there_no_more_cuts_the_prefix(
    tmp_path: Path, zone: dict[str, Any], group: int
) -> None:
    """If a node no longer has a block that it is said to have, a shorter prefix is loaded."""
    at = needed(END)[group][-1]
    expected = longest_without(group, at)
    async with pair(tmp_path, zone, p2p_publish_ms=60_000.0) as (first, second):
        forget(first, group, [at])
        assert far_tokens(second) == END
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == expected
        second.check(places, expected)
        (read,) = cluster(second).read.values()
        missing = 1 if group else len(GROUPS)  # its leaves went with it
        assert (read.missing, read.wrong, read.failed) == (missing, 0, 0)
        await until(lambda: first.manager.statistics().claims == 0)


async def test_leaves_on_the_ssd_of_a_node_are_shared(tmp_path: Path, zone: dict[str, Any]) -> None:
    """With enable_p2p_ssd the owner brings chain and leaves to host memory for its reader."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "enable_p2p_ssd": True}
    async with pair(tmp_path, zone, **ssd) as (first, second):
        await first.manager.flush()
        first.manager.clear(Tier.HOST)
        places = second.everything(PROMPT)
        await until(lambda: far_tokens(second) == END)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert first.manager.statistics().routes["disk→host"].blocks >= NEEDED


async def test_a_part_of_the_leaves_may_be_on_the_ssd(tmp_path: Path, zone: dict[str, Any]) -> None:
    """Leaves of one run may be in host memory and on the SSD in turn; all come, in order."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "enable_p2p_ssd": True}
    async with pair(tmp_path, zone, **ssd) as (first, second):
        await first.manager.flush()
        for group, positions in needed(END).items():
            forget(first, group, positions[1::2] if group else [])
        places = second.everything(PROMPT)
        await until(lambda: far_tokens(second) == END)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)


def content(prompt: NDArray[np.int64], group: int, own: int, size: int) -> NDArray[np.uint8]:
    """Return the bytes of a group's block, which depend on all tokens up to its end."""
    end = (own + 1) * GroupCaches().spaces[group].tokens_per_block
    seed = [group, *prompt[:end].tolist()]
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Walker:
    """Serves random requests at a node, for prompts that other nodes serve, too."""

    def __init__(self, rig: GroupRig, seed: int) -> None:
        self._rig, self._chance = rig, random.Random(seed)
        self.wrong: list[tuple[int, ...]] = []

    async def walk(self, requests: int) -> None:
        """Serve some requests, one after the other, while blocks are evicted now and then."""
        residency = self._rig.manager.engine.residency
        for _ in range(requests):
            await self._serve(self._prompt())
            if self._chance.random() < 0.3:
                residency.evict(Tier.HOST, self._chance.randrange(1, 40))

    def _prompt(self) -> NDArray[np.int64]:
        """Return one of few prompts, which share their first blocks with others."""
        base, branch = self._chance.randrange(3), self._chance.randrange(2)
        prompt = 1000 * base + np.arange(self._chance.choice([16, 24, 40]))
        prompt[16:] += 500 * branch
        return prompt

    async def _serve(self, prompt: NDArray[np.int64]) -> None:
        rig, places = self._rig, self._rig.everything(prompt)
        slots = rig.caches.slots(len(prompt), *places)
        blocks = [(group, own) for group in GROUPS for own in places[group]]
        kind = self._chance.choice(["get", "get", "get", "put", "prefetch"])
        if kind == "prefetch":
            await rig.manager.prefetch(prompt)
            return
        for group, own in blocks:
            self._fill(group, places[group][own], prompt if kind == "put" else prompt + 50_000, own)
        if kind == "put":
            await rig.manager.put(prompt, slots)
            return
        end = moved_end(await rig.manager.get(prompt, slots))
        for group in GROUPS:
            for own in rig.caches.needed(group, end):
                if not self._has(group, places[group][own], prompt, own):
                    self.wrong.append((group, own, *prompt.tolist()))

    def _fill(self, group: int, block: int, prompt: NDArray[np.int64], own: int) -> None:
        """Write a block's bytes into a block of the device."""
        layers = self._rig.caches.bytes_of(group, [block])
        whole = content(prompt, group, own, sum(layer.size for layer in layers))
        for number, layer in zip(self._rig.caches.spaces[group].layers, layers, strict=True):
            tensor = self._rig.caches.tensors[number]
            part, whole = whole[: layer.size], whole[layer.size :]
            target = tensor[block : block + 1] if len(tensor) > 2 else tensor[:, block : block + 1]
            target[...] = part.view(tensor.dtype).reshape(target.shape)

    def _has(self, group: int, block: int, prompt: NDArray[np.int64], own: int) -> bool:
        loaded = np.concatenate(
            [layer.ravel() for layer in self._rig.caches.bytes_of(group, [block])]
        )
        return np.array_equal(loaded, content(prompt, group, own, loaded.size))


@pytest.mark.parametrize("admit", ["second_use", "always"])
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_walk_never_brings_wrong_bytes(
    tmp_path: Path, zone: dict[str, Any], seed: int, admit: str
) -> None:
    """Whatever owners and readers evict meanwhile, what arrives is right in every group.

    GROUP_PEER_SEEDS chooses how many seeds are run.
    """
    ssd = {"enable_ssd": True, "num_ssd_blocks": 96, "enable_p2p_ssd": True}
    async with AsyncExitStack() as nodes:
        rigs = []
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir()
            own = {**(ssd if number else {}), "p2p_admit": admit, "p2p_publish_ms": 5.0}
            rigs.append(await nodes.enter_async_context(node(folder, zone, **own)))
        walkers = [Walker(rig, 10 * seed + number) for number, rig in enumerate(rigs)]
        async with asyncio.TaskGroup() as walks:
            for walker in walkers:
                walks.create_task(walker.walk(60))
        assert [walker.wrong for walker in walkers] == [[], [], []]
        assert any("peer→host" in rig.manager.statistics().routes for rig in rigs)
        for rig in rigs:
            assert all(read.wrong == 0 for read in cluster(rig).read.values())
            await until(lambda: rig.manager.statistics().claims == 0)  # noqa: B023 -- at once
