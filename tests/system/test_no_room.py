"""Tests of puts without room, and of what tasks hold while nobody launches them."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.errors import CapacityError, ConfigError
from flexkv.common.request import KVResponseStatus
from flexkv.engine import pins
from flexkv.front import tasks
from flexkv.kvmanager import KVManager

from .conftest import PER_BLOCK, MakeManager, Rig, kv_caches, slots_of
from .serving import eventually

BLOCKS = 8


def prompt(number: int, blocks: int = BLOCKS) -> np.ndarray:
    """Return a prompt that shares nothing with others."""
    return np.arange(blocks * PER_BLOCK) + number * 10_000


async def test_a_put_that_found_no_room_does_not_say_success(make_manager: MakeManager) -> None:
    """A put that finds host memory pinned stores nothing and says so; once unpinned it works."""
    async with make_manager(num_cpu_blocks=BLOCKS, enable_ssd=False) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(prompt(1), slots_of(range(BLOCKS)))
        pin = manager.pin(prompt(1))
        response = await manager.put(prompt(2), slots_of(range(BLOCKS)))
        assert response.status is KVResponseStatus.UNREADY
        assert isinstance(response.error, CapacityError)
        assert not response.return_mask.any()
        again = await manager.put(prompt(1), slots_of(range(BLOCKS)))
        assert (again.status, again.error) == (KVResponseStatus.SUCCESS, None)
        assert not again.return_mask.any()
        manager.unpin(pin)
        stored = await manager.put(prompt(2), slots_of(range(BLOCKS)))
        assert (stored.status, stored.return_mask.all()) == (KVResponseStatus.SUCCESS, True)


async def test_a_put_that_lacks_room_for_the_rest_of_what_is_there_says_so(
    make_manager: MakeManager,
) -> None:
    """A put whose first blocks are stored but whose others find no room says so."""
    async with make_manager(num_cpu_blocks=BLOCKS, enable_ssd=False) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(prompt(1), slots_of(range(BLOCKS)))
        manager.pin(prompt(1))
        longer = await manager.put(prompt(1, 2 * BLOCKS), slots_of(range(2 * BLOCKS)))
        assert longer.status is KVResponseStatus.UNREADY
        assert isinstance(longer.error, CapacityError)


async def test_a_put_of_which_a_part_found_room_is_a_success(make_manager: MakeManager) -> None:
    """A put of which a part finds room is a success with a shorter mask and the reason."""
    async with make_manager(num_cpu_blocks=BLOCKS, enable_ssd=False) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(prompt(1, 6), slots_of(range(6)))
        manager.pin(prompt(1, 6))
        response = await manager.put(prompt(2), slots_of(range(BLOCKS)))
        assert response.status is KVResponseStatus.SUCCESS
        assert int(response.return_mask.sum()) == 2 * PER_BLOCK
        assert isinstance(response.error, CapacityError)


@pytest.fixture
def manager(make_manager: MakeManager) -> KVManager:
    """Return a manager for the task-id form, not started."""
    return make_manager()


def test_what_a_match_holds_is_let_go_when_nobody_launches_it(
    manager: KVManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A match's hold is released after a while; launching or cancelling its task still works."""
    monkeypatch.setattr(pins, "HOLD_S", 0.05)
    manager.start()
    try:
        rig = Rig(manager, "task")
        put = manager.put_async(prompt(1), slots_of(range(BLOCKS)))
        manager.wait([put], completely=True)
        launched, cancelled = (manager.get_match(prompt(1))[0] for _ in range(2))
        eventually(lambda: not manager.statistics().tiers["host"].pinned_blocks)
        manager.cancel([cancelled])
        manager.launch([launched], [slots_of(range(20, 20 + BLOCKS))])
        assert manager.wait([launched])[launched].return_mask.all()
        np.testing.assert_array_equal(
            np.stack([layer[:, 20 : 20 + BLOCKS] for layer in rig.caches]).view(np.uint16),
            np.stack([layer[:, :BLOCKS] for layer in rig.caches]).view(np.uint16),
        )
    finally:
        manager.shutdown()


def test_matches_that_nobody_launches_leave_room_for_puts(manager: KVManager) -> None:
    """Matches that nobody launches hold half of host memory at most; the oldest lose theirs."""
    manager.start()
    try:
        Rig(manager, "task")
        for number in range(4):
            put = manager.put_async(prompt(number), slots_of(range(BLOCKS)))
            manager.wait([put], completely=True)
        held = [manager.get_match(prompt(number))[0] for number in range(4)]
        assert manager.statistics().tiers["host"].pinned_blocks == 16
        put = manager.put_async(prompt(9), slots_of(range(BLOCKS)))
        # Write-behind pins blocks, too, until it is over.
        assert manager.wait([put], completely=True)[put].return_mask.all()
        manager.cancel(held)
        assert not manager.statistics().tiers["host"].pinned_blocks
    finally:
        manager.shutdown()


def test_tasks_that_nobody_collects_are_bounded(
    manager: KVManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that nobody collects are bounded, however issued; collecting one makes room."""
    monkeypatch.setattr(tasks, "TASKS_MAX", 3)
    manager.start()
    try:
        Rig(manager, "task")
        slots = slots_of(range(BLOCKS))
        issued = [
            manager.put_async(prompt(1), slots),
            manager.get_match(prompt(1))[0],
            manager.put_match(prompt(2))[0],
        ]
        for issue in (
            lambda: manager.put_async(prompt(3), slots),
            lambda: manager.get_async(prompt(3), slots),
            lambda: manager.prefetch_async(prompt(3)),
            lambda: manager.get_match(prompt(3)),
            lambda: manager.put_match(prompt(3)),
        ):
            with pytest.raises(ConfigError, match="at most 3 tasks"):
                issue()
        manager.wait(issued[:1])
        issued[0] = manager.get_match(prompt(3))[0]
        manager.cancel(issued)
        assert len(manager.wait(issued)) == 3
    finally:
        manager.shutdown()
