"""The port to other nodes keeps its promises over each transport: own TCP, Mooncake, and both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import (
    ClosedError,
    CorruptBlockError,
    InvariantError,
    MissingBlockError,
    PeerError,
)
from flexkv.io.peer.transport import Part
from tests.cluster_rigs import keys_of
from tests.peer_contract_rig import (
    BLOCK_BYTES,
    BLOCKS,
    HOLDER,
    LEAF_BYTES,
    LEAVES,
    RATIO,
    STALL_S,
    Rig,
    rig_over,
)

KEYS = keys_of(1, LEAVES)
TARGETS = np.random.default_rng(0).permutation(BLOCKS)[:LEAVES]


@pytest.fixture(params=["tcp", "mooncake", "preferred"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Yield a port; afterwards nothing of it may be left."""
    async with rig_over(request.param) as made:
        yield made


def untouched(rig: Rig, before: NDArray[np.uint8], filled: NDArray[np.int64]) -> bool:
    """Return whether host memory is as it was, but for some blocks."""
    others = np.setdiff1d(np.arange(BLOCKS), filled)
    return np.array_equal(rig.ours.arena.array[others], before[others])


async def test_what_arrives_is_right(rig: Rig) -> None:
    """Blocks of several transfers come to their places, with sums, and nothing else changes."""
    rig.owner.put(KEYS)
    before = rig.ours.arena.array.copy()
    first, rest = TARGETS[:20], TARGETS[20:]
    ends = await rig.run(rig.transfer(KEYS, 0, first), rig.transfer(KEYS, 20, rest))
    assert [(end.error, end.filled) for end in ends] == [(None, 20), (None, LEAVES - 20)]
    assert rig.is_right(np.arange(LEAVES), TARGETS)
    assert np.array_equal(rig.ours.host.sums[TARGETS], rig.theirs.host.sums[:LEAVES])
    assert untouched(rig, before, TARGETS)
    assert np.array_equal(rig.ours.arena.array[:, BLOCK_BYTES:], before[:, BLOCK_BYTES:])
    assert not rig.owner.holds
    if rig.has_movers:
        assert rig.mooncake.counts.blocks == LEAVES


async def test_leaves_come_by_the_positions_of_their_parents(rig: Rig) -> None:
    """Of another KV group, blocks are read at every so many positions; one that lacks ends it."""
    keys = keys_of(2, 16)
    for number, position in enumerate((3, 7, 11)):
        own = keys[16 * (position + 1) : 16 * (position + 2)]
        rig.owner.host[own] = LEAVES + number
    (end,) = await rig.run(rig.transfer(keys, 3, TARGETS[:4], group=1))
    assert (end.filled, type(end.error)) == (3, MissingBlockError)
    assert rig.is_right(LEAVES + np.arange(3), TARGETS[:3], LEAF_BYTES)
    assert RATIO == 4


async def test_what_the_holder_has_no_longer_is_missing(rig: Rig) -> None:
    """The blocks before those that are gone come; the transfer ends as a miss."""
    rig.owner.put(KEYS, 0, 5)
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:8]))
    assert (end.filled, type(end.error)) == (5, MissingBlockError)
    assert rig.is_right(np.arange(5), TARGETS[:5])
    assert rig.port.counts[HOLDER]["missing"] == 1


async def test_a_busy_holder_is_asked_again_for_a_while(rig: Rig) -> None:
    """A holder that is busy for a moment delays a transfer; one that stays busy fails it."""
    rig.owner.put(KEYS)
    rig.busy = 2
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:8]))
    assert (end.error, end.filled) == (None, 8)
    rig.busy = 1 << 30
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:8]))
    assert isinstance(end.error, PeerError)
    assert end.error.is_busy


async def test_blocks_with_other_sums_are_not_believed(rig: Rig) -> None:
    """Only the blocks before the first one with a wrong sum count."""
    rig.owner.put(KEYS)
    rig.theirs.arena.array[6, 100] ^= 1
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:10]))
    if rig.kind == "mooncake":
        assert end.filled == 6
    assert end.filled <= 6
    assert isinstance(end.error, CorruptBlockError)
    assert rig.is_right(np.arange(end.filled), TARGETS[: end.filled])
    assert rig.port.counts[HOLDER]["wrong"] == 1


INTACT, WANTED = 3, 8
"""How many of the blocks that are read stay as they are, and how many are read."""


def reuse(rig: Rig) -> None:
    """Clear the owner, and fill the places of most blocks with others, unless they are held."""
    rig.grants.clear()
    free = [at for at in range(INTACT, LEAVES) if not rig.owner.holds[at]]
    rig.theirs.arena.array[free] ^= 0x5A
    rig.theirs.host.sums[free] ^= 1


