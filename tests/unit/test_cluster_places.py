"""Grants say where their blocks are for a TransferEngine, if the reader asks for that."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flexkv.cluster.grants import Grants
from flexkv.cluster.wire import (
    FRAMING,
    FROM_OWNER,
    TO_OWNER,
    WANT_BLOCKS_MAX,
    Grant,
    GrantedPlaces,
    Want,
    framed,
)
from flexkv.common.errors import PeerError
from flexkv.common.terms import BlockIds
from flexkv.tiers.peer_transport import places_of
from tests.unit.grants_rig import A, Rig, with_grants
from tests.unit.scripted_owner import KEYS, Reading, reading


def located(block_ids: BlockIds) -> GrantedPlaces:
    """Return places that tell which blocks were asked for."""
    addresses = np.where(block_ids < 0, -1, block_ids * 100)
    sums = bytes(8 * len(block_ids))
    return GrantedPlaces("192.0.2.1:7", addresses.astype("<i8").tobytes(), sums)


def test_places_come_with_what_is_granted_if_they_are_asked() -> None:
    """Nobody else gets them; an owner whose engine does not run has none."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 8)
        rig.grants = Grants(rig.owner, rig.grants._limits, rig.supervisor.spawn, located)
        for number, asks in ((1, True), (2, False)):
            rig.grants.want(A, Want(number, keys, 2, 8, 0, 0, asks), rig.answers.append)
        assert rig.answers == [
            Grant(1, 2, 6, False, located(np.arange(2, 8))),
            Grant(2, 2, 6, False, None),
        ]
        rig.grants._locate = lambda _: None
        rig.grants.want(A, Want(4, keys, 2, 8, 0, 0, True), rig.answers.append)
        assert rig.answers[-1] == Grant(4, 2, 6, False, None)

    with_grants(work)


@pytest.mark.parametrize(
    ("asks", "addresses", "sums"), [(False, 16, 16), (True, 8, 16), (True, 16, 24), (True, 0, 0)]
)
def test_places_that_do_not_fit_end_the_link(asks: bool, addresses: int, sums: int) -> None:
    """Places that were not asked, or not one for each block, are an answer to nothing."""

    async def work(rig: Reading) -> None:
        places = GrantedPlaces("192.0.2.1:7", bytes(addresses), bytes(sums))
        rig.owner.answer = lambda message: [Grant(message.number, 2, 2, False, places)]
        with pytest.raises(PeerError, match="that answers nothing"):
            await rig.peers.want(1, KEYS, 2, 4, 0, asks)
        assert not rig.peers.is_up(1)

    reading(work)


def test_places_are_read_as_they_were_sent() -> None:
    """Addresses and sums of the longest grant fit in a frame, and come with a time limit."""

    async def work(rig: Reading) -> None:
        addresses = np.arange(-1, WANT_BLOCKS_MAX - 1)
        sums = np.arange(WANT_BLOCKS_MAX, dtype="<u8") * 3
        places = GrantedPlaces("e" * 512, addresses.astype("<i8").tobytes(), sums.tobytes())
        grant = Grant((1 << 63) - 1, 0, WANT_BLOCKS_MAX, True, places)
        told = FROM_OWNER.decode(framed(grant)[FRAMING.head_bytes :])
        assert told == grant
        found = places_of(grant, 15.0)
        assert found is not None
        assert found.until_s == rig.now_s + 15.0
        some = found.at(4, 3, 2)
        assert some.addresses.tolist() == [3, 5, 7]
        assert some.sums.tolist() == [12, 18, 24]
        assert places_of(Grant(1, 0, 4), 15.0) is None

    reading(work)


def test_nodes_without_places_understand_each_other() -> None:
    """Messages of nodes that do not know of places have these fields left out."""
    old = msgspec.msgpack.encode(["grant", 7, 0, 4, False])
    assert FROM_OWNER.decode(old) == Grant(7, 0, 4)
    old = msgspec.msgpack.encode(["want", 7, b"k" * 32, 0, 1, 0, 0])
    assert TO_OWNER.decode(old) == Want(7, b"k" * 32, 0, 1)
