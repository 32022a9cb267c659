"""Upkeep, devices and reports of the library with a model of several KV groups."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.config import LayerGroup, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.trace.load import load

from .group_rig import PROMPT, GroupRig, fill
from .groups import DEVICE_BLOCKS, MODEL, GroupCaches, cache_config


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[GroupRig]:
    """Yield a manager over host memory and SSD, with the caches of several groups."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        yield GroupRig(manager)


def test_layers_cannot_be_followed(tmp_path: Path) -> None:
    """Requests that go layer by layer are refused by name."""
    manager = KVManager(MODEL, cache_config(tmp_path, enable_ssd=False, num_ssd_blocks=0))
    manager.start()
    try:
        rig = GroupRig(manager)
        slots = rig.caches.slots(40, *rig.caches.places(40, 0))
        for call in (manager.get_layerwise, manager.put_layerwise):
            with pytest.raises(ConfigError, match=r"layer_groups=.*4 KV groups.*layer by layer"):
                call(PROMPT, slots)
    finally:
        manager.shutdown()


async def test_upkeep_knows_every_group(rig: GroupRig) -> None:
    """Statistics count by group; clears, quotas, pins and resizing reach the leaves."""
    manager = rig.manager
    await rig.put(PROMPT, namespace="a")
    assert manager.statistics().tiers["host"].group_blocks == (10, 10, 10, 5)
    report = await manager.flush()
    assert not report.lacking_blocks
    assert manager.statistics().tiers["disk"].group_blocks == (10, 10, 10, 5)
    assert manager.namespace_blocks("a") == {Tier.HOST: 35, Tier.DISK: 35}
    assert manager.namespace_blocks(None) == {Tier.HOST: 0, Tier.DISK: 0}
    pin = manager.pin(PROMPT, namespace="a")
    await fill(rig)
    assert manager.match(PROMPT, "a").tokens_by_tier[Tier.HOST] == 40
    assert manager.unpin(pin)
    manager.set_quota("a", Tier.HOST, 7)
    assert manager.namespace_blocks("a")[Tier.HOST] <= 7
    assert manager.match(PROMPT, "a").tokens == 40
    assert manager.clear(namespace="a") > 0
    assert manager.match(PROMPT, "a").tokens == 0
    assert set(manager.namespace_blocks("a").values()) == {0}
    assert manager.resize(Tier.HOST, 10) == 10


async def test_a_suspended_device_serves_groups_again(rig: GroupRig) -> None:
    """After suspending and resuming the device, every group is loaded into the new tensors."""
    await rig.put(PROMPT)
    await rig.manager.suspend_device()
    rig.caches = GroupCaches(seed=3)
    rig.manager.resume_device(rig.caches.tensors)
    places = rig.everything(PROMPT)
    got = await rig.get(PROMPT, places)
    assert got.return_mask.all()
    rig.check(places, 40)


async def test_an_explanation_names_the_groups(rig: GroupRig) -> None:
    """The plan of a get shows what it loads of each group."""
    await rig.put(PROMPT)
    told = str(rig.manager.explain("get", PROMPT))
    for part in (
        "10 in host",
        "3 in host of group 1",
        "2 in host of group 2",
        "1 blocks of group 3",
    ):
        assert part in told


async def test_a_trace_tells_the_group_of_each_op(rig: GroupRig, tmp_path: Path) -> None:
    """Records of plans and ops have the KV group of the blocks, and the header their sizes."""
    path = tmp_path / "trace.jsonl"
    rig.manager.trace_start(str(path))
    await rig.put(PROMPT)
    await rig.get(PROMPT, rig.everything(PROMPT))
    rig.manager.trace_stop()
    trace = load(path)
    assert trace.header.group_block_bytes == tuple(rig.manager.engine.sizes.block_bytes)
    loads = [op for op in trace.ops if op.route == "host→device"]
    assert sorted((op.group, op.block_count) for op in loads) == [(0, 10), (1, 3), (2, 2), (3, 1)]
    assert all(
        op.bytes == op.block_count * trace.header.group_block_bytes[op.group] for op in loads
    )