@pytest.mark.parametrize("is_reading", [False, True])
async def test_blocks_whose_places_are_used_again_are_not_believed(
    rig: Rig, is_reading: bool
) -> None:
    """A clear of the owner ends its grants, and places may have other blocks at any moment then.

    Mooncake's owner does not know who reads its memory: the sums that came with the grant decide.
    Over own connections, the blocks of a read that is under way stay in their places.
    """
    rig.owner.put(KEYS)
    await rig.run(rig.transfer(KEYS, 20, TARGETS[20:21]))  # their connection is open
    old, before, reads = rig.theirs.arena.array.copy(), rig.ours.arena.array.copy(), rig.reads
    if is_reading:
        rig.hush()
        rig.port.submit(rig.transfer(KEYS, 0, TARGETS[:WANTED]))
        await rig.until_reading(reads)
        reuse(rig)
        rig.speak()
        (end,) = await rig.ends(1)
    else:
        rig.on_grant = lambda: reuse(rig)
        (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:WANTED]))
    came = rig.ours.arena.array[TARGETS[: end.filled], :BLOCK_BYTES]
    assert np.array_equal(came, old[: end.filled, :BLOCK_BYTES])
    if rig.kind == "tcp" and is_reading:
        assert (end.error, end.filled) == (None, WANTED)
    else:
        assert isinstance(end.error, CorruptBlockError | PeerError)
        assert end.filled <= INTACT
    if rig.kind == "mooncake" and not is_reading:
        assert (type(end.error), end.filled) == (CorruptBlockError, INTACT)
    assert untouched(rig, before, TARGETS[:WANTED])
    assert not rig.owner.holds


async def test_a_holder_that_is_gone_fails_at_once(rig: Rig) -> None:
    """A holder that cannot be asked is the reason of the failure, and nothing changes."""
    rig.owner.put(KEYS)
    before = rig.ours.arena.array.copy()
    rig.is_gone = True
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:8]))
    assert (end.filled, type(end.error)) == (0, PeerError)
    assert untouched(rig, before, TARGETS[:0])


@pytest.mark.parametrize("fault", ["cut", "hush"])
async def test_a_holder_that_fails_ends_reads_in_bounded_time(rig: Rig, fault: str) -> None:
    """Cut off or silent after its grant: the transfer fails, what follows works once it is back.

    What the holder sends afterwards changes nothing.
    """
    rig.owner.put(KEYS)
    if fault == "cut" and rig.has_movers:
        await rig.run(rig.transfer(KEYS, 0, TARGETS[:1]))  # their connection is open
    getattr(rig, fault)()
    begun_s = asyncio.get_running_loop().time()
    (end,) = await rig.run(rig.transfer(KEYS, 8, TARGETS[8:40]))
    assert (end.filled, type(end.error)) == (0, PeerError)
    assert asyncio.get_running_loop().time() - begun_s < 2 * STALL_S + 1
    after = rig.ours.arena.array.copy()
    assert fault == "hush" or not rig.owner.holds
    rig.speak()
    await rig.until_works(KEYS, TARGETS[:8])
    assert untouched(rig, after, TARGETS[:8])


async def test_a_stop_ends_what_is_under_way(rig: Rig) -> None:
    """After `stop` all transfers end soon, though the holder is silent, and new ones fail."""
    rig.owner.put(KEYS)
    rig.hush()
    rig.port.submit(rig.transfer(KEYS, 0, TARGETS[:8]))
    for _ in range(20):
        await asyncio.sleep(0)
    rig.port.stop()
    begun_s = asyncio.get_running_loop().time()
    (end,) = await rig.ends(1)
    assert isinstance(end.error, PeerError)
    assert asyncio.get_running_loop().time() - begun_s < STALL_S / 2
    (end,) = await rig.run(rig.transfer(KEYS, 0, TARGETS[:8]))
    assert "is being closed" in str(end.error)


async def test_a_cancelled_read_writes_nothing_any_more(rig: Rig) -> None:
    """When a fetch is cancelled, host memory stays as it is, whatever the holder sends later."""
    rig.owner.put(KEYS)
    await rig.until_works(KEYS, TARGETS[:1])
    rig.hush()
    grant = await rig.want(HOLDER, rig.wish(KEYS, 8, 16, rig.has_movers))
    part = Part(HOLDER, grant.number, 8, TARGETS[8:16], 0, 0, grant.places)
    task = asyncio.ensure_future(rig.transport.fetch(part))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    after = rig.ours.arena.array.copy()
    rig.release(HOLDER, grant.number)
    rig.speak()
    await rig.until_works(KEYS, TARGETS[:8])
    assert untouched(rig, after, TARGETS[:8])


async def test_a_closed_port_takes_nothing(rig: Rig) -> None:
    """`close` is idempotent; an end that nobody has reaped by then is a mistake of the caller."""
    rig.owner.put(KEYS)
    rig.port.submit(rig.transfer(KEYS, 0, TARGETS[:8]))
    await rig.until_ended()
    with pytest.raises(InvariantError, match="1 transfers unreaped"):
        rig.port.close()
    rig.port.close()
    with pytest.raises(ClosedError):
        rig.port.submit(rig.transfer(KEYS, 0, TARGETS[:8]))
