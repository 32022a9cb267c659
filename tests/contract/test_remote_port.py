"""The contract of the remote tier's port, checked over every real store."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from flexkv.common.errors import (
    ClosedError,
    CorruptBlockError,
    InvariantError,
    MissingBlockError,
)
from flexkv.common.terms import BlockNames, Positions
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.io.ports import Completion
from flexkv.io.remote.open import join_pool
from flexkv.io.remote.seal import SEAL_BYTES
from tests.remote_rigs import (
    BLOCK_BYTES,
    HOST_BLOCKS,
    OPTIONS,
    POOL,
    PROMPT,
    RECORD_BYTES,
    SPAN_BLOCKS,
    STORES,
    MakeStore,
    PortRig,
    content,
    fetched,
    names_in,
    rig_over,
    span_key,
)
from tests.servers import Servers

G = SPAN_BLOCKS
SPAN_BYTES = G * RECORD_BYTES


@pytest.fixture(params=STORES.values(), ids=STORES.keys())
async def rig(
    request: pytest.FixtureRequest, tmp_path: Path, servers: Servers
) -> AsyncIterator[PortRig]:
    """Yield a port over each store, whose pool is described and empty."""
    make: MakeStore = request.param
    store = make(tmp_path, servers, OPTIONS)
    await join_pool(store, POOL)
    async with rig_over(store) as made:
        yield made


async def changed(rig: PortRig, span: int, change: Callable[[bytearray], object]) -> None:
    """Replace the object of a span by one with other bytes."""
    store, name = rig.requests.store, POOL.object_name(span_key(span))
    body = bytearray(await store.read(name))
    change(body)
    await store.delete(name)
    await store.put(name, [bytes(body)])


async def names_of(rig: PortRig) -> set[str]:
    """Return the names of the spans in the store."""
    return await names_in(rig.requests.store)


async def test_what_was_put_comes_back(rig: PortRig) -> None:
    """Any range of the prompt arrives by its keys, byte for byte, and nothing beside it changes."""
    await rig.store_spans(0, 1, 2)
    for first, last in ((0, 3 * G), (1, G + 1), (G, 2 * G), (G + 1, G + 2), (2, 3 * G - 1)):
        rig.arena.array[:] = 0xEE
        (end,) = await rig.run(rig.get(first, last, at=3))
        assert end == Completion(end.op_id, None)
        assert all(rig.right(first, last, at=3))
        untouched = [*range(3), *range(3 + last - first, HOST_BLOCKS)]
        assert (rig.arena.array[untouched] == 0xEE).all()
        assert (rig.arena.array[3 : 3 + last - first, BLOCK_BYTES[0] :] == 0xEE).all()


async def test_every_block_that_arrives_has_its_sum(rig: PortRig) -> None:
    """The sums of what arrived are those that were stored; no other sum changes."""
    await rig.store_spans(0)
    stored = rig.sums[HOST_BLOCKS - G :].copy()
    before = rig.sums.copy()
    await rig.run(rig.get(1, G, at=5))
    assert stored.all()
    assert np.array_equal(rig.sums[5 : 5 + G - 1], stored[1:])
    before[5 : 5 + G - 1] = stored[1:]
    assert np.array_equal(rig.sums, before)


async def test_an_object_is_records_of_block_and_seal(rig: PortRig) -> None:
    """A span is one object under its key: the blocks in turn, each with a seal behind it."""
    await rig.store_spans(1)
    name = POOL.object_name(span_key(1))
    assert await names_of(rig) == {name}
    body = await fetched(rig.requests.store, name, 0, SPAN_BYTES + 1)
    assert len(body) == SPAN_BYTES
    for number in range(G):
        record = body[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        assert record[: BLOCK_BYTES[0]] == content(G + number).tobytes()
        at = 16 * (G + number)
        assert PROMPT[at : at + 16] in record[BLOCK_BYTES[0] :]
        assert PROMPT[at + 16 : at + 32] in record[BLOCK_BYTES[0] :]


async def test_many_transfers_end_once_each(rig: PortRig) -> None:
    """Gets and puts that are submitted at once all end well, each once."""
    await rig.store_spans(0, 1)
    blocks = [(2 * G + number, 30 + number) for number in range(G)]
    await rig.fill(*blocks)
    transfers = [rig.get(first, first + 5, at=5 * first) for first in range(4)]
    ends = await rig.run(rig.put(2, at=30), *transfers, rig.get(0, 2 * G, at=20))
    assert [end.error for end in ends] == [None] * 6
    assert all(all(rig.right(first, first + 5, at=5 * first)) for first in range(4))
    assert rig.port.reap() == []
    assert len(await names_of(rig)) == 3


async def test_nothing_to_move_ends_well(rig: PortRig) -> None:
    """A transfer of no blocks ends like any other."""
    transfer = rig.get(0, 0)
    assert await rig.run(transfer) == [Completion(transfer.op_id, None)]


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_missing_span_ends_a_transfer_in_part(rig: PortRig, lost: int) -> None:
    """The blocks before it are filled; it is told to be missing, and the tier is not blamed."""
    await rig.store_spans(*({0, 1, 2} - {lost}))
    rig.news.clear()
    (end,) = await rig.run(rig.get(1, 3 * G))
    assert isinstance(end.error, MissingBlockError)
    assert not end.error.blames_tier
    assert end.filled == max(0, lost * G - 1)
    assert all(rig.right(1, 1 + end.filled))
    assert [key for told, key in rig.news if told == "missing"] == [span_key(lost)]
    assert rig.requests.counts().missing == 1


async def test_what_is_there_is_told(rig: PortRig) -> None:
    """A span is noted when it was put, when it was there already, and when it was read."""
    await rig.store_spans(0)
    assert rig.news == [("noted", span_key(0))]
    await rig.store_spans(0)
    await rig.run(rig.get(1, 2))
    assert rig.news == [("noted", span_key(0))] * 3
    counts = rig.requests.counts()
    assert (counts.existing, counts.written_bytes) == (1, SPAN_BYTES)


@pytest.mark.parametrize(
    ("at", "filled"),
    [
        (0, 0),
        (2 * RECORD_BYTES + 9, 2),
        (RECORD_BYTES - 1, 0),
        (RECORD_BYTES - SEAL_BYTES, 0),
        (2 * RECORD_BYTES - SEAL_BYTES + 5, 1),
        (2 * RECORD_BYTES - 20, 1),
        (SPAN_BYTES - 1, 3),
    ],
)
async def test_a_damaged_block_is_not_filled(rig: PortRig, at: int, filled: int) -> None:
    """A bit that differs, in a block or a seal, ends the transfer before that block.

    The object is deleted, because it was wrong twice in the same way, and counts as missing.
    """
    await rig.store_spans(0, 1)
    rig.news.clear()
    await changed(rig, 0, lambda body: body.__setitem__(at, body[at] ^ 16))
    (end,) = await rig.run(rig.get(0, 2 * G))
    assert isinstance(end.error, CorruptBlockError)
    assert not end.error.blames_tier
    assert end.error.block_ids == (500 + filled,)
    assert end.filled == filled
    assert all(rig.right(0, filled))
    assert ("missing", span_key(0)) in rig.news
    assert ("noted", span_key(0)) not in rig.news
    assert POOL.object_name(span_key(0)) not in await names_of(rig)
    assert (rig.requests.counts().wrong, rig.requests.counts().deleted) == (2, 1)
    await rig.store_spans(0)
    assert (await rig.run(rig.get(0, 2 * G)))[0].error is None


@pytest.mark.parametrize(
    ("left_bytes", "filled"),
    [(0, 0), (10, 0), (RECORD_BYTES, 1), (2 * RECORD_BYTES + 100, 2), (SPAN_BYTES - 1, 3)],
)
async def test_a_short_object_is_filled_as_far_as_it_goes(
    rig: PortRig, left_bytes: int, filled: int
) -> None:
    """The whole records of an object that ends too early arrive; it is deleted."""
    await rig.store_spans(0)
    if rig.port.adapter == "mooncake":
        left_bytes = max(1, left_bytes)  # it stores no empty objects
    await changed(rig, 0, lambda body: body.__delitem__(slice(left_bytes, None)))
    (end,) = await rig.run(rig.get(0, G))
    assert isinstance(end.error, CorruptBlockError)
    assert (end.filled, all(rig.right(0, filled))) == (filled, True)
    assert await names_of(rig) == set()


async def test_another_object_under_a_name_is_found_out(rig: PortRig) -> None:
    """A right object of other blocks fills nothing, though all its sums are right."""
    await rig.store_spans(0, 1)
    other = await rig.requests.store.read(POOL.object_name(span_key(1)))
    await changed(rig, 0, lambda body: body.__setitem__(slice(None), other))
    (end,) = await rig.run(rig.get(0, G))
    assert isinstance(end.error, CorruptBlockError)
    assert end.filled == 0


async def test_blocks_in_another_order_are_found_out(rig: PortRig) -> None:
    """Records that are right but at another record's place fill nothing from there on."""
    await rig.store_spans(0)

    def swap(body: bytearray) -> None:
        second, third = (
            slice(RECORD_BYTES, 2 * RECORD_BYTES),
            slice(2 * RECORD_BYTES, 3 * RECORD_BYTES),
        )
        body[second], body[third] = body[third], body[second]

    await changed(rig, 0, swap)
    (end,) = await rig.run(rig.get(0, G))
    assert (type(end.error), end.filled) == (CorruptBlockError, 1)