async def test_groups_may_overlay_the_same_memory(tmp_path: Path) -> None:
    """Groups may share one allocation, where a block belongs to one of them at a time.

    The bytes between a block's content and the next block are left alone.
    """
    backing = np.full((2, DEVICE_BLOCKS, 640), 0xAB, np.uint8)
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager, caches=GroupCaches(backing=backing))
        backing[:, :32] = np.random.default_rng(1).integers(0, 256, (2, 32, 640))
        before = backing.copy()
        sources = [
            {n: 0 + n for n in range(10)}, {n: 10 + n for n in range(7, 10)},
            {n: 13 + n for n in range(8, 10)}, {4: 25},
        ]  # fmt: skip
        targets = [{n: block + 32 for n, block in places.items()} for places in sources]
        for group, places in enumerate(sources):
            for number, block in places.items():
                rig.stored[group, number] = rig.caches.bytes_of(group, [block])
        put = await manager.put(PROMPT, rig.caches.slots(40, *sources))
        assert put.return_mask.all()
        await rig.manager.flush()
        manager.clear(Tier.HOST)
        got = await rig.get(PROMPT, targets)
        assert got.return_mask.all()
        rig.check(targets, 40)
        assert np.array_equal(backing[:, :32], before[:, :32])
        for group, places in enumerate(targets):
            layers = rig.caches.spaces[group].shapes
            for block in places.values():
                for layer, shape in enumerate(layers):
                    assert (backing[layer, block, shape.block_bytes :] == 0xAB).all()
                assert (backing[len(layers) :, block] == 0xAB).all()


@pytest.mark.parametrize("slices", [1, 2], ids=["whole state", "sliced state"])
@pytest.mark.parametrize(("chain", "window"), [(4, 2), (1, 2), (2, 1)])
async def test_ranks_divide_each_group_in_their_own_way(
    tmp_path: Path, chain: int, window: int, slices: int
) -> None:
    """Two TP ranks share heads in one group and divide them in another; all bytes come back."""
    groups = (
        LayerGroup(num_layers=1, num_kv_heads=chain, head_size=8),
        LayerGroup(
            num_layers=1, num_kv_heads=window, head_size=8,
            kv_group=1, kind="sliding_window", window=9,
        ),
        LayerGroup(num_layers=1, num_kv_heads=slices, kv_group=2, kind="state", state_bytes=48),
    )  # fmt: skip
    model = ModelConfig(
        num_layers=3, num_kv_heads=chain, head_size=8, dtype="float16", tp_size=2,
        layer_groups=groups,
    )  # fmt: skip
    # Ranks with the same heads, or the whole state, have the same bytes.
    ranks = [GroupCaches(model, seed=rank) for rank in range(2)]
    for layer, space in enumerate(ranks[0].spaces):
        if space.parts == 1:
            ranks[1].tensors[layer][:] = ranks[0].tensors[layer]
    async with KVManager(model, cache_config(tmp_path)) as manager:
        for rank, caches in enumerate(ranks):
            manager.register_kv_caches(caches.tensors, None, rank)
        sources = ranks[0].places(40, 0, range(3))
        await manager.put(PROMPT, ranks[0].slots(40, *sources))
        await manager.flush()
        manager.clear(Tier.HOST)
        targets = ranks[0].places(40, 30, range(3))
        got = await manager.get(PROMPT, ranks[0].slots(40, *targets))
        assert got.return_mask.all()
        assert manager.statistics().corrupt_blocks == 0
        for caches in ranks:
            for group in range(3):
                for number in caches.needed(group, 40):
                    expected = caches.bytes_of(group, [sources[group][number]])
                    loaded = caches.bytes_of(group, [targets[group][number]])
                    assert np.array_equal(loaded, expected), (group, number)
