"""Tests of the public contract over real memory, files and io_uring, in all three forms."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager

from .conftest import MODEL, PER_BLOCK, MakeManager, Rig, bytes_of, kv_caches, slots_of

PROMPT = np.arange(1000, 1000 + 10 * PER_BLOCK)


async def test_what_was_put_comes_back_in_other_slots(rig: Rig) -> None:
    """What was put comes back in other slots with equal bytes, for every layer, K and V."""
    expected = bytes_of(rig.caches, range(10))
    put = await rig.request("put", PROMPT, slots_of(range(10)))
    assert put.status is KVResponseStatus.SUCCESS
    assert put.return_mask.all()
    blocks = list(range(40, 20, -2))
    got = await rig.request("get", PROMPT, slots_of(blocks))
    assert got.status is KVResponseStatus.SUCCESS
    assert got.return_mask.all()
    assert np.array_equal(bytes_of(rig.caches, blocks), expected)


async def test_blocks_evicted_from_host_come_back_from_ssd(rig: Rig) -> None:
    """Blocks evicted from host memory are read from SSD, and are in host memory again."""
    expected = bytes_of(rig.caches, range(10))
    await rig.request("put", PROMPT, slots_of(range(10)))
    await rig.manager.flush()
    await rig.request("put", PROMPT + 50_000, slots_of(range(10)))
    for start in (100_000, 200_000, 300_000):
        await rig.request("put", PROMPT + start, slots_of(range(20, 30)))
    by_tier = rig.manager.match(PROMPT).tokens_by_tier
    assert by_tier[Tier.DISK] > 0
    got = await rig.request("get", PROMPT, slots_of(range(50, 60)))
    assert got.return_mask.all()
    assert np.array_equal(bytes_of(rig.caches, range(50, 60)), expected)
    assert rig.manager.match(PROMPT).tokens_by_tier[Tier.HOST] == len(PROMPT)


async def test_a_longer_prompt_gets_the_prefix_it_shares(rig: Rig) -> None:
    """A longer prompt gets the prefix that it shares, with SUCCESS and the shorter mask."""
    await rig.request("put", PROMPT, slots_of(range(10)))
    longer = np.r_[PROMPT[: 6 * PER_BLOCK], PROMPT[: 4 * PER_BLOCK]]
    got = await rig.request("get", longer, slots_of(range(20, 30)))
    assert got.status is KVResponseStatus.SUCCESS
    assert got.return_mask.tolist() == [True] * 24 + [False] * 16


async def test_a_miss_moves_nothing(rig: Rig) -> None:
    """A miss returns NOTFOUND and an empty mask, and leaves the slots as they were."""
    before = bytes_of(rig.caches, range(10))
    got = await rig.request("get", PROMPT, slots_of(range(10)))
    assert got.status is KVResponseStatus.NOTFOUND
    assert not got.return_mask.any()
    assert np.array_equal(bytes_of(rig.caches, range(10)), before)


async def test_a_masked_get_moves_only_what_is_selected(rig: Rig) -> None:
    """A masked get moves only the selected tokens, and takes slots for only these."""
    expected = bytes_of(rig.caches, range(4, 10))
    await rig.request("put", PROMPT, slots_of(range(10)))
    mask = np.arange(len(PROMPT)) >= 4 * PER_BLOCK
    got = await rig.request("get", PROMPT, slots_of(range(20, 26)), token_mask=mask)
    assert np.array_equal(got.return_mask, mask)
    assert np.array_equal(bytes_of(rig.caches, range(20, 26)), expected)


@pytest.mark.parametrize("operation", ["get", "put"])
async def test_a_mask_without_a_whole_block_moves_nothing(rig: Rig, operation: str) -> None:
    """A mask may begin behind the last whole block; no request fails for that, in any form."""
    mask = np.arange(7) >= 5
    response = await rig.request(operation, PROMPT[:7], np.array([5, 6]), token_mask=mask)
    assert response.status.value == {"get": "notfound", "put": "success"}[operation]
    assert (response.return_mask.any(), response.error) == (False, None)


async def test_a_second_put_moves_nothing(rig: Rig) -> None:
    """A second put of the same prompt copies nothing."""
    await rig.request("put", PROMPT, slots_of(range(10)))
    again = await rig.request("put", PROMPT, slots_of(range(10)))
    assert again.status is KVResponseStatus.SUCCESS
    assert not again.return_mask.any()


async def test_a_put_larger_than_the_host_stores_its_leading_blocks(rig: Rig) -> None:
    """A put larger than the host stores as many leading blocks as fit, and says why not more."""
    prompt = np.arange(40 * PER_BLOCK)
    put = await rig.request("put", prompt, slots_of(range(40)))
    assert put.status is KVResponseStatus.SUCCESS
    assert int(put.return_mask.sum()) == 32 * PER_BLOCK
    assert put.return_mask[: 32 * PER_BLOCK].all()
    assert "host" in str(put.error)


async def test_namespaces_do_not_see_each_other(rig: Rig) -> None:
    """The same tokens under another namespace are another prompt."""
    await rig.request("put", PROMPT, slots_of(range(10)), namespace="a")
    other = await rig.request("get", PROMPT, slots_of(range(10)), namespace=["a", "b"])
    assert other.status is KVResponseStatus.NOTFOUND
    assert rig.manager.match(PROMPT, namespace="a").tokens == len(PROMPT)
    assert rig.manager.match(PROMPT).tokens == 0


async def test_prefetch_brings_ssd_blocks_to_host(rig: Rig) -> None:
    """After a prefetch every block of the prompt is in host memory."""
    await rig.request("put", PROMPT, slots_of(range(10)))
    await rig.manager.flush()
    for start in (100_000, 200_000, 300_000, 400_000):
        await rig.request("put", PROMPT + start, slots_of(range(10)))
        await rig.manager.flush()
    assert rig.manager.match(PROMPT).tokens_by_tier[Tier.HOST] < len(PROMPT)
    await rig.request("prefetch", PROMPT)
    assert rig.manager.match(PROMPT).tokens_by_tier[Tier.HOST] == len(PROMPT)


async def test_ssd_is_back_filled_when_only_the_host_has_a_block(make_manager: MakeManager) -> None:
    """What a full write-behind left out is written by the next put of the same prompt."""
    async with make_manager(write_behind_max_gb=5 * 4096 / 2**30) as manager:
        manager.register_kv_caches(kv_caches())
        for _ in range(3):
            await manager.put(PROMPT, slots_of(range(10)))
            await manager.flush()
        assert manager.statistics().tiers["disk"].ready_blocks == 10


async def test_reset_forgets_every_tier(rig: Rig) -> None:
    """After a reset nothing is found, and every place is free."""
    await rig.request("put", PROMPT, slots_of(range(10)))
    await rig.manager.flush()
    assert rig.manager.reset() == 20
    assert rig.manager.match(PROMPT).tokens == 0
    tiers = rig.manager.statistics().tiers
    assert [tier.used_blocks for tier in tiers.values()] == [0, 0]


async def test_concurrent_requests_for_one_cold_prompt_share_the_load(rig: Rig) -> None:
    """Concurrent gets of one cold prompt all get the right bytes, by one read of each block."""
    expected = bytes_of(rig.caches, range(10))
    await rig.request("put", PROMPT, slots_of(range(10)))
    await rig.manager.flush()
    for start in (100_000, 200_000, 300_000, 400_000):
        await rig.request("put", PROMPT + start, slots_of(range(10, 20)))
        await rig.manager.flush()
    places = [range(20, 30), range(30, 40), range(40, 50)]
    responses = await asyncio.gather(
        *(rig.request("get", PROMPT, slots_of(place)) for place in places)
    )
    for response, place in zip(responses, places, strict=True):
        assert response.return_mask.all()
        assert np.array_equal(bytes_of(rig.caches, place), expected)
    assert rig.manager.statistics().routes["disk→host"].blocks <= 10


async def test_cancelling_leaves_nothing(make_manager: MakeManager) -> None:
    """A get cancelled at any of many moments leaves no claim, and the manager goes on."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(10)))
        for turns in range(12):
            getting = asyncio.ensure_future(manager.get(PROMPT, slots_of(range(20, 30))))
            for _ in range(turns):
                await asyncio.sleep(0)
            getting.cancel()
            await asyncio.wait([getting])
        await manager.flush()
        assert manager.statistics().claims == 0
        assert (await manager.get(PROMPT, slots_of(range(20, 30)))).return_mask.all()


