"""What the planner makes of a request, for any content of the tiers and any room in them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flexkv.common.errors import CapacityError
from flexkv.common.request import Operation, Span
from flexkv.common.terms import Positions, Tier
from flexkv.graph.planner import Planned, Planner
from flexkv.index.eviction import Eviction
from flexkv.index.keys import block_keys
from flexkv.index.residency import PREFIX, WORTHY, Residency
from flexkv.testing.fake_far import FakeFar
from tests.unit.leaves import prompt
from tests.unit.prompts import LIMITS, filled, keys, request, residency, resident


def run(tiers: Residency, planned: Planned) -> None:
    """Settle every op of a plan as successful."""
    for op in planned.plan.template.ops:
        tiers.claims.settle(planned.plan.op_id(op), filled=True)


def test_a_get_is_cut_where_host_places_end() -> None:
    """A get leaves out disk blocks without a host place, and reports the shortfall."""
    tiers = residency(host=4)
    filled(tiers, Tier.DISK, *range(8))
    planned = Planner(tiers, LIMITS).plan(request(Operation.GET, *range(8)), 1)
    assert planned.found.last == 4
    assert isinstance(planned.shortfall, CapacityError)
    assert planned.shortfall.wanted_blocks == 8


def test_a_get_never_evicts_what_it_found() -> None:
    """A get keeps its host hits while it makes places for its disk blocks."""
    tiers = residency(host=4)
    filled(tiers, Tier.HOST, 0, 1)
    filled(tiers, Tier.HOST, 90, 91)
    filled(tiers, Tier.DISK, 0, 1, 2, 3, 4, first=2)
    planned = Planner(tiers, LIMITS).plan(request(Operation.GET, *range(5)), 1)
    assert planned.found.last == 4
    assert (resident(tiers, 0, 1), resident(tiers, 90, 91)) == (2, 0)


def test_a_put_counts_as_a_use_of_what_lower_tiers_have() -> None:
    """A put is a use of its blocks on disk, so eviction takes another prompt's."""
    tiers = residency(host=8, disk=4)
    filled(tiers, Tier.HOST, 0, 1, 2)
    filled(tiers, Tier.DISK, 0, 1)
    filled(tiers, Tier.DISK, 90, 91)
    Planner(tiers, LIMITS).plan(request(Operation.PUT, 0, 1, 2), 1)
    assert tiers.counts(Tier.DISK).reserved == 1
    assert (resident(tiers, 90, 91), tiers.namespace_blocks(keys())[Tier.DISK]) == (1, 4)


def test_a_put_whose_parent_is_nowhere_stores_nothing() -> None:
    """A put whose parent block is absent stores nothing, since no get could reach its blocks."""
    tiers = residency()
    behind = request(Operation.PUT, 0, 1, 2)
    behind = msgspec.structs.replace(
        behind, span=Span(1, 3, 1, 3), device_ids=np.arange(2, dtype=np.int64)
    )
    assert not Planner(tiers, LIMITS).plan(behind, 1).plan.template.ops
    filled(tiers, Tier.HOST, 0)
    assert Planner(tiers, LIMITS).plan(behind, 2).plan.template.ops
    assert resident(tiers, 0, 1, 2) == 3


def test_a_put_keeps_the_host_blocks_that_it_writes_to_one_of_two_lower_tiers() -> None:
    """A put keeps the host blocks that it writes to the one lower tier that lacks them."""
    tiers = Residency({Tier.HOST: 2, Tier.DISK: 8, Tier.REMOTE: 8})
    planner = Planner(tiers, LIMITS)
    run(tiers, planner.plan(request(Operation.PUT, 0, 1), 1))
    remote = tiers.namespace_holdings(keys())[2]
    assert len(remote.block_ids) == 2
    tiers.forget(*remote)
    plan = planner.plan(request(Operation.PUT, 0, 1, 2, 3), 2).plan
    read = {int(b) for fill in plan.fills for b in fill.ids[Tier.HOST]}
    assert read == {0, 1}
    assert not any(Tier.DEVICE in op.route for op in plan.template.ops if op.route)


def test_blocks_that_others_bring_want_no_host_places() -> None:
    """Blocks that another request is bringing need no host places of a get."""
    tiers = residency(host=10, disk=20)
    planner = Planner(tiers, LIMITS)
    run(tiers, planner.plan(request(Operation.PUT, *range(10)), 1))
    host, disk = tiers.namespace_holdings(keys())
    tiers.forget(Tier.HOST, host.block_ids[:8])
    tiers.forget(Tier.DISK, disk.block_ids[8:])
    tiers.resize(Tier.HOST, 6)
    planner.plan(request(Operation.PREFETCH, *range(4)), 2)
    planned = planner.plan(request(Operation.GET, *range(10)), 3)
    assert planned.found.pending is not None
    assert planned.found.last == 6


