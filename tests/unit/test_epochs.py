"""The epochs of an instance tell the requests for its devices from those for earlier ones."""

from __future__ import annotations

import numpy as np

from flexkv.common.terms import Route, Tier, Transfer
from flexkv.links.framing import LENGTH_BYTES
from flexkv.server.fleet import FleetPort
from flexkv.server.wire import FROM_SERVER, State, framed, understood
from tests.property.fleet_model import ONE_RANK, Rank, Wire

ORDER = "kv tokens heads dim"
TO_DEVICE = Route(Tier.HOST, Tier.DEVICE)


def test_an_agent_is_told_the_group_of_a_copy() -> None:
    """A transfer keeps its KV group on its way to the agents of an instance."""
    fleet, rank, ids = FleetPort(ONE_RANK.spaces(16) * 2, 16), Rank(0, 8), np.arange(2)
    fleet.join(0, 0, rank.port, ORDER)
    fleet.attach(0, Wire())
    device_ids = fleet.ids_of(fleet.instances[0], ids)
    fleet.submit(Transfer(1, 1, TO_DEVICE, ids, device_ids, group=1))
    assert [copy.group for copy in rank.wire.asked.values()] == [1]


def test_epochs_never_return_and_messages_carry_them() -> None:
    """No epoch comes twice, or is 0, which a client has before it is told of one."""
    fleet, told = FleetPort(ONE_RANK.spaces(16), 16), []
    fleet.join(0, 0, Rank(0, 8).port, ORDER)
    for _ in range(4):
        fleet.attach(0, Wire())
        epoch = fleet.instances[0].epoch
        assert epoch is not None
        state = understood(FROM_SERVER, framed(State(True, 8, ORDER, epoch))[LENGTH_BYTES:])
        assert isinstance(state, State)
        told.append(state.epoch)
        fleet.detach(0)
    assert len({0, *told}) == 5