async def test_two_writers_of_a_span_make_one_object(rig: PortRig) -> None:
    """Of two puts at once one creates the object, and both succeed."""
    await rig.fill(*((number, 10 * part + number) for part in (0, 1) for number in range(G)))
    ends = await rig.run(rig.put(0, at=0), rig.put(0, at=10))
    assert [end.error for end in ends] == [None, None]
    assert len(await names_of(rig)) == 1
    assert rig.requests.counts().existing == 1
    rig.arena.array[:] = 0
    await rig.run(rig.get(0, G))
    assert all(rig.right(0, G))


async def test_leaves_are_objects_of_their_own(rig: PortRig) -> None:
    """Blocks of another group come back by their keys, one object each, with their own size."""
    positions = [1, 4, 7]
    await rig.fill(*((at, 10 + number) for number, at in enumerate(positions)), group=1)
    (end,) = await rig.run(rig.leaves(positions, to_host=False, at=10))
    assert end.error is None
    keys = block_keys(leaf_keys(PROMPT, 1))
    assert await names_of(rig) == {POOL.object_name(keys[at]) for at in positions}
    rig.arena.array[:] = 0
    (end,) = await rig.run(rig.leaves([1, 4, 6, 7], to_host=True))
    assert isinstance(end.error, MissingBlockError)
    assert end.filled == 2
    for place, position in enumerate((1, 4)):
        assert all(rig.right(position, position + 1, at=place, group=1))
    assert ("missing", keys[6]) in rig.news


