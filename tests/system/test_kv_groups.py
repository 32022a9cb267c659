"""The library with a model of several KV groups: full attention, a window, chunks and a state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import CapacityError, ConfigError, CorruptBlockError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager

from .conftest import CLIENT_FORMS, FORMS
from .forked import forked_server
from .group_rig import GROUPS, PROMPT, GroupRig, fill
from .groups import MODEL, cache_config
from .test_corrupt import damage


@pytest.fixture(params=["loop", "client's loop"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GroupRig]:
    """Yield a manager over host memory and SSD, with the caches of several groups."""
    async with _rig(tmp_path, request.param) as rig:
        yield rig


@pytest.fixture(params=[*FORMS, *CLIENT_FORMS])
async def any_rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GroupRig]:
    """Yield such a rig in each form of a manager."""
    async with _rig(tmp_path, request.param) as rig:
        yield rig


@asynccontextmanager
async def _rig(folder: Path, form: str) -> AsyncIterator[GroupRig]:
    cache = cache_config(folder)
    settings = server = None
    if form in CLIENT_FORMS:
        address = f"ipc://{folder}/socket"
        settings = Settings(
            server_recv_port=address, server_client_mode=True, server_answer_ms=60_000,
            cache_config=cache,
        )  # fmt: skip
        server = forked_server(settings, MODEL)
    manager = KVManager(MODEL, cache, settings=settings)
    if "loop" in form:
        async with manager:
            yield GroupRig(manager, form)
    else:
        manager.start()
        try:
            yield GroupRig(manager, form)
        finally:
            manager.shutdown()
    if server is not None:
        server.close()
        assert server.exit_status == 0


async def test_every_group_comes_back_in_other_blocks(any_rig: GroupRig) -> None:
    """A get loads what each group needs at the end of the prompt, byte for byte, and no more."""
    rig = any_rig
    put = await rig.put(PROMPT)
    assert (put.status, put.return_mask.all(), put.error) == (KVResponseStatus.SUCCESS, True, None)
    assert rig.manager.match(PROMPT).tokens == 40
    places = rig.everything(PROMPT)
    before = {(g, n): rig.caches.bytes_of(g, [b]) for g in GROUPS for n, b in places[g].items()}
    got = await rig.get(PROMPT, places)
    assert (got.status, got.return_mask.all(), got.error) == (KVResponseStatus.SUCCESS, True, None)
    rig.check(places, 40)
    for group in GROUPS:
        for number in places[group].keys() - set(rig.caches.needed(group, 40)):
            now = rig.caches.bytes_of(group, [places[group][number]])
            for layer, expected in zip(now, before[group, number], strict=True):
                assert np.array_equal(layer, expected), "a block that nobody needs was written"


@pytest.mark.parametrize("tokens", [8, 16, 24, 32, 35, 39, 40])
async def test_a_prompt_gets_the_longest_prefix_that_all_groups_have(
    rig: GroupRig, tokens: int
) -> None:
    """A shorter prompt hits up to its last boundary, as every group has all blocks before it."""
    await rig.put(PROMPT)
    end = tokens // 8 * 8
    prompt = np.r_[PROMPT[:tokens], 5, 6]
    assert rig.manager.match(prompt).tokens == end
    places = rig.everything(prompt)
    got = await rig.get(prompt, places)
    assert int(np.count_nonzero(got.return_mask)) == end
    rig.check(places, end)


async def test_a_prefix_needs_its_own_leaves(rig: GroupRig) -> None:
    """Where a group has only the leaves of one boundary, no other prefix is offered."""
    places = rig.caches.places(40, 0)
    for group in (1, 2, 3):
        places[group] = {n: n for n in rig.caches.needed(group, 32)}
    slots = rig.caches.slots(40, *places)
    await rig.manager.put(PROMPT, slots)
    for tokens, found in ((40, 32), (36, 32), (32, 32), (31, 0), (16, 0)):
        assert rig.manager.match(PROMPT[:tokens]).tokens == found


@pytest.mark.parametrize("missing", [1, 2, 3])
async def test_a_group_without_its_leaves_makes_a_miss(rig: GroupRig, missing: int) -> None:
    """Without the leaves of one group nothing is offered, except where it needs none."""
    await rig.put(PROMPT, [group for group in GROUPS if group != missing])
    # A prefix that ends with a chunk needs nothing of the chunk.
    assert rig.manager.match(PROMPT).tokens == (32 if missing == 2 else 0)
    got = await rig.get(PROMPT[:24], rig.everything(PROMPT[:24]))
    ends = 16 if missing == 2 else 0
    assert int(np.count_nonzero(got.return_mask)) == ends
    assert got.status is (KVResponseStatus.SUCCESS if ends else KVResponseStatus.NOTFOUND)
    put = await rig.put(PROMPT)
    assert (put.status, put.return_mask.any()) == (KVResponseStatus.SUCCESS, False)
    assert rig.manager.match(PROMPT).tokens == 40


@pytest.mark.parametrize("missing", [1, 2, 3])
async def test_a_get_needs_a_device_block_for_each_leaf(rig: GroupRig, missing: int) -> None:
    """A get is cut to the longest prefix for which the caller has all device blocks."""
    await rig.put(PROMPT)
    places = list(rig.everything(PROMPT))
    needed = rig.caches.needed(missing, 40)
    places[missing] = {n: b for n, b in places[missing].items() if n != needed[-1]}
    got = await rig.get(PROMPT, places)
    assert int(np.count_nonzero(got.return_mask)) == 32
    rig.check(places, 32)
    places[missing] = {}
    got = await rig.get(PROMPT, places)
    # A prefix that ends with a chunk needs nothing of the chunk.
    assert int(np.count_nonzero(got.return_mask)) == (32 if missing == 2 else 0)


async def test_a_masked_get_needs_no_leaf_that_the_device_has(any_rig: GroupRig) -> None:
    """Leaves before the mask are on the device and not needed; a state always is."""
    rig = any_rig
    await rig.put(PROMPT)
    mask = np.arange(40) >= 32
    places = rig.everything(PROMPT)
    slots = [each[mask] for each in rig.caches.slots(40, *places)]
    got = await rig.request("get", PROMPT, slots, token_mask=mask)
    assert np.array_equal(got.return_mask, mask)
    rig.check(places, 40, first=32)


async def test_blocks_evicted_from_host_come_back_from_ssd(any_rig: GroupRig) -> None:
    """Leaves go to the SSD with the chain, and come back from it."""
    rig = any_rig
    await rig.put(PROMPT)
    await fill(rig)
    match = rig.manager.match(PROMPT)
    assert (match.tokens, match.tokens_by_tier[Tier.DISK]) == (40, 40)
    places = rig.everything(PROMPT)
    got = await rig.get(PROMPT, places)
    assert got.return_mask.all()
    rig.check(places, 40)
    assert rig.manager.statistics().corrupt_blocks == 0


async def test_a_prefetch_brings_what_every_group_needs(any_rig: GroupRig) -> None:
    """After a prefetch, a get reads nothing from the SSD."""
    rig = any_rig
    await rig.put(PROMPT)
    await fill(rig)
    await rig.request("prefetch", PROMPT)
    read = rig.manager.statistics().routes["disk→host"].blocks
    places = rig.everything(PROMPT)
    got = await rig.get(PROMPT, places)
    assert got.return_mask.all()
    rig.check(places, 40)
    assert rig.manager.statistics().routes["disk→host"].blocks == read


async def test_a_cancelled_get_leaves_nothing_behind(tmp_path: Path) -> None:
    """Cancelling a get of several groups releases everything that it held of any of them."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await rig.put(PROMPT)
        await fill(rig)
        task = asyncio.ensure_future(rig.get(PROMPT, rig.everything(PROMPT)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await manager.engine.scheduler.wait_idle()
        assert not manager.engine.residency.claims
        places = rig.everything(PROMPT)
        got = await rig.get(PROMPT, places)
        assert got.return_mask.all()
        rig.check(places, 40)


async def test_every_group_survives_a_restart(tmp_path: Path) -> None:
    """The SSD tier comes back warm with the leaves of each group."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        first = GroupRig(manager)
        await first.put(PROMPT)
        await manager.flush()
        kept = manager.statistics().tiers["disk"].group_blocks
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.statistics().tiers["disk"].group_blocks == kept == (10, 10, 10, 5)
        second = GroupRig(manager)
        second.stored = first.stored
        places = second.everything(PROMPT)
        got = await second.get(PROMPT, places)
        assert got.return_mask.all()
        second.check(places, 40)


async def corrupt(rig: GroupRig, folder: Path, group: int) -> None:
    """Put the prompt, move it to SSD, and damage the last block that it needs of a group."""
    await rig.put(PROMPT)
    await fill(rig)
    engine = rig.manager.engine
    found = engine.residency.find(engine.requests.intake(Operation.PREFETCH, PROMPT).keys)
    ready = {0: found.ready, **{leaves.group: leaves.ready for leaves in found.leaves}}[group]
    damage(folder, {int(ready[Tier.DISK].block_ids[-1])})


@pytest.mark.parametrize("group", GROUPS)
async def test_a_corrupt_block_of_any_group_fails_the_whole_get(tmp_path: Path, group: int) -> None:
    """A get with a wrong block moves nothing, and says so; the next one is a shorter hit."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await corrupt(rig, tmp_path, group)
        places = rig.everything(PROMPT)
        got = await rig.get(PROMPT, places)
        assert (got.status, got.return_mask.any()) == (KVResponseStatus.NOTFOUND, False)
        assert isinstance(got.error, CorruptBlockError)
        assert manager.statistics().corrupt_blocks == 1
        again = await rig.get(PROMPT, places)
        assert int(np.count_nonzero(again.return_mask)) == 32
        rig.check(places, 32)
        assert manager.statistics().corrupt_blocks == 1


@pytest.mark.parametrize("group", [1, 2, 3])
async def test_a_prefetch_that_lacks_a_leaf_has_moved_nothing(tmp_path: Path, group: int) -> None:
    """A prefetch with a wrong leaf says that nothing was moved: no prefix ends there."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await corrupt(rig, tmp_path, group)
        response = await manager.prefetch(PROMPT)
        assert response.status is KVResponseStatus.NOTFOUND
        assert not response.return_mask.any()
        assert manager.match(PROMPT).tokens == 32


async def test_a_mask_begins_where_blocks_of_all_groups_do(any_rig: GroupRig) -> None:
    """A get whose mask cuts a block of the state is refused; one behind all tokens is not."""
    await any_rig.put(PROMPT)
    slots = any_rig.caches.slots(40, *any_rig.everything(PROMPT))
    for first in (4, 20, 21, 39):
        mask = np.arange(40) >= first
        with pytest.raises(ConfigError, match=f"True from token {first} on.*multiple of 8 tokens"):
            await any_rig.request("get", PROMPT, [each[mask] for each in slots], token_mask=mask)
        with pytest.raises(ConfigError, match="token_mask"):
            any_rig.manager.get_match(PROMPT, token_mask=mask)
    nothing = [each[:0] for each in slots]
    got = await any_rig.request("get", PROMPT, nothing, token_mask=np.zeros(40, np.bool_))
    assert not got.return_mask.any()


async def test_a_put_behind_half_a_block_of_a_group_asks_for_all_of_it(rig: GroupRig) -> None:
    """What `put_match` asks for makes the whole prompt findable, whatever was stored before."""
    for stored in (4, 12, 20, 28):
        prompt = PROMPT + 1000 * stored
        await rig.put(prompt[:stored])
        task, mask = rig.manager.put_match(prompt)
        rig.manager.cancel(task)
        slots = rig.caches.slots(40, *rig.caches.places(40, 0))
        await rig.manager.put(prompt, [each[mask] for each in slots], token_mask=mask)
        assert rig.manager.match(prompt).tokens == 40


async def test_a_put_stores_leaves_of_an_older_prefix(rig: GroupRig) -> None:
    """A put with a mask stores leaves for the selected tokens only, and the chain before stays."""
    await rig.put(PROMPT[:24])
    mask = np.arange(40) >= 24
    places = rig.caches.places(40, 0)
    rig.stored = {(g, n): rig.caches.bytes_of(g, [b]) for g in GROUPS for n, b in places[g].items()}
    slots = [each[mask] for each in rig.caches.slots(40, *places)]
    put = await rig.manager.put(PROMPT, slots, token_mask=mask)
    assert np.array_equal(put.return_mask, mask)
    got = await rig.get(PROMPT, target := rig.everything(PROMPT))
    assert got.return_mask.all()
    rig.check(target, 40)


async def test_leaves_without_room_are_left_out(tmp_path: Path) -> None:
    """A put whose chain fills host memory stores no leaf, and says that there was no room."""
    config = cache_config(tmp_path, num_cpu_blocks=10, enable_ssd=False, num_ssd_blocks=0)
    async with KVManager(MODEL, config) as manager:
        rig = GroupRig(manager)
        put = await rig.put(PROMPT)
        assert (put.status, put.return_mask.all()) == (KVResponseStatus.SUCCESS, True)
        assert isinstance(put.error, CapacityError)
        assert manager.match(PROMPT).tokens == 0


async def test_put_match_asks_for_what_the_longest_prefix_lacks(rig: GroupRig) -> None:
    """The mask of a put's match begins where host memory lacks a block of any group."""
    await rig.put(PROMPT[:24])
    _, mask = rig.manager.put_match(PROMPT)
    assert mask.tolist() == [False] * 24 + [True] * 16
    _, mask = rig.manager.put_match(PROMPT[:24])
    assert not mask.any()


@pytest.mark.parametrize(("missing", "begins"), [(1, 24), (2, 32), (3, 32)])
async def test_put_match_asks_for_leaves_that_are_missing(
    rig: GroupRig, missing: int, begins: int
) -> None:
    """Where only leaves are missing, the mask begins where the blocks with the first of them do."""
    await rig.put(PROMPT, [group for group in GROUPS if group != missing])
    task, mask = rig.manager.put_match(PROMPT)
    assert np.array_equal(mask, np.arange(40) >= begins)
    rig.manager.cancel(task)


def test_get_match_keeps_the_leaves_that_it_found(tmp_path: Path) -> None:
    """The mask of a get's match ends at a boundary, and launching it loads every group."""
    manager = KVManager(MODEL, cache_config(tmp_path, enable_ssd=False, num_ssd_blocks=0))
    manager.start()
    try:
        rig = GroupRig(manager)
        asyncio.run(rig.put(PROMPT))
        prompt = np.r_[PROMPT, 7, 8, 9]
        task, mask = manager.get_match(prompt)
        assert mask.tolist() == [True] * 40 + [False] * 3
        for number in range(4):
            places = rig.caches.places(40, 0)
            asyncio.run(manager.put(PROMPT + 1000 * number, rig.caches.slots(40, *places)))
        places = rig.everything(PROMPT)
        manager.launch(task, rig.caches.slots(40, *places))
        assert manager.wait(task)[task].return_mask.sum() == 40
        rig.check(places, 40)
    finally:
        manager.shutdown()


def several(groups: int = 4) -> str:
    """Return the rule of an error about the number of arrays."""
    return f"slot_mapping=.*must be a list of {groups} arrays of slots"


async def test_bad_slot_mappings_change_nothing(any_rig: GroupRig) -> None:
    """One array, too few arrays and wrong slots are refused, and nothing is stored."""
    rig = any_rig
    slots = rig.caches.slots(40, *rig.caches.places(40, 0))
    for bad in (slots[0], slots[:3], slots[0].tolist(), None):
        with pytest.raises(ConfigError, match=several()):
            await rig.request("put", PROMPT, bad)
    half = [each.copy() for each in slots]
    half[3][9] = -1
    with pytest.raises(ConfigError, match=r"slot_mapping\[3\]\[9\]=-1: must be -1 for every token"):
        await rig.request("put", PROMPT, half)
    assert rig.manager.match(PROMPT).tokens == 0
    assert rig.manager.statistics().tiers["host"].used_blocks == 0