async def test_closing_in_the_middle_ends_every_request(make_manager: MakeManager) -> None:
    """A shutdown in the middle ends every running and waiting request."""
    manager = make_manager(requests_max=2)
    async with manager:
        manager.register_kv_caches(kv_caches())
        puts = [
            asyncio.ensure_future(manager.put(PROMPT + n * 10_000, slots_of(range(10))))
            for n in range(8)
        ]
        await asyncio.sleep(0)
    ends = await asyncio.gather(*puts, return_exceptions=True)
    assert all(
        isinstance(end, ClosedError) or end.status in KVResponseStatus  # type: ignore[union-attr]
        for end in ends
    )


def test_prepared_tasks_are_launched_once_and_collected_once(make_manager: MakeManager) -> None:
    """A match tells which slots are needed; a task is launched once and collected once."""
    manager = make_manager()
    manager.start()
    try:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        put_id, wanted = manager.put_match(PROMPT)
        assert wanted.all()
        manager.launch([put_id], [slots_of(range(10))])
        assert manager.wait(put_id, completely=True)[put_id].return_mask.all()
        again_id, wanted = manager.put_match(np.r_[PROMPT, PROMPT[:PER_BLOCK]])
        assert np.flatnonzero(wanted).tolist() == list(range(40, 44))
        manager.cancel(again_id)
        assert manager.wait(again_id)[again_id].status is KVResponseStatus.CANCELLED
        get_id, found = manager.get_match(PROMPT)
        assert found.all()
        assert manager.try_wait(get_id) == {}
        manager.launch(get_id, slots_of(range(20, 30)))
        manager.launch(get_id, slots_of(range(20, 30)))
        assert manager.wait(get_id)[get_id].return_mask.all()
        assert np.array_equal(bytes_of(caches, range(20, 30)), bytes_of(caches, range(10)))
        with pytest.raises(ConfigError, match="never issued"):
            manager.wait(get_id)
        assert manager.statistics().claims == 0
    finally:
        manager.shutdown()


