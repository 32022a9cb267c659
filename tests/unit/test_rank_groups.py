"""Several TP ranks and several KV groups: each rank fills and reads its part of every group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig
from flexkv.common.errors import ConfigError, InvariantError
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import TransferPort
from flexkv.tiers.backend import Device, LocalBackend
from tests.unit.backing import LAYOUTS, Backing, pages_of

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
BLOCKS, PLACES, TOKENS, RANKS = 9, 24, 4, 4
STATE: dict[str, Any] = {"num_layers": 1, "kind": "state", "state_bytes": 64}
FULL: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 2, "head_size": 8, "layer_indices": (1,)}
GROUPS = [
    FULL,
    {**FULL, "num_kv_heads": 4, "head_size": 4, "kind": "sliding_window", "window": 8,
     "kv_group": 1, "layer_indices": (0,)},
    {**STATE, "kv_group": 2, "layer_indices": (3,)},
    {**STATE, "num_kv_heads": RANKS, "kv_group": 3, "layer_indices": (2,)},
]  # fmt: skip
"""A chain, a window with more heads, a state that each rank has whole, and one in slices.

Every page has 128 bytes: all but those of the chain are padded."""


def _model(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 2, "head_size": 8}
    groups = [LayerGroup(**group) for group in GROUPS]
    return ModelConfig(**sizes, dtype="float16", layer_groups=groups, tp_size=RANKS, **changes)


class Rig:
    """The devices of all ranks, with equal bytes where they have the same part of a block."""

    def __init__(self, layout: str) -> None:
        """Cut the KV caches of each rank from an allocation of its own."""
        self.model = _model()
        self.cache = CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=PLACES)
        sizes = self.cache.sized(self.model)
        self.spaces = sizes.spaces
        self.arena = Arena.open(PLACES, sizes.block_stride_bytes)
        self.backend = LocalBackend(self.cache, sizes)
        self.backend.attach(self.arena)
        pages = pages_of(self.model, TOKENS, [0, 64, 64, 64])
        self.ranks = [Backing(pages, layout, BLOCKS, seed) for seed in range(RANKS)]
        self.devices: list[Device] = []
        self.port: TransferPort | None = None

    def join(self) -> TransferPort:
        """Return the port over all ranks."""
        for rank, backing in enumerate(self.ranks):
            self.devices.append(self.backend.device(backing.tensors(), None, rank))
        self.port = self.backend.joined(self.devices).port
        return self.port

    async def run(self, route: Route, ids: Any, places: Any) -> None:
        """Copy the blocks of each group: `ids` on the devices, `places` in host memory."""
        assert self.port is not None
        woken = asyncio.Event()
        self.port.connect(woken.set)
        for space in self.spaces:
            sides = (ids[space.group], places[space.group])
            sides = sides if route is TO_HOST else sides[::-1]
            self.port.submit(Transfer(space.group, 1, route, *sides, group=space.group))
        ended = self.port.reap()
        while len(ended) < len(self.spaces):
            await woken.wait()
            woken.clear()
            ended += self.port.reap()
        assert [each.error for each in ended] == [None] * len(self.spaces)

    def close(self) -> None:
        """Close the devices and the arena."""
        if self.port is not None and len(self.devices) > 1:
            self.port.close()
        for device in self.devices:
            device.port.close()
        self.arena.close()


@pytest.fixture(params=LAYOUTS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Yield the ranks of a model, in each layout, and close them afterwards."""
    made = Rig(request.param)
    yield made
    made.close()


async def test_every_rank_has_its_part_of_every_group(rig: Rig) -> None:
    """Parts come together in host memory, and each rank gets its own back."""
    assert [space.parts for space in rig.spaces] == [2, 4, 1, 4]
    for space in rig.spaces:  # ranks with the same part have the same bytes
        for layer in space.layers:
            for rank in range(1, RANKS):
                if space.part_of(rank) == space.part_of(rank - 1):
                    ids = slice(2 * space.group, 2 * space.group + 2)
                    same = rig.ranks[rank - 1].bytes_of[layer][ids]
                    rig.ranks[rank].bytes_of[layer][ids] = same
    rig.join()
    ids = [np.arange(2 * group, 2 * group + 2) for group in range(4)]
    places = [np.array([5 * group, 5 * group + 3]) for group in range(4)]
    await rig.run(TO_HOST, ids, places)
    firsts = [
        {space.part_of(rank).number: rank for rank in reversed(range(RANKS))}
        for space in rig.spaces
    ]
    for space in rig.spaces:
        for block, place in zip(ids[space.group], places[space.group], strict=True):
            parts = [
                rig.ranks[rank].block(space.layers, block)
                for _, rank in sorted(firsts[space.group].items())
            ]
            found = rig.arena.array[place, : space.block_bytes].tobytes()
            assert found == b"".join(parts)
    kept = [
        [[rank.block(space.layers, block) for block in ids[space.group]] for space in rig.spaces]
        for rank in rig.ranks
    ]
    for rank in rig.ranks:
        rank.memory[:] = 0
    others = [each[::-1].copy() for each in ids]
    await rig.run(TO_DEVICE, others, places)
    for rank, of_rank in zip(rig.ranks, kept, strict=True):
        for space, blocks in zip(rig.spaces, of_rank, strict=True):
            assert [rank.block(space.layers, each) for each in others[space.group]] == blocks


def test_a_group_that_no_rank_has_is_refused() -> None:
    """A transfer of an unknown group raises InvariantError, and starts on no rank."""
    rig = Rig("LBHNC")
    port, ids = rig.join(), np.arange(2)
    with pytest.raises(InvariantError, match="no ranks of group 4"):
        port.submit(Transfer(1, 1, TO_HOST, ids, ids, group=4))
    assert port.reap() == []
    rig.close()


@pytest.mark.parametrize(
    ("heads", "why"),
    [(3, "must divide the number of KV heads, 3"), (6, "must divide the number of KV heads, 6")],
)
def test_heads_of_any_group_that_ranks_cannot_divide_are_refused(heads: int, why: str) -> None:
    """Four ranks can divide neither three nor six heads, whichever group has them."""
    wide = {**GROUPS[1], "num_kv_heads": heads}
    with pytest.raises(ConfigError, match=why):
        ModelConfig(
            num_layers=2, num_kv_heads=2, head_size=8, dtype="float16", tp_size=RANKS,
            layer_groups=[FULL, wide],
        )  # fmt: skip


async def test_all_ranks_must_have_the_order_of_every_group(rig: Rig) -> None:
    """A device tells the order of all its groups; one that differs in any wakes up nowhere."""
    rig.join()
    device = rig.devices[0]
    assert device.order.count("|") == 3
    device.port.suspend()
    tensors = rig.ranks[0].tensors()
    number = rig.spaces[1].layers[0]
    tensors[number] = np.zeros((2, BLOCKS, TOKENS, 1, 4), np.float16)
    with pytest.raises(ConfigError, match="must have the same element order as before"):
        rig.backend.resumed(device, tensors, None, 0)
    assert rig.backend.resumed(device, rig.ranks[0].tensors(), None, 0).order == device.order
