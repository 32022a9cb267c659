"""The queue of an actor: a lane per direction, turns between requests, and a bound."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flexkv.actors.mailbox import Mailbox
from flexkv.common.errors import InvariantError
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.front.layerwise import LayerProgress

READ, WRITE = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)


def transfer(op_id: int, owner: int, blocks: int = 4, route: Route = READ) -> Transfer:
    """Return a transfer of some blocks."""
    ids = np.arange(blocks)
    return Transfer(op_id, owner, route, ids, ids)


def test_requests_take_turns_piece_by_piece() -> None:
    """Requests take turns by pieces, so a small one behind a large one gets the second turn."""
    mailbox = Mailbox(8, [1])
    for op_id, owner in ((1, 1), (2, 1), (3, 2)):
        mailbox.put(transfer(op_id, owner))
    order = []
    while (taken := mailbox.inbound.take(2, room_bytes=8)) is not None:
        order.append(taken[0].transfer.op_id)
    assert order == [1, 3, 1, 3, 2, 2]


def test_directions_have_lanes_of_their_own() -> None:
    """Inbound and outbound transfers wait in separate lanes."""
    mailbox = Mailbox(8, [1])
    mailbox.put(transfer(1, 1, route=WRITE))
    mailbox.put(transfer(2, 1, route=READ))
    for lane, op_id in ((mailbox.inbound, 2), (mailbox.outbound, 1)):
        taken = lane.take(8, room_bytes=8)
        assert taken is not None
        assert taken[0].transfer.op_id == op_id


def test_a_waiting_transfer_can_be_taken_out() -> None:
    """A recall removes one transfer and leaves its owner's others."""
    mailbox = Mailbox(8, [1])
    mailbox.put(transfer(1, 1))
    mailbox.put(transfer(2, 1))
    cursor = mailbox.find(1)
    assert cursor is not None
    mailbox.inbound.remove(cursor)
    assert cursor.over
    taken = mailbox.inbound.take(8, room_bytes=8)
    assert taken is not None
    assert taken[0].transfer.op_id == 2


def test_what_does_not_fit_the_room_waits() -> None:
    """A piece larger than the room is not handed out, and keeps its turn."""
    mailbox = Mailbox(8, [1])
    mailbox.put(transfer(1, 1))
    assert mailbox.inbound.take(4, room_bytes=3) is None
    assert mailbox.inbound.take(4, room_bytes=4) is not None
    assert mailbox.inbound.take(4, room_bytes=4) is None


def test_a_full_mailbox_is_an_invariant_error() -> None:
    """A full mailbox raises InvariantError, since admission bounds what arrives."""
    mailbox = Mailbox(1, [1])
    mailbox.put(transfer(1, 1))
    with pytest.raises(InvariantError):
        mailbox.put(transfer(2, 1))


def test_requests_take_turns_layer_by_layer() -> None:
    """All transfers of a layerwise request move one layer before any of them moves the next.

    Another layerwise request gets every other turn.
    """
    mailbox = Mailbox(8, [1])
    for op_id, owner in ((1, 1), (2, 1), (3, 2)):
        watched = msgspec.structs.replace(transfer(op_id, owner), watch=LayerProgress(4, 4))
        mailbox.put(watched)
    order = []
    while (taken := mailbox.inbound.take(1, room_bytes=8)) is not None:
        cursor, layer, count = taken
        order += [(cursor.transfer.op_id, layer)] * count
    of_first = [each for each in order if each[0] != 3]
    assert of_first == [(op_id, layer) for layer in range(4) for op_id in (1, 2)]
    assert [each[0] == 3 for each in order] == [False, True] * 4 + [False] * 4