def test_a_prepared_get_keeps_what_it_found(make_manager: MakeManager) -> None:
    """What a prepared get found is not evicted between match and launch."""
    manager = make_manager(num_ssd_blocks=0)
    manager.start()
    try:
        manager.register_kv_caches(kv_caches())
        manager.wait(manager.put_async(PROMPT, slots_of(range(10))))
        get_id, found = manager.get_match(PROMPT)
        for start in range(100_000, 600_000, 100_000):
            manager.wait(manager.put_async(PROMPT + start, slots_of(range(10))))
        manager.launch(get_id, slots_of(range(20, 30)))
        assert np.array_equal(manager.wait(get_id)[get_id].return_mask, found)
    finally:
        manager.shutdown()


def test_a_task_that_is_not_over_in_time_is_ended(make_manager: MakeManager) -> None:
    """A wait that times out ends the task and releases what it held."""
    manager = make_manager()
    manager.start()
    try:
        manager.register_kv_caches(kv_caches())
        manager.wait(manager.put_async(PROMPT, slots_of(range(10))))
        get_id, _ = manager.get_match(PROMPT)
        response = manager.wait(get_id, timeout=0.01)[get_id]
        assert response.status is KVResponseStatus.TIMEOUT
        manager.wait(manager.put_async(PROMPT, slots_of(range(10))), completely=True)
        assert manager.statistics().claims == 0
    finally:
        manager.shutdown()


async def test_torch_tensors_and_other_integers_serve(make_manager: MakeManager) -> None:
    """torch KV caches in bfloat16, torch token ids and int32 slots are accepted."""
    model = MODEL.model_copy(update={"dtype": "bfloat16"})
    manager = make_manager()
    manager = KVManager(model, manager.engine.cache)
    layers = [torch.randn(2, 64, PER_BLOCK, 2, 8).to(torch.bfloat16) for _ in range(3)]
    async with manager:
        manager.register_kv_caches({f"layer.{n}": layer for n, layer in enumerate(layers)})
        tokens = torch.from_numpy(PROMPT).to(torch.int32)
        await manager.put(tokens, torch.from_numpy(slots_of(range(10)).astype(np.int32)))
        got = await manager.get(tokens, slots_of(range(30, 40)), torch.ones(40, dtype=torch.bool))
        assert got.return_mask.all()
    for layer in layers:
        assert torch.equal(layer[:, :10], layer[:, 30:40])


