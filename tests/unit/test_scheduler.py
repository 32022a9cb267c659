"""Recalls: a cancelled op is recalled from its actor unless another request waits for its bytes."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from flexkv.actors.actor import TransferActor
from flexkv.actors.scheduler import Scheduler
from flexkv.common.errors import InvariantError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.graph.planner import Planner
from flexkv.index.eviction import Eviction
from flexkv.index.residency import Residency
from flexkv.io.ports import Completion, Transfer
from flexkv.observe.observer import Observer
from tests.unit.prompts import LIMITS, filled, request, residency, resident


class Posted:
    """A fake actor that records what it is told."""

    def __init__(self) -> None:
        self.posted: list[Transfer] = []
        self.recalled: list[int] = []

    def post(self, transfer: Transfer) -> None:
        """Record a transfer."""
        self.posted.append(transfer)

    def recall(self, op_id: int) -> None:
        """Record a recall."""
        self.recalled.append(op_id)


@pytest.fixture
def actor() -> Posted:
    """Return a fake actor for all tiers."""
    return Posted()


def scheduler_of(tiers: Residency, actor: Posted) -> Scheduler:
    """Return a scheduler whose ops go to a fake actor, which does not end them by itself."""
    actors = {tier: cast("TransferActor", actor) for tier in (Tier.DEVICE, Tier.DISK)}
    return Scheduler(tiers, Planner(tiers, LIMITS), actors, Observer([16]))


async def test_an_op_whose_joiner_left_is_recalled(actor: Posted) -> None:
    """A cancelled prefetch is recalled if the get that joined it has left."""
    tiers = residency()
    filled(tiers, Tier.DISK, 0, 1)
    scheduler = scheduler_of(tiers, actor)
    prefetch = scheduler.begin(request(Operation.PREFETCH, 0, 1))
    get = scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(get)
    assert not actor.recalled
    scheduler.cancel(prefetch)
    assert actor.recalled == [transfer.op_id for transfer in actor.posted]


async def test_an_op_whose_bytes_are_waited_for_goes_on(actor: Posted) -> None:
    """A cancelled prefetch goes on while a get that joined it waits."""
    tiers = residency()
    filled(tiers, Tier.DISK, 0, 1)
    scheduler = scheduler_of(tiers, actor)
    prefetch = scheduler.begin(request(Operation.PREFETCH, 0, 1))
    scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(prefetch)
    assert not actor.recalled


async def test_bytes_that_will_not_stay_good_are_recalled_though_one_waits(actor: Posted) -> None:
    """A cancelled put is recalled even if a get joined it, as its slots are about to change."""
    scheduler = scheduler_of(residency(), actor)
    put = scheduler.begin(request(Operation.PUT, 0, 1))
    scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(put)
    assert actor.recalled == [transfer.op_id for transfer in actor.posted]


async def test_a_cancelled_get_has_loaded_nothing(actor: Posted) -> None:
    """The response to a cancelled get names no block, though all were loaded before the recall."""
    tiers = residency()
    filled(tiers, Tier.HOST, 0, 1)
    scheduler = scheduler_of(tiers, actor)
    get = scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(get)
    scheduler.report(Completion(transfer.op_id, None) for transfer in actor.posted)
    assert get.response is not None
    assert get.response.status is KVResponseStatus.CANCELLED
    assert not get.response.return_mask.any()


async def test_a_policy_with_a_reward_knows_when_a_request_comes(actor: Posted) -> None:
    """With hit_reward_seconds, a block that was hit long ago is evicted before a new one."""
    tiers = Residency({Tier.HOST: 2}, Eviction("lru", hit_reward_seconds=10.0))
    filled(tiers, Tier.HOST, 0)
    now_ns = [0]
    actors = {Tier.DEVICE: cast("TransferActor", actor)}
    observer = Observer([16], lambda: now_ns[0])
    scheduler = Scheduler(tiers, Planner(tiers, LIMITS), actors, observer)
    for second, operation, number in (
        (0, Operation.GET, 0), (20, Operation.PUT, 1), (20, Operation.PUT, 2)
    ):  # fmt: skip
        now_ns[0] = second * 1_000_000_000
        scheduler.begin(request(operation, number))
        scheduler.report(Completion(transfer.op_id, None) for transfer in actor.posted)
        actor.posted.clear()
    assert [resident(tiers, number) for number in range(3)] == [0, 1, 1]


async def test_everyone_who_waits_is_told_of_an_engine_that_fails(actor: Posted) -> None:
    """When the engine fails, its error is raised for all who wait, and kept for who asks later."""
    scheduler, failure = scheduler_of(residency(), actor), InvariantError("broken")
    assert scheduler.failure is None
    flight = scheduler.begin(request(Operation.PUT, 0, 1))
    waits = (flight.wait_answered, flight.wait_drained, flight.wait_ended)
    tasks = [asyncio.ensure_future(wait()) for wait in waits]
    await asyncio.sleep(0)
    scheduler.fail(failure)
    await asyncio.sleep(0)
    assert [task.exception() for task in tasks] == [failure] * 3
    assert scheduler.failure is failure
