"""The core catches our own mistakes where they are made: every check is seen to fail."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flexkv.common.errors import (
    BackendUnavailableError,
    CapacityError,
    CorruptBlockError,
    DeviceError,
    InvariantError,
    ShortTransferError,
    StorageError,
)
from flexkv.common.request import Operation, Request, Span
from flexkv.common.terms import BlockIds, Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.explain import explain
from flexkv.graph.ops import CHUNKS_MAX, Leg, Shape
from flexkv.graph.plan import OPS_MAX, LegFill, Plan, Template
from flexkv.graph.planner import PlanLimits, Planner
from flexkv.graph.run import Launch, Run
from flexkv.index.claims import Claim, Holding
from flexkv.index.residency import Positions, Residency, prefix_match

LIMITS = PlanLimits(chunk_blocks=2, write_behind_blocks_max=8)


def keys(*numbers: int) -> bytes:
    """Give a root, and a key for each number; a chain of keys is a prompt."""
    return b"".join((number + 2).to_bytes(16, "little") for number in (-1, *numbers))


def residency(host: int = 4, disk: int = 8) -> Residency:
    """Give empty tiers."""
    counts = {Tier.HOST: host, Tier.DISK: disk}
    return Residency({tier: count for tier, count in counts.items() if count})


def request(operation: Operation, *numbers: int) -> Request:
    """Give a request over a prompt of blocks by number, with device blocks 0, 1, …"""
    count = len(numbers)
    ids = None if operation is Operation.PREFETCH else np.arange(count)
    return Request(operation, 1, count, 1, Span(0, count, 0, count), keys(*numbers), ids)


def filled(tiers: Residency, tier: Tier, *numbers: int, first: int = 0) -> BlockIds:
    """Make blocks of a prompt ready in a tier, from the position `first` on."""
    ids = tiers.reserve(tier, keys(*numbers), Positions(first, len(numbers) - first))
    tiers.commit(tier, ids)
    return ids


def resident(tiers: Residency, *numbers: int) -> int:
    """Count the leading blocks of a prompt that some tier has."""
    return tiers.find(keys(*numbers)).last


def test_validate_sees_a_pin_without_a_claim() -> None:
    """What nobody claims may not be reserved or pinned."""
    tiers = residency()
    tiers._table.pin(0, filled(tiers, Tier.HOST, 1))
    with pytest.raises(InvariantError, match="no claim is open"):
        tiers.validate()


def test_claims_open_once_and_settle_once() -> None:
    """A token has one claim, which ends once, and can be told and found by its owner."""
    tiers = residency()
    claim = Claim(7, Holding(Tier.HOST, filled(tiers, Tier.HOST, 1)), None)
    tiers.claims.open(1, claim)
    with pytest.raises(InvariantError):
        tiers.claims.open(1, claim)
    assert tiers.claims.of_owner(7) == 1
    assert "owner=7" in tiers.claims.stories()[0]
    tiers.claims.settle(1, filled=False)
    with pytest.raises(InvariantError):
        tiers.claims.settle(1, filled=False)


def test_limits_on_shapes_and_templates_hold() -> None:
    """Too many legs, chunks or ops are refused; a barrier gives no transfer."""
    load = Leg((Route(Tier.HOST, Tier.DEVICE),), 1)
    with pytest.raises(InvariantError, match="legs"):
        compile_shape(Shape(Operation.GET, (load,) * 41))
    with pytest.raises(InvariantError, match="chunks"):
        compile_shape(Shape(Operation.GET, (load._replace(chunks=CHUNKS_MAX + 1),)))
    template = compile_shape(Shape(Operation.GET, (load._replace(waits=True),)))
    with pytest.raises(InvariantError, match="ops"):
        Template(template.shape, template.ops * OPS_MAX, (), (), 0, ())
    plan = Plan(template, 0, (LegFill(Positions(0, 1), {}, (0, 1), (5,)),))
    with pytest.raises(InvariantError, match="barrier"):
        plan.transfer(template.ops[0])


def test_a_run_with_wrong_counters_is_seen() -> None:
    """validate compares counters and states."""
    run = Run(compile_shape(Shape(Operation.GET, (Leg((Route(Tier.HOST, Tier.DEVICE),), 1),))))
    run.handle(Launch())
    run.validate()
    run._live = 5
    with pytest.raises(InvariantError):
        run.validate()


def test_a_get_is_cut_where_host_places_end() -> None:
    """Disk blocks for which the host has no place are left out, and the shortfall is told."""
    tiers = residency(host=4)
    filled(tiers, Tier.DISK, *range(8))
    planned = Planner(tiers, LIMITS).plan(request(Operation.GET, *range(8)), 1)
    assert planned.found.last == 4
    assert isinstance(planned.shortfall, CapacityError)
    assert planned.shortfall.wanted_blocks == 8


def test_a_get_never_evicts_what_it_found() -> None:
    """Host hits of the request stay while places for its disk blocks are made."""
    tiers = residency(host=4)
    filled(tiers, Tier.HOST, 0, 1)
    filled(tiers, Tier.HOST, 90, 91)
    filled(tiers, Tier.DISK, 0, 1, 2, 3, 4, first=2)
    planned = Planner(tiers, LIMITS).plan(request(Operation.GET, *range(5)), 1)
    assert planned.found.last == 4
    assert (resident(tiers, 0, 1), resident(tiers, 90, 91)) == (2, 0)


def test_a_put_counts_as_a_use_of_what_lower_tiers_have() -> None:
    """A prompt that grows keeps its first blocks on disk: eviction takes another prompt's."""
    tiers = residency(host=8, disk=4)
    filled(tiers, Tier.HOST, 0, 1, 2)
    filled(tiers, Tier.DISK, 0, 1)
    filled(tiers, Tier.DISK, 90, 91)
    Planner(tiers, LIMITS).plan(request(Operation.PUT, 0, 1, 2), 1)
    assert tiers.counts(Tier.DISK).reserved == 1
    assert (resident(tiers, 90, 91), tiers.namespace_blocks(keys())[Tier.DISK]) == (1, 4)