def test_what_host_memory_would_not_keep_still_reaches_the_ssd() -> None:
    """Under lhd, a cold put passes through a host full of hot blocks to an empty SSD."""
    tiers = Residency({Tier.HOST: 4, Tier.DISK: 64}, Eviction("lhd"))
    planner = Planner(tiers, LIMITS)
    for turn in range(60):
        for n in (0, 10):
            run(tiers, planner.plan(request(Operation.GET, n, n + 1), 1000 + turn))
            run(tiers, planner.plan(request(Operation.PUT, n, n + 1), 2000 + turn))
    run(tiers, planner.plan(request(Operation.GET, 50, 51), 1))
    run(tiers, planner.plan(request(Operation.PUT, 50, 51), 2))
    assert resident(tiers, 50, 51) == 2


def test_a_put_that_host_memory_cannot_take_whole_stores_its_first_blocks() -> None:
    """A put larger than host memory stores its first blocks, even those that the SSD has.

    Blocks behind one that is not in host memory would be of no use.
    """
    tiers = residency(host=2)
    filled(tiers, Tier.DISK, 0, 1)
    planned = Planner(tiers, LIMITS).plan(request(Operation.PUT, 0, 1, 2, 3), 1)
    stored = [p for fill in planned.plan.fills for p in fill.ids[Tier.DEVICE].tolist()]
    assert stored == [0, 1]
    assert planned.shortfall is not None


def test_what_waits_to_be_written_counts_against_what_may_be_written_behind_a_put() -> None:
    """The blocks of all puts that wait for a lower tier are bounded; further ones are owed to it.

    Blocks that were written make room.
    """
    tiers = residency(host=32, disk=64)
    planner = Planner(tiers, LIMITS)
    first = planner.plan(request(Operation.PUT, *range(6)), 1)
    assert tiers.counts(Tier.DISK).reserved == 6
    planner.plan(request(Operation.PUT, *range(100, 106)), 2)
    assert tiers.counts(Tier.DISK).reserved == LIMITS.write_behind_blocks_max
    planner.plan(request(Operation.PUT, *range(200, 206)), 3)
    assert tiers.counts(Tier.DISK).reserved == LIMITS.write_behind_blocks_max
    run(tiers, first)
    planner.plan(request(Operation.PUT, *range(300, 310)), 4)
    assert tiers.counts(Tier.DISK).reserved == LIMITS.write_behind_blocks_max
    assert tiers.counts(Tier.HOST).reserved == 22


@pytest.mark.parametrize(("how", "blocks"), [(PREFIX, 8), (WORTHY, 0)])
def test_the_policy_may_refuse_what_other_nodes_have(how: int, blocks: int) -> None:
    """With WORTHY, lhd fetches nothing that promises less than what it would displace."""
    tiers, far = Residency({Tier.HOST: 64}, Eviction("lhd")), FakeFar(Tier.PEER)
    hot = [prompt(0, *range(8 * number, 8 * number + 9)[1:]) for number in range(8)]
    for of in hot:
        tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, of, Positions(0, 8)))
    for number in range(1000, 3560, 8):  # hot prompts come back, and others never do
        tiers.find(hot[number // 8 % 8], use=True)
        tiers.find(prompt(0, *range(number, number + 8)), use=True)
    asked = request(Operation.GET, *range(8))
    asked = msgspec.structs.replace(asked, keys=prompt(0, *range(5000, 5008)))
    far.hold(block_keys(asked.keys))
    planned = Planner(tiers, LIMITS._replace(peers_how=how), far).plan(asked, 1)
    assert (planned.found.last, planned.shortfall) == (blocks, None)
    assert sum(tiers.find(of).last for of in hot) == 64 - blocks


def test_a_full_tier_is_told_under_policies_that_refuse_nothing() -> None:
    """Under lru WORTHY takes what fits, and the plan says why it takes no more."""
    tiers, far = residency(host=4, disk=0), FakeFar(Tier.PEER)
    asked = request(Operation.GET, *range(8))
    far.hold(block_keys(asked.keys))
    planned = Planner(tiers, LIMITS._replace(peers_how=WORTHY), far).plan(asked, 1)
    assert planned.found.last == 4
    assert planned.shortfall is not None
