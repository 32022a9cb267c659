"""Recalls: an op is taken back from its actor unless somebody still waits for its bytes."""

from __future__ import annotations

from typing import cast

import pytest

from flexkv.actors.actor import TransferActor
from flexkv.actors.scheduler import Scheduler
from flexkv.common.request import Operation
from flexkv.common.terms import Tier
from flexkv.graph.planner import Planner
from flexkv.index.eviction import Eviction
from flexkv.index.residency import Residency
from flexkv.io.ports import Completion, Transfer
from flexkv.observe.observer import Observer
from tests.unit.prompts import LIMITS, filled, request, residency, resident


class Posted:
    """Keeps what an actor would be told."""

    def __init__(self) -> None:
        self.posted: list[Transfer] = []
        self.recalled: list[int] = []

    def post(self, transfer: Transfer) -> None:
        """Take a transfer."""
        self.posted.append(transfer)

    def recall(self, op_id: int) -> None:
        """Take one back."""
        self.recalled.append(op_id)


@pytest.fixture
def actor() -> Posted:
    """Give the one actor of every tier."""
    return Posted()


def scheduler_of(tiers: Residency, actor: Posted) -> Scheduler:
    """Give a scheduler whose ops go to one actor, which never ends them by itself."""
    actors = {tier: cast("TransferActor", actor) for tier in (Tier.DEVICE, Tier.DISK)}
    return Scheduler(tiers, Planner(tiers, LIMITS), actors, Observer(16))


async def test_an_op_whose_joiner_left_is_recalled(actor: Posted) -> None:
    """A prefetch that a get joined and left is as cancellable as if nobody had."""
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
    """A cancelled prefetch brings what a get has joined."""
    tiers = residency()
    filled(tiers, Tier.DISK, 0, 1)
    scheduler = scheduler_of(tiers, actor)
    prefetch = scheduler.begin(request(Operation.PREFETCH, 0, 1))
    scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(prefetch)
    assert not actor.recalled


async def test_bytes_that_will_not_stay_good_are_recalled_though_one_waits(actor: Posted) -> None:
    """A cancelled put's slots are about to change: the get that joined it learns so at once."""
    scheduler = scheduler_of(residency(), actor)
    put = scheduler.begin(request(Operation.PUT, 0, 1))
    scheduler.begin(request(Operation.GET, 0, 1))
    scheduler.cancel(put)
    assert actor.recalled == [transfer.op_id for transfer in actor.posted]


async def test_a_policy_with_a_reward_knows_when_a_request_comes(actor: Posted) -> None:
    """A block that was hit long ago goes before one that came just now."""
    tiers = Residency({Tier.HOST: 2}, Eviction("lru", hit_reward_seconds=10.0))
    filled(tiers, Tier.HOST, 0)
    now_ns = [0]
    actors = {Tier.DEVICE: cast("TransferActor", actor)}
    observer = Observer(16, lambda: now_ns[0])
    scheduler = Scheduler(tiers, Planner(tiers, LIMITS), actors, observer)
    for second, operation, number in (
        (0, Operation.GET, 0), (20, Operation.PUT, 1), (20, Operation.PUT, 2)
    ):  # fmt: skip
        now_ns[0] = second * 1_000_000_000
        scheduler.begin(request(operation, number))
        scheduler.report(Completion(transfer.op_id, None) for transfer in actor.posted)
        actor.posted.clear()
    assert [resident(tiers, number) for number in range(3)] == [0, 1, 1]