async def test_use_outside_its_life_is_a_closed_error(make_manager: MakeManager) -> None:
    """A call before the start, after the shutdown or from a foreign loop raises ClosedError."""
    manager = make_manager()
    with pytest.raises(ClosedError, match="not started"):
        await manager.get(PROMPT, slots_of(range(10)))
    async with manager:
        response = await manager.get(PROMPT, slots_of(range(10)))
        assert response.status is KVResponseStatus.UNREADY
        assert manager.statistics().requests["get"] == {"unready": 1}
        assert not manager.is_ready()
        with pytest.raises(ClosedError, match="await"):
            manager.wait([1])
        caught: list[BaseException] = []

        def elsewhere() -> None:
            try:
                manager.match(PROMPT)
            except ClosedError as error:
                caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "another event loop" in str(caught[0])
    with pytest.raises(ClosedError):
        manager.match(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"token_ids": PROMPT - 2000}, r"token_ids\[0\]=-1000"),
        ({"token_ids": PROMPT.astype(np.float32)}, "token_ids"),
        ({"slot_mapping": np.arange(39)}, "slot_mapping"),
        ({"slot_mapping": slots_of(range(60, 70))}, r"slot_mapping\[16\]=256"),
        ({"slot_mapping": np.arange(40)[::-1]}, "slot_mapping"),
        ({"token_mask": np.arange(40) % 2 == 0}, "token_mask"),
        ({"token_mask": np.ones(39, np.bool_)}, "token_mask"),
        ({"namespace": 5}, "namespace"),
    ],
)
async def test_bad_arguments_are_named_and_change_nothing(
    rig: Rig, arguments: dict[str, Any], field: str
) -> None:
    """A bad argument raises a ConfigError with its name, in every form, and changes nothing."""
    good = {"token_ids": PROMPT, "slot_mapping": slots_of(range(10))}
    with pytest.raises(ConfigError, match=field):
        await rig.request("put", **{**good, **arguments})
    statistics = rig.manager.statistics()
    assert statistics.claims == 0
    assert all(tier.used_blocks == 0 for tier in statistics.tiers.values())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"enable_cpu": False}, "enable_cpu"),
    ],
)
def test_parts_that_are_not_built_refuse_to_start(
    make_manager: MakeManager, changes: dict[str, Any], field: str
) -> None:
    """A feature that is not built is refused by its key."""
    with pytest.raises(ConfigError, match=field):
        make_manager(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_cpu_blocks": 1 << 30}, "num_cpu_blocks"),
        ({"num_ssd_blocks": 1 << 30}, "num_ssd_blocks"),
        ({"ssd_cache_dir": "/proc/flexkv", "strict": True}, "ssd_cache_dir"),
        ({"ssd_cache_dir": "/proc/version", "strict": True}, "ssd_cache_dir"),
    ],
)
async def test_what_the_machine_cannot_give_is_named_at_start(
    make_manager: MakeManager, changes: dict[str, Any], field: str
) -> None:
    """Sizes beyond the machine and unusable directories are refused at the start by their keys."""
    manager = make_manager(**changes)
    with pytest.raises(ConfigError, match=field):
        async with manager:
            pass


async def test_a_directory_in_use_names_its_holder(make_manager: MakeManager) -> None:
    """A strict manager is refused a directory that another one uses, and gets its process id."""
    async with make_manager():
        with pytest.raises(ConfigError, match=r"ssd_cache_dir.*in use by process"):
            async with make_manager(strict=True):
                pass
    async with make_manager():
        pass


@pytest.mark.parametrize("entries", [0, 512])
async def test_both_disk_adapters_serve(make_manager: MakeManager, entries: int) -> None:
    """With and without io_uring the bytes are the same, and statistics name the adapter."""
    async with make_manager(iouring_entries=entries) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        for start in range(0, 500_000, 100_000):
            await manager.put(PROMPT + start, slots_of(range(10)))
            await manager.flush()
        got = await manager.get(PROMPT, slots_of(range(20, 30)))
        assert got.return_mask.all()
        assert np.array_equal(bytes_of(caches, range(20, 30)), bytes_of(caches, range(10)))
        adapter = manager.statistics().tiers["disk"].backing
        assert adapter == ("io_uring" if entries else "threads")
