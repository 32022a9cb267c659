"""The law of the transfer port, over the fake and every real adapter alike."""

import asyncio
import os
from collections.abc import Iterator

import numpy as np
import pytest
from rigs import HOST_BLOCKS, OUTER_BLOCKS, PATIENCE_S, RIGS, Rig

from flexkv.common.errors import ClosedError, InvariantError
from flexkv.io.ports import Completion

DURABLE = [name for name in RIGS if not name.startswith(("cpu", "cuda", "ranks", "summed"))]


def open_fds():
    """Give what every descriptor of this process refers to, except the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
async def rig(request, tmp_path) -> Iterator[Rig]:
    """Give a connected rig of the kind that the test names, and close it after."""
    rig = RIGS[request.param](tmp_path)
    rig.connect()
    yield rig
    rig.close()


every_rig = pytest.mark.parametrize("rig", RIGS, indirect=True)
every_maker = pytest.mark.parametrize("make", RIGS.values(), ids=RIGS.keys())


def distinct(seed, pool_blocks, wanted):
    """Give `wanted` different ids of a pool, some of them neighbours."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(pool_blocks)[:wanted]
    ids[: wanted // 2].sort()
    return ids


@every_rig
@pytest.mark.parametrize("seed", range(3))
async def test_bytes_come_back(rig, seed):
    """Random blocks that went out and came back elsewhere are the same; no other byte changed."""
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
    """Blocks that are contiguous on both ends, which are moved as one, are the same bytes."""
    rig.host[:] = np.random.default_rng(5).integers(0, 256, rig.host.shape, np.uint8)
    sent = rig.host.copy()
    ids = np.arange(HOST_BLOCKS)
    await rig.run(rig.transfer(False, ids, ids + 3))
    rig.host[:] = 0
    await rig.run(rig.transfer(True, ids + 3, ids))
    assert np.array_equal(rig.host, sent)


@every_rig
async def test_many_in_flight_end_once_each(rig):
    """Of many transfers at once, each token is reaped exactly once and nothing else is."""
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
    """What `reap` does not give right after `submit` is announced by a wake on the loop."""
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
    """Ids outside a pool, or that do not pair up, start nothing and say that it is our mistake."""
    with pytest.raises(InvariantError):
        rig.port.submit(rig.transfer(to_host, source_ids, target_ids))
    assert rig.port.reap() == []


@every_rig
async def test_block_bytes_are_what_moves(rig):
    """The port tells how many bytes it moves for one block."""
    assert rig.port.block_bytes == rig.host.shape[1]


@every_maker
async def test_a_closed_port_takes_nothing(make, tmp_path):
    """After close, submit says so; closing again does nothing."""
    rig = make(tmp_path)
    rig.connect()
    rig.close()
    with pytest.raises(ClosedError):
        rig.port.submit(rig.transfer(False, [0], [0]))
    rig.port.close()


@every_maker
async def test_close_gives_every_descriptor_back(make, tmp_path):
    """Between opening and closing a port that worked, no file descriptor is left over."""
    before = open_fds()
    rig = make(tmp_path)
    rig.connect()
    await rig.run(rig.transfer(False, [3, 4, 9], [1, 2, 30]))
    rig.close()
    assert open_fds() == before


@every_maker
async def test_close_with_work_unreaped_is_our_mistake(make, tmp_path):
    """Closing under a transfer that nobody reaped raises, and still gives everything back."""
    before = open_fds()
    rig = make(tmp_path)
    rig.connect()
    rig.port.submit(rig.transfer(False, range(40), range(40)))
    with pytest.raises(InvariantError, match="unreaped"):
        rig.close()
    assert open_fds() == before


@pytest.mark.parametrize("rig", DURABLE, indirect=True)
async def test_sync_returns(rig):
    """What was written can be made durable."""
    await rig.run(rig.transfer(False, [3, 4, 9], [1, 2, 30]))
    async with asyncio.timeout(PATIENCE_S):
        await rig.port.sync()