def test_a_put_whose_parent_is_nowhere_stores_nothing() -> None:
    """No get could reach the blocks: a store has no holes."""
    tiers = residency()
    behind = request(Operation.PUT, 0, 1, 2)
    behind = msgspec.structs.replace(
        behind, span=Span(1, 3, 1, 3), device_ids=np.arange(2, dtype=np.int64)
    )
    assert not Planner(tiers, LIMITS).plan(behind, 1).plan.template.ops
    filled(tiers, Tier.HOST, 0)
    assert Planner(tiers, LIMITS).plan(behind, 2).plan.template.ops
    assert resident(tiers, 0, 1, 2) == 3


def test_matches_count_each_block_at_its_nearest_tier() -> None:
    """Host before disk; what is being filled counts as pending."""
    tiers = residency()
    filled(tiers, Tier.HOST, 0)
    filled(tiers, Tier.DISK, 0, 1)
    tiers.reserve(Tier.HOST, keys(0, 1, 2), Positions(2, 1))
    match = prefix_match(tiers.find(keys(0, 1, 2, 3)), tiers.tiers, 16)
    assert match.tokens == 48
    assert match.tokens_by_tier == {Tier.HOST: 16, Tier.DISK: 16}
    assert match.pending_tokens == 16


@pytest.mark.parametrize(
    ("operation", "drawn"),
    [
        (Operation.GET, ["host→device 1 blocks", "disk→host 1 blocks"]),
        (Operation.PREFETCH, ["disk→host 1 blocks (answers)"]),
        (Operation.PUT, ["device→host 2 blocks (answers)", "host→disk 2 blocks"]),
    ],
)
def test_explain_draws_what_a_request_would_do(operation: Operation, drawn: list[str]) -> None:
    """Residency is read, nothing is reserved; a miss says so in one line."""
    tiers = residency()
    filled(tiers, Tier.HOST, 0)
    filled(tiers, Tier.DISK, 0, 1)
    text = str(explain(request(operation, 0, 1, 2), tiers, LIMITS))
    assert all(part in text for part in drawn), text
    tiers.validate()
    nothing = str(explain(request(Operation.GET, 50), tiers, LIMITS))
    assert nothing == "get of 1 whole blocks: 0 in host, 0 in disk"


def test_errors_carry_their_values_and_say_them() -> None:
    """Each message names what a reader needs; the values are attributes."""
    storage = StorageError("/ssd/blocks-0", 4096, 5)
    assert "/ssd/blocks-0 at byte 4096: EIO" in str(storage)
    assert storage.errno == 5
    short = ShortTransferError("/ssd/blocks-0", 0, 100, 60)
    assert "60 of 100 bytes" in str(short)
    assert "cuMemcpy failed with code 700" in str(DeviceError("cuMemcpy", 700))
    assert "ab00" in str(CorruptBlockError(bytes.fromhex("ab00")))
    assert "cuda is not available: no driver" in str(BackendUnavailableError("cuda", "no driver"))
