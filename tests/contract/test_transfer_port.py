"""The contract of the transfer port, checked on the fake and on every real adapter."""

import asyncio
import os
from collections.abc import Iterator

import numpy as np
import pytest
from rigs import HOST_BLOCKS, OUTER_BLOCKS, PATIENCE_S, RIGS, Rig

from flexkv.common.errors import ClosedError, InvariantError
from flexkv.io.ports import Completion

DURABLE = [name for name in RIGS if not name.startswith(("cpu", "cuda", "ranks", "device"))]


def open_fds():
    """Return the target of every open descriptor of this process, except the listing's own."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
async def rig(request, tmp_path) -> Iterator[Rig]:
    """Yield a connected rig of the kind that the test names, and close it afterwards."""
    rig = RIGS[request.param](tmp_path)
    rig.connect()
    yield rig
    rig.close()


every_rig = pytest.mark.parametrize("rig", RIGS, indirect=True)
every_maker = pytest.mark.parametrize("make", RIGS.values(), ids=RIGS.keys())


def distinct(seed, pool_blocks, wanted):
    """Return `wanted` different ids of a pool; the first half is sorted, so some are neighbours."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(pool_blocks)[:wanted]
    ids[: wanted // 2].sort()
    return ids


@every_rig
@pytest.mark.parametrize("seed", range(3))
async def test_bytes_come_back(rig, seed):
    """Blocks that are copied out and back to other places are equal; no other byte changes."""
    rng = np.random.default_rng(seed)
    wanted = 20
    outer, left, right = (
        distinct(seed, OUTER_BLOCKS, wanted),
        distinct(seed + 10, HOST_BLOCKS, wanted),
        distinct(seed + 20, HOST_BLOCKS, wanted),
    )
    rig.host[:] = rng.integers(0, 256, rig.host.shape, np.uint8)
    sent = rig.host[left].copy()
    (out,) = await rig.run(rig.transfer(False, left, outer))
    rig.host[:] = rng.integers(0, 256, rig.host.shape, np.uint8)
    expected = rig.host.copy()
    expected[right] = sent
    (back,) = await rig.run(rig.transfer(True, outer, right))
    assert (out.error, back.error) == (None, None)
    assert np.array_equal(rig.host, expected)


@every_rig
async def test_neighbours_come_back(rig):
    """Blocks that are contiguous on both ends, and so moved as one run, come back equal."""
    rig.host[:] = np.random.default_rng(5).integers(0, 256, rig.host.shape, np.uint8)
    sent = rig.host.copy()
    ids = np.arange(HOST_BLOCKS)
    await rig.run(rig.transfer(False, ids, ids + 3))
    rig.host[:] = 0
    await rig.run(rig.transfer(True, ids + 3, ids))
    assert np.array_equal(rig.host, sent)


@every_rig
async def test_many_in_flight_end_once_each(rig):
    """Each of many concurrent transfers is reaped exactly once, and nothing else is."""
    blocks = 4
    transfers = [
        rig.transfer(False, np.arange(i, i + blocks), np.arange(i, i + blocks))
        for i in range(HOST_BLOCKS - blocks)
    ]
    ended = await rig.run(*transfers)
    assert sorted(ended) == [Completion(transfer.op_id, None) for transfer in transfers]
    assert rig.port.reap() == []


@every_rig
async def test_wake_announces_what_was_not_reaped_at_once(rig):
    """A completion that `reap` does not return right after `submit` is announced by a wake."""
    transfer = rig.transfer(False, [0, 5], [1, 7])
    rig.port.submit(transfer)
    ended = rig.port.reap()
    while not ended:
        async with asyncio.timeout(PATIENCE_S):
            await rig.woken.wait()
        rig.woken.clear()
        ended = rig.port.reap()
    assert ended == [Completion(transfer.op_id, None)]


@every_rig
async def test_nothing_to_move_ends_well(rig):
    """A transfer of no blocks ends like any other."""
    transfer = rig.transfer(True, [], [])
    assert await rig.run(transfer) == [Completion(transfer.op_id, None)]


@every_rig
@pytest.mark.parametrize(
    ("to_host", "source_ids", "target_ids"),
    [
        (True, [0, OUTER_BLOCKS], [0, 1]),
        (True, [0, 1], [0, HOST_BLOCKS]),
        (False, [HOST_BLOCKS], [0]),
        (False, [0], [OUTER_BLOCKS]),
        (False, [-1, 0], [0, 1]),
        (True, [0, 1], [-1, 0]),
        (True, [0, 1], [0]),
        (False, list(range(40)), list(range(39))),
    ],
)
async def test_wrong_ids_are_refused(rig, to_host, source_ids, target_ids):
    """Ids outside a pool, or of unequal count, raise InvariantError and start nothing."""
    with pytest.raises(InvariantError):
        rig.port.submit(rig.transfer(to_host, source_ids, target_ids))
    assert rig.port.reap() == []


@every_rig
async def test_block_bytes_are_what_moves(rig):
    """`block_bytes` is the number of bytes that the port moves for one block."""
    assert rig.port.block_bytes == rig.host.shape[1]


@every_maker
async def test_a_closed_port_takes_nothing(make, tmp_path):
    """Submitting to a closed port raises ClosedError; closing it again does nothing."""
    rig = make(tmp_path)
    rig.connect()
    rig.close()
    with pytest.raises(ClosedError):
        rig.port.submit(rig.transfer(False, [0], [0]))
    rig.port.close()


@every_maker
async def test_close_gives_every_descriptor_back(make, tmp_path):
    """A port that was opened, used and closed leaves no file descriptor open."""
    before = open_fds()
    rig = make(tmp_path)
    rig.connect()
    await rig.run(rig.transfer(False, [3, 4, 9], [1, 2, 30]))
    rig.close()
    assert open_fds() == before


@every_maker
async def test_close_with_work_unreaped_is_our_mistake(make, tmp_path):
    """Closing with an unreaped transfer raises InvariantError, and still releases everything."""
    before = open_fds()
    rig = make(tmp_path)
    rig.connect()
    rig.port.submit(rig.transfer(False, range(40), range(40)))
    with pytest.raises(InvariantError, match="unreaped"):
        rig.close()
    assert open_fds() == before


@pytest.mark.parametrize("rig", DURABLE, indirect=True)
async def test_sync_returns(rig):
    """Sync of a durable port returns once its writes are on stable storage."""
    await rig.run(rig.transfer(False, [3, 4, 9], [1, 2, 30]))
    async with asyncio.timeout(PATIENCE_S):
        await rig.port.sync()