async def test_a_transfer_that_makes_no_sense_is_refused(rig: PortRig) -> None:
    """Wrong ids, a put of part of a span, and unknown keys raise InvariantError; nothing starts."""
    get, put = rig.get(0, G), rig.put(0)
    for wrong in (
        replace(get, target_ids=get.target_ids + HOST_BLOCKS),
        replace(get, target_ids=get.target_ids - 1),
        replace(get, source_ids=get.source_ids[1:]),
        replace(get, names=None),
        replace(get, names=BlockNames(PROMPT[: 16 * G], Positions(0, G))),
        replace(get, names=BlockNames(PROMPT, Positions(0, G, np.array([0, 1, 3, 4])))),
        put.part(0, G - 1),
        put.part(1, G),
    ):
        with pytest.raises(InvariantError):
            rig.port.submit(wrong)
    assert rig.port.reap() == []
    assert not rig.tasks


async def test_block_bytes_are_a_whole_place(rig: PortRig) -> None:
    """`block_bytes` is the stride, and the adapter names the kind of store."""
    assert rig.port.block_bytes == rig.arena.array.shape[1]
    assert rig.port.adapter in STORES
    await rig.port.sync()


def open_fds() -> set[str]:
    """Return the targets of this process's descriptors, but for sockets: obstore keeps some."""
    return {
        target
        for each in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{each}")
        for target in [os.readlink(f"/proc/self/fd/{each}")]
        if not target.startswith("socket:")
    }


@pytest.mark.parametrize("make", STORES.values(), ids=STORES.keys())
async def test_a_closed_port_takes_nothing_and_holds_nothing(
    make: MakeStore, tmp_path: Path, servers: Servers
) -> None:
    """After close, submit and sync raise ClosedError; a second close does nothing."""
    first = PortRig(make(tmp_path, servers, OPTIONS))
    await first.store_spans(0)
    await first.close()
    before = open_fds()
    rig = PortRig(make(tmp_path, servers, OPTIONS))
    await rig.store_spans(1)
    await rig.close()
    with pytest.raises(ClosedError):
        rig.port.submit(rig.get(0, 1))
    with pytest.raises(ClosedError):
        await rig.port.sync()
    rig.port.close()
    assert open_fds() <= before


@pytest.mark.parametrize("make", STORES.values(), ids=STORES.keys())
async def test_nothing_writes_to_the_arena_after_close(
    make: MakeStore, tmp_path: Path, servers: Servers
) -> None:
    """A close with gets in flight raises InvariantError, and nothing arrives any more."""
    rig = PortRig(make(tmp_path, servers, OPTIONS))
    await rig.store_spans(0, 1, 2)
    rig.port.submit(rig.get(0, 3 * G))
    await asyncio.sleep(0)
    with pytest.raises(InvariantError, match="1 transfers unreaped"):
        rig.port.close()
    rig.arena.array[:] = 0xEE
    await asyncio.wait(rig.tasks)
    assert all(task.cancelled() for task in rig.tasks[-3:])
    assert (rig.arena.array == 0xEE).all()
    rig.tasks.clear()
    gc.collect()  # the tasks were cancelled, and their tracebacks hold on to the arena
    await rig.close()
