"""The core catches our own mistakes where they are made: every check is shown to fail."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.errors import (
    BackendUnavailableError,
    CorruptBlockError,
    DeviceError,
    InvariantError,
    ShortTransferError,
    StorageError,
)
from flexkv.common.request import Operation
from flexkv.common.terms import Positions, Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.explain import explain
from flexkv.graph.ops import CHUNKS_MAX, Leg, Shape
from flexkv.graph.plan import OPS_MAX, LegFill, Plan, Template
from flexkv.graph.planner import Planner
from flexkv.graph.run import LaunchRun, Run
from flexkv.index.claims import Claim, Holding
from flexkv.index.eviction import Eviction
from flexkv.index.found import prefix_match
from flexkv.index.residency import Residency
from tests.unit.prompts import LIMITS, filled, keys, request, residency, resident


def test_validate_sees_a_pin_without_a_claim() -> None:
    """`validate` finds a pin that belongs to no open claim."""
    tiers = residency()
    tiers._table.pin(0, filled(tiers, Tier.HOST, 1))
    with pytest.raises(InvariantError, match="no claim is open"):
        tiers.validate()


def test_claims_open_once_and_settle_once() -> None:
    """An op id has one claim, which opens and ends once, and can be found by its owner."""
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
    """Too many legs, chunks or ops are refused; a barrier has no transfer."""
    load = Leg((Route(Tier.HOST, Tier.DEVICE),), 1)
    with pytest.raises(InvariantError, match="legs"):
        compile_shape(Shape(Operation.GET, (load,) * 41))
    with pytest.raises(InvariantError, match="chunks"):
        compile_shape(Shape(Operation.GET, (load._replace(chunks=CHUNKS_MAX + 1),)))
    assert len(compile_shape(Shape(Operation.GET, (load,) * 40)).ops) == 40
    template = compile_shape(Shape(Operation.GET, (load._replace(waits=True),)))
    with pytest.raises(InvariantError, match="ops"):
        Template(template.shape, template.ops * OPS_MAX, (), (), (), 0, ())
    plan = Plan(template, 0, (LegFill(b"", Positions(0, 1), {}, (0, 1), (5,)),))
    with pytest.raises(InvariantError, match="barrier"):
        plan.transfer(template.ops[0])


def test_a_run_with_wrong_counters_is_seen() -> None:
    """`validate` finds a run whose counters do not match its states."""
    run = Run(compile_shape(Shape(Operation.GET, (Leg((Route(Tier.HOST, Tier.DEVICE),), 1),))))
    run.handle(LaunchRun())
    run.validate()
    run._live = 5
    with pytest.raises(InvariantError):
        run.validate()


def test_matches_count_each_block_at_its_nearest_tier() -> None:
    """A match counts each block once, in host before disk; blocks being filled count as pending."""
    tiers = residency()
    filled(tiers, Tier.HOST, 0)
    filled(tiers, Tier.DISK, 0, 1)
    tiers.reserve(Tier.HOST, keys(0, 1, 2), Positions(2, 1))
    match = prefix_match(tiers.find(keys(0, 1, 2, 3)), tiers.tiers, 16, {Tier.REMOTE: 2})
    assert match.tokens == 48
    assert match.tokens_by_tier == {Tier.HOST: 16, Tier.DISK: 16}
    assert match.pending_tokens == 16
    assert match.far_tokens_by_tier == {Tier.REMOTE: 32}


@pytest.mark.parametrize(
    ("operation", "drawn"),
    [
        (Operation.GET, ["host→device 1 blocks", "disk→host 1 blocks"]),
        (Operation.PREFETCH, ["disk→host 1 blocks (answers)"]),
        (Operation.PUT, ["device→host 2 blocks (answers)", "host→disk 2 blocks"]),
    ],
)
def test_explain_draws_what_a_request_would_do(operation: Operation, drawn: list[str]) -> None:
    """`explain` shows what a request would do and reserves nothing; a miss is one line."""
    tiers = residency()
    filled(tiers, Tier.HOST, 0)
    filled(tiers, Tier.DISK, 0, 1)
    text = str(explain(request(operation, 0, 1, 2), Planner(tiers, LIMITS)))
    assert all(part in text for part in drawn), text
    tiers.validate()
    nothing = str(explain(request(Operation.GET, 50), Planner(tiers, LIMITS)))
    assert nothing == "get of 1 whole blocks: 0 in host, 0 in disk"


def test_errors_carry_their_values_and_say_them() -> None:
    """Each error has its values as attributes and in its message."""
    storage = StorageError("/ssd/blocks-0", 4096, 5)
    assert "/ssd/blocks-0 at byte 4096: EIO" in str(storage)
    assert storage.errno == 5
    short = ShortTransferError("/ssd/blocks-0", 0, 100, 60)
    assert "60 of 100 bytes" in str(short)
    assert "cuMemcpy failed with code 700" in str(DeviceError("cuMemcpy", 700))
    corrupt = CorruptBlockError("/ssd/blocks-0", 8192, [3, 4])
    assert "/ssd/blocks-0 at byte 8192: checksum mismatch (2 blocks)" in str(corrupt)
    assert corrupt.block_ids == (3, 4)
    assert "cuda is not available: no driver" in str(BackendUnavailableError("cuda", "no driver"))


@pytest.mark.parametrize(
    ("ratio", "threshold", "used", "left"),
    [(0.0, 0.5, 8, 5), (0.4, 0.5, 6, 2), (0.4, 0.5, 5, 5), (0.2, 0.5, 9, 5), (0.4, 1.0, 10, 10)],
)
def test_eviction_ahead_of_need_frees_what_is_over_and_a_batch_at_least(
    ratio: float, threshold: float, used: int, left: int
) -> None:
    """Eviction ahead of need frees what is above the threshold, but at least one batch.

    Up to the threshold nothing is evicted. A batch is the least part of the tier that one eviction
    frees (`evict_ratio`).
    """
    tiers = Residency({Tier.HOST: 10}, Eviction(evict_ratio=ratio, start_threshold=threshold))
    filled(tiers, Tier.HOST, *range(used))
    tiers.evict_ahead()
    assert tiers.counts(Tier.HOST).ready == left
    assert resident(tiers, *range(used)) == left


def test_positions_pick_their_values_out_of_an_array() -> None:
    """Positions select their values from an array with any offset, with or without gaps."""
    values = np.arange(100, 110)  # the values of positions 4 to 13
    assert Positions(6, 3).within(values, 4).tolist() == [102, 103, 104]
    gaps = Positions(6, 3, np.array([6, 9, 13]))
    assert gaps.within(values, 4).tolist() == [102, 105, 109]
