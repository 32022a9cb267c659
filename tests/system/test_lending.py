"""Blocks that other nodes read: which of them are lent, and that they stay where they are."""

from __future__ import annotations

import asyncio

import numpy as np

from flexkv.cluster.grants import Held
from flexkv.common.request import Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.lending import Lending

from .test_far import BLOCKS, Bench, on_bench

KEYS = BLOCK_KEY_BYTES


def lending(bench: Bench) -> Lending:
    """Return what lends the blocks of the bench's engine."""
    engine = bench.engine
    return Lending(engine._core, engine.requests, engine.clears, engine.tokens_per_block, ())


def pinned(bench: Bench) -> int:
    """Return how many host blocks may not be evicted."""
    return bench.engine.statistics().tiers["host"].pinned_blocks


def lent_keys(bench: Bench, lent: Held) -> list[bytes]:
    """Return the keys of the blocks that are lent."""
    keys = bench.engine.residency.keys_of(Tier.HOST, lent.block_ids)
    return [keys[at : at + KEYS] for at in range(0, len(keys), KEYS)]


def test_the_leading_blocks_that_host_memory_has_are_lent_and_stay() -> None:
    """Of blocks 1 to 8 of a prompt of which five are here, blocks 1 to 5 are lent, and pinned."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 5)
        lender, keys = lending(bench), bench.request().keys
        lent = lender.hold(keys, 1, 8)
        assert lent_keys(bench, lent) == bench.keys()[1:5]
        assert pinned(bench) == 4
        twice = lender.hold(keys, 3, 4)
        assert (lent_keys(bench, twice), pinned(bench)) == (bench.keys()[3:4], 4)
        lender.release(lent)
        assert pinned(bench) == 1
        lender.release(twice)
        assert pinned(bench) == 0

    on_bench(work)


def test_nothing_is_lent_of_what_is_not_here() -> None:
    """Unknown prompts, blocks behind the end, and empty ranges are lent as nothing."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 5)
        lender = lending(bench)
        for keys, first, last in [
            (bench.request(1).keys, 0, 8),
            (bench.request().keys, 5, 8),
            (bench.request().keys, 3, 3),
            (bench.request().keys, 7, 2),
            (bench.request().keys, 100, 200),
            (bench.request().keys[: 2 * KEYS], 1, 5),
        ]:
            lent = lender.hold(keys, first, last)
            assert not len(lent.block_ids)
            lender.release(lent)
        assert pinned(bench) == 0

    on_bench(work)


def test_what_is_only_on_ssd_is_fetched_before_it_is_lent() -> None:
    """Blocks that host memory has given up are lent again once they are fetched from the SSD."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        keys, lender = bench.request().keys, lending(bench)
        bench.engine.clear(Tier.HOST)
        found = lender.hold(keys, 0, BLOCKS)
        assert (len(found.block_ids), found.on_disk) == (0, BLOCKS)
        await lender.prefetch(keys, 2, 5)
        lent = lender.hold(keys, 0, BLOCKS)
        assert lent.on_disk == BLOCKS - 5
        assert lent_keys(bench, lent) == bench.keys()[:5]
        lender.release(lent)

    on_bench(work, disk=32)


def test_lending_counts_as_a_use() -> None:
    """Of two prompts the one that was lent stays when a third one needs room."""

    async def work(bench: Bench) -> None:
        for number in (1, 2):
            await bench.perform(Operation.PUT, number=number)
        lender = lending(bench)
        lender.release(lender.hold(bench.request(1).keys, 0, BLOCKS))
        await bench.perform(Operation.PUT, number=3)
        for number, is_whole in ((1, True), (2, False)):
            found = bench.engine.residency.find(bench.request(number).keys)
            assert (found.last == BLOCKS) is is_whole

    on_bench(work, host=2 * BLOCKS)


def test_a_cleared_block_is_not_lent_again_but_stays_for_its_reader() -> None:
    """A clear takes lent blocks out of the index; their places are free later."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        lender, keys = lending(bench), bench.request().keys
        lent = lender.hold(keys, 0, BLOCKS)
        bench.engine.clear()
        assert not len(lender.hold(keys, 0, BLOCKS).block_ids)
        await bench.perform(Operation.PUT, number=1)
        others = lender.hold(bench.request(1).keys, 0, BLOCKS)
        assert not set(others.block_ids.tolist()) & set(lent.block_ids.tolist())
        assert np.array_equal(np.unique(lent.block_ids), np.sort(lent.block_ids))
        lender.release(lent)
        lender.release(others)

    on_bench(work)


def test_keys_that_contradict_each_other_are_lent_nothing_wrong() -> None:
    """Whatever another node sends as a prompt, a block that is lent has the key it was asked by."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 5)
        lender, rng = lending(bench), np.random.default_rng(1)
        right = [bench.request().keys[at : at + KEYS] for at in range(0, 9 * KEYS, KEYS)]
        other = [bench.request(1).keys[at : at + KEYS] for at in range(0, 9 * KEYS, KEYS)]
        for _ in range(500):
            mixed = [
                right[int(rng.integers(9))] if rng.random() < 0.3 else
                other[at] if rng.random() < 0.2 else right[at]
                for at in range(9)
            ]  # fmt: skip
            first, last = (int(at) for at in rng.integers(0, 12, 2))
            lent = lender.hold(b"".join(mixed), first, last)
            wanted = mixed[first + 1 : first + 1 + len(lent.block_ids)]
            assert lent_keys(bench, lent) == wanted
            assert pinned(bench) == len(set(lent.block_ids.tolist()))
            lender.release(lent)
        assert pinned(bench) == 0

    on_bench(work)


def test_blocks_on_their_way_to_host_memory_are_not_missing() -> None:
    """While one reader's blocks come from the SSD, another one's wait for them, and are there."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        keys, lender = bench.request().keys, lending(bench)
        bench.engine.clear(Tier.HOST)
        async with asyncio.TaskGroup() as group:
            group.create_task(lender.prefetch(keys, 0, BLOCKS))
            while not bench.engine.statistics().claims:  # noqa: ASYNC110 -- of another task
                await asyncio.sleep(0)
            found = lender.hold(keys, 0, BLOCKS)
            assert (len(found.block_ids), found.on_disk) == (0, BLOCKS)
            lender.release(found)
            await lender.prefetch(keys, 0, BLOCKS)
            found = lender.hold(keys, 0, BLOCKS)
            assert len(found.block_ids) == BLOCKS
            lender.release(found)

    on_bench(work, disk=32)
