"""Which bytes of host memory go over a data connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from flexkv.io.memory.arena import Arena
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.frames import Read, Status
from flexkv.io.peer.sender import Granted
from flexkv.io.peer.sockets import SocketRing
from flexkv.tiers.out_rate import OutRate
from flexkv.tiers.peer_sending import BlockSending
from tests.unit.grants_rig import A, B, Rig, with_grants

BLOCKS, STRIDE_BYTES = 16, 8192
SIZES = 8192, 4096, 6000
"""The bytes of a block of each KV group."""
NO_RING = cast("SocketRing", None)
UNBOUNDED = OutRate(None, SIZES, lambda: 0.0)


@pytest.fixture
def host() -> Iterator[HostBlocks]:
    """Yield host memory."""
    arena = Arena.open(BLOCKS, STRIDE_BYTES)
    yield HostBlocks(arena, np.arange(BLOCKS).astype(np.uint64), SIZES)
    assert arena.close()


def test_a_read_gets_blocks_of_its_grants_group_and_of_no_other_size(host: HostBlocks) -> None:
    """A read that names the size of another group's blocks, or a wrong one, is refused."""

    async def work(rig: Rig) -> None:
        sending = BlockSending(NO_RING, host, rig.grants, 1.0, UNBOUNDED)
        keys = rig.stored(1, 8)
        for group, size in enumerate(SIZES):
            number = rig.want(A, keys, 0, 4, group)
            for other in (*SIZES, 1, size - 1, size + 1, STRIDE_BYTES + 1):
                found = sending.lookup(A, Read(number, 1, 2, other))
                if other != size:
                    assert found is Status.OTHER_SIZE
                    continue
                assert isinstance(found, Granted)
                assert (found.addresses - host.arena.address).tolist() == [8192, 16384]
                assert found.sums.tolist() == [1, 2]
                found.ended()
            assert sending.lookup(B, Read(number, 1, 2, size)) is Status.NO_GRANT
            assert sending.lookup(A, Read(number, 3, 2, size)) is Status.NOT_GRANTED
            rig.grants.release(A, number)
            assert sending.lookup(A, Read(number, 1, 2, size)) is Status.NO_GRANT
        assert sending.lent_bytes == 2 * sum(SIZES)
        assert rig.grants.counts.reads == len(SIZES)

    with_grants(work)


def test_nothing_is_read_of_a_want_that_waits_for_the_disk(host: HostBlocks) -> None:
    """A want that is not granted yet has no blocks, whatever size a read names."""

    async def work(rig: Rig) -> None:
        sending = BlockSending(NO_RING, host, rig.grants, 1.0, UNBOUNDED)
        keys = rig.stored(1, 8)
        rig.owner.host.popitem()
        rig.owner.put_on_disk(keys)
        number = rig.want(A, keys, 0, 8)
        assert not rig.answers
        for size in SIZES:
            assert sending.lookup(A, Read(number, 0, 1, size)) is Status.NO_GRANT

    with_grants(work)
