"""Which requests are planned again when their ops fail, and with which error the others end."""

from __future__ import annotations

import pytest
from msgspec import structs

from flexkv.actors.flight import Flight
from flexkv.actors.outcome import response_of
from flexkv.common.errors import MissingBlockError, TransferError, UnfilledError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Positions, Route, Tier
from flexkv.graph.ops import OpSpec, OpState
from flexkv.graph.planner import Planner
from flexkv.graph.run import CancelRun, LaunchRun, OpDone, OpFailed, OpOverdue
from flexkv.index.claims import Claim, Holding
from tests.unit.prompts import LIMITS, filled, request, residency
from tests.unit.test_far_prefixes import EVERY, KEYS, RULES, far_with, fill, index
from tests.unit.test_planner_leaves import leaf_blocks, moved

FAR, DISK, DEVICE, JOINED = "remote→host", "disk→host", "host→device", "joined"


def flight_with_all() -> Flight:
    """Return a get that copies from host memory, reads the SSD, joins a put, and fetches."""
    tiers, far = index({0: [0, 1]}), far_with(EVERY)
    fill(tiers, Tier.DISK, {0: [2, 3]})
    ids = tiers.reserve(Tier.HOST, KEYS, Positions(4, 1))
    tiers.claims.open(10**6, Claim(10**6, None, Holding(Tier.HOST, ids), Tier.DEVICE))
    made = request(Operation.GET, *range(8))
    made = structs.replace(made, leaves=leaf_blocks({g: at for g, at in EVERY.items() if g}))
    flight = Flight(made, Planner(tiers, LIMITS, far, RULES).plan(made, 1), 0, 0)
    assert flight.planned.found.last == 8
    flight.run.handle(LaunchRun())
    return flight


def op_on(flight: Flight, where: str) -> OpSpec:
    """Return an op that is in flight on a route, or a barrier."""
    return next(
        op
        for op in flight.plan.template.ops
        if (JOINED if op.route is None else str(op.route)) == where
        if flight.run.states[op.index] is OpState.IN_FLIGHT
    )


def fail(flight: Flight, where: str, overdue: bool = False) -> TransferError:
    """Fail an op, and return its error."""
    op = op_on(flight, where)
    kind = {FAR: MissingBlockError, JOINED: UnfilledError}.get(where, TransferError)
    error = kind(op.index, where, 1, "planted")
    flight.run.handle(OpOverdue(op.index, error) if overdue else OpFailed(op.index, error))
    return error


@pytest.mark.parametrize("overdue", [False, True])
@pytest.mark.parametrize(
    ("failing", "is_planned_again"),
    [
        ([], False),
        ([FAR], True),
        ([JOINED], True),
        ([FAR, DISK], True),
        ([DISK], False),
        ([DEVICE], False),
        ([FAR, DEVICE], False),
        ([DEVICE, FAR], False),
        ([JOINED, DEVICE], False),
    ],
    ids=str,
)
def test_only_what_another_plan_may_do_without_is_planned_again(
    failing: list[str], is_planned_again: bool, overdue: bool
) -> None:
    """Far blocks that fail, or another request's, may be done without; not so the device."""
    flight = flight_with_all()
    for where in failing:
        fail(flight, where, overdue and where == FAR)
    assert flight.may_be_planned_again is is_planned_again
    if overdue and FAR in failing:  # its op ends after the answer
        late = next(n for n, state in enumerate(flight.run.states) if state is OpState.OVERDUE)
        flight.run.handle(OpDone(late))
        assert flight.may_be_planned_again is is_planned_again
    flight.run.handle(CancelRun())
    assert not flight.may_be_planned_again


@pytest.mark.parametrize("failing", [[DEVICE, FAR], [FAR, DEVICE], [DEVICE], [JOINED, DEVICE]])
def test_a_get_whose_device_fails_ends_with_the_devices_error(failing: list[str]) -> None:
    """Whatever else has failed before, the response names what no other plan can mend."""
    flight = flight_with_all()
    errors = {where: fail(flight, where) for where in failing}
    while live := [n for n, state in enumerate(flight.run.states) if state is OpState.IN_FLIGHT]:
        flight.run.handle(OpDone(live[0]))
    response = response_of(flight.request, flight.planned, flight.run)
    assert (response.status, response.error) == (KVResponseStatus.FAILED, errors[DEVICE])
    assert not response.return_mask.any()


def test_without_far_blocks_a_load_of_one_group_brings_what_is_here() -> None:
    """A plan with `near` fetches nothing, and waits for nothing that others fetch."""
    tiers, far = residency(host=16), far_with({0: EVERY[0]})
    filled(tiers, Tier.HOST, 0, 1)
    planner, get = Planner(tiers, LIMITS, far), request(Operation.GET, *range(8))
    near = planner.plan(get, 1, near=True)
    assert (near.found.last, moved(near, Route(Tier.REMOTE, Tier.HOST))) == (2, {})
    fetching = planner.plan(get, 2)
    assert moved(fetching, Route(Tier.REMOTE, Tier.HOST)) == {0: [2, 3, 4, 5, 6, 7]}
    assert planner.plan(get, 3).found.pending is not None
    assert planner.plan(get, 4, near=True).found.last == 2
