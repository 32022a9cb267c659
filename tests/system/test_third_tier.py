"""A third tier below the SSD tier, which the engine knows only by the backend's list of tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.common.config import CacheConfig
from flexkv.common.errors import (
    CorruptBlockError,
    DeadlineError,
    RecalledError,
    StorageError,
    TransferError,
)
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier
from flexkv.engine.engine import Engine
from flexkv.index.residency import Residency
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion, Sums
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.fakes import FakeChecksummer, FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.backend import LocalBackend, Progress
from flexkv.tiers.limits import disk_windows
from flexkv.tiers.parts import TierHooks, TierParts, Work
from tests.system.test_keeping import MODEL, TOKENS_PER_BLOCK

BLOCKS = 4
PROMPTS = 6
HOST, DISK, FAR = 8, 12, 64
"""Six prompts of four blocks: two fit in host memory, three on the disk, all in the third tier."""


class Records:
    """A tier's persistence that only notes what it is told."""

    def __init__(self) -> None:
        self.cleared = self.flushes = 0
        self.names: set[int] = set()

    def restore(self, residency: Residency) -> int:
        """Restore nothing."""
        return 0

    def stored(self, block_ids: BlockIds) -> None:
        """Note stored blocks."""
        self.names |= set(block_ids.tolist())

    def erased(self, block_ids: BlockIds) -> None:
        """Note erased blocks."""
        self.names -= set(block_ids.tolist())

    def clear(self, root: bytes | None) -> None:
        """Count a clear."""
        self.cleared += 1

    async def written(self) -> None:
        """Return at once."""

    async def flush(self) -> None:
        """Count a flush."""
        self.flushes += 1

    def begin_sync(self) -> BlockIds:
        """Return that nothing is unsynced."""
        return np.zeros(0, np.int64)

    def sync_failed(self, unsynced: BlockIds) -> BlockIds:
        """Return that all blocks may be lost."""
        lost = np.array(sorted(self.names), np.int64)
        self.names.clear()
        return lost

    async def finish(self) -> None:
        """Return at once."""


class FarBackend(FakeBackend):
    """A fake backend with a third tier behind the disk."""

    def __init__(self, has_checks: bool) -> None:
        super().__init__(HOST, FaultPlan(1, 0.0, 0.0001, 0.001), empty(DISK, 1))
        self._has_checks, self.shares_sums = has_checks, True
        self.store: NDArray[np.uint8] = np.zeros((FAR, BLOCK_KEY_BYTES), np.uint8)
        self.records = Records()
        self.hooks: TierHooks | None = None

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the disk, and the tier behind it."""
        super().open(undo, progress)
        port = FakePort(self.store, self.memory, self.faults, BLOCK_KEY_BYTES)
        undo.callback(port.close)
        checks = None
        if self._has_checks:
            sums = self._sums if self.shares_sums else None
            checksummer = FakeChecksummer(self.memory, self.faults, sums)
            checks = BlockChecks(checksummer, KeptSums(FAR, lambda block: ("far", block)))
        self._tiers.append(
            TierParts(
                Tier.REMOTE, FAR, port, *self.windows, self.records,
                work=self._far_work, checks=checks,
            )
        )  # fmt: skip

    def _far_work(self, hooks: TierHooks) -> Work:
        self.hooks = hooks
        return {}


class Bench:
    """An engine with three tiers, and a device whose blocks have bytes that identify the prompt."""

    def __init__(self, has_checks: bool) -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=HOST, num_ssd_blocks=DISK,
            ssd_cache_dir="unused", evict_ratio=0.0,
        )  # fmt: skip
        self.backend = FarBackend(has_checks)
        self.backend.windows = disk_windows(cache)
        self.engine = Engine(MODEL, cache, self.backend)
        self.device = np.zeros((16, BLOCK_KEY_BYTES), np.uint8)

    async def perform(self, operation: Operation, number: int) -> KVResponseStatus:
        """Put or get a prompt at the device's first blocks."""
        tokens = list(range(1000 * number, 1000 * number + BLOCKS * TOKENS_PER_BLOCK))
        request = self.engine.requests.intake(operation, tokens)
        ready = self.engine.requests.with_slots(request, np.arange(len(tokens)))
        assert ready is not None
        response = (await self.engine.requests.perform(ready)).response
        assert response is not None
        return response.status

    async def put(self, number: int) -> None:
        """Store a prompt in every tier."""
        self.device[:BLOCKS] = number + 1
        assert await self.perform(Operation.PUT, number) is KVResponseStatus.SUCCESS
        await self.engine.flush()

    async def get(self, number: int) -> KVResponseStatus:
        """Load a prompt; if that succeeds its bytes are right."""
        self.device[:] = 0
        status = await self.perform(Operation.GET, number)
        if status is KVResponseStatus.SUCCESS:
            assert (self.device[:BLOCKS] == number + 1).all()
        return status

    def resident(self, tier: Tier) -> int:
        """Count the blocks that a tier has ready."""
        return self.engine.residency.counts(tier).ready


def on_bench(work: Callable[[Bench], Awaitable[None]], has_checks: bool = True) -> None:
    """Run something on an open engine with three tiers, on a virtual clock, and close it."""

    run_virtual(_on_bench(work, has_checks))


async def _on_bench(work: Callable[[Bench], Awaitable[None]], has_checks: bool = True) -> None:
    bench = Bench(has_checks)
    await bench.engine.open()
    bench.engine.register_kv_caches([bench.device])
    for number in range(PROMPTS):
        await bench.put(number)
    await work(bench)
    await bench.engine.close()


@pytest.mark.parametrize("has_checks", [True, False])
def test_a_block_comes_back_from_whichever_tier_has_it(has_checks: bool) -> None:
    """Prompts that host memory and the disk have evicted come from the third tier, bytes right."""

    async def work(bench: Bench) -> None:
        for number in range(PROMPTS):
            assert await bench.get(number) is KVResponseStatus.SUCCESS
        told = bench.engine.statistics()
        assert set(told.tiers) == {"host", "disk", "remote"}
        assert told.routes["remote→host"].blocks == 12
        assert told.routes["host→remote"].blocks == PROMPTS * BLOCKS
        assert told.hit_blocks["remote"] == 12
        assert told.write_behind["remote"].owed_blocks == 0
        assert told.queues["remote"].waiting_ops == 0

    on_bench(work, has_checks)


@pytest.mark.parametrize("has_checks", [True, False])
def test_a_tier_without_checks_finds_no_corrupt_blocks(has_checks: bool) -> None:
    """Blocks that change in the third tier are found if it has checks, and only then."""

    async def work(bench: Bench) -> None:
        bench.backend.store[:] ^= 1
        request = bench.engine.requests.intake(
            Operation.PREFETCH, list(range(BLOCKS * TOKENS_PER_BLOCK))
        )
        response = (await bench.engine.requests.perform(request)).response
        assert response is not None
        assert bool(response.return_mask.any()) is not has_checks
        assert bench.engine.statistics().corrupt_blocks == (BLOCKS if has_checks else 0)

    on_bench(work, has_checks)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK, Tier.REMOTE])
def test_a_clear_of_one_tier_leaves_what_others_keep(tier: Tier) -> None:
    """Only the cleared tier's blocks go, and only its records are cleared."""

    async def work(bench: Bench) -> None:
        before = {each: bench.resident(each) for each in (Tier.HOST, Tier.DISK, Tier.REMOTE)}
        ledger = bench.backend.ledger
        assert ledger is not None
        bench.engine.retention.clear(tier)
        after = {each: bench.resident(each) for each in before}
        assert after == before | {tier: 0}
        assert bench.backend.records.cleared == (tier is Tier.REMOTE)
        assert len(ledger.journaled(0, DISK)) == (0 if tier is Tier.DISK else DISK)
        await bench.engine.retention.clear_durably()
        assert bench.backend.records.cleared == 1 + (tier is Tier.REMOTE)

    on_bench(work)


def test_a_flush_syncs_each_tier_and_records_what_it_has() -> None:
    """Each flush reaches the third tier's records, which name what the index says is there."""

    async def work(bench: Bench) -> None:
        flushes = bench.backend.records.flushes
        await bench.engine.flush()
        assert bench.backend.records.flushes == flushes + 1
        there = bench.engine.residency.export(Tier.REMOTE, np.arange(FAR)).any(axis=1)
        assert bench.backend.records.names == set(np.flatnonzero(there).tolist())

    on_bench(work)


def test_a_sync_that_one_tier_refuses_does_not_keep_others_from_theirs() -> None:
    """The disk's error is raised; the third tier was synced all the same, and lost nothing."""

    async def work(bench: Bench) -> None:
        disk = bench.backend.tiers()[0].port

        async def refused() -> None:
            raise StorageError("planted", 0, 5)

        disk.sync = refused  # type: ignore[method-assign]
        flushes = bench.backend.records.flushes
        with pytest.raises(StorageError, match="planted"):
            await bench.engine.flush()
        assert bench.backend.records.flushes == flushes + 1
        assert len(bench.backend.records.names) == PROMPTS * BLOCKS
        del disk.sync  # type: ignore[attr-defined]

    on_bench(work)


def test_background_work_reports_to_its_own_tier() -> None:
    """What a tier's work finds corrupt, and a tier that it takes down, is that tier's alone."""

    async def work(bench: Bench) -> None:
        hooks = bench.backend.hooks
        assert hooks is not None
        assert hooks.is_idle()
        hooks.drop_corrupt(CorruptBlockError("far", 0, sorted(bench.backend.records.names)))
        assert (bench.resident(Tier.DISK), bench.resident(Tier.REMOTE)) == (DISK, 0)
        assert not bench.backend.records.names
        hooks.lose("it is gone")
        tiers = bench.engine.statistics().tiers
        assert (tiers["disk"].reads, tiers["remote"].reads) == ("up", "down")
        assert await bench.get(0) is KVResponseStatus.NOTFOUND
        assert await bench.get(PROMPTS - 3) is KVResponseStatus.SUCCESS

    on_bench(work)


def test_a_tier_starts_tasks_and_closing_waits_for_them() -> None:
    """A task of a tier runs on the engine's loop, and is over once the engine is closed."""
    steps = []

    async def run() -> None:
        async def call() -> None:
            steps.append("began")
            await asyncio.sleep(5.0)
            steps.append("ended")

        async def work(bench: Bench) -> None:
            assert bench.backend.hooks is not None
            bench.backend.hooks.spawn("remote call", call())
            await asyncio.sleep(0)

        await _on_bench(work)
        assert steps == ["began", "ended"]

    run_virtual(run())


@pytest.mark.parametrize(
    ("error", "health"),
    [
        (TransferError(1, "remote→host", 1, "planted"), "down"),
        (StorageError("planted", 0, 5), "down"),
        (RecalledError(1, "remote→host", 1, "planted"), "up"),
        (CorruptBlockError("planted", 0, ()), "up"),
    ],
)
def test_the_error_says_whether_its_tier_is_to_blame(error: TransferError, health: str) -> None:
    """A tier is left alone after three errors that blame it, and after none of the others."""

    async def work(bench: Bench) -> None:
        far = bench.backend.tiers()[1].port
        reap = far.reap

        def failing() -> list[Completion]:
            return [Completion(op_id, error) for op_id, *_ in reap()]

        far.reap = failing  # type: ignore[method-assign]
        for number in range(3):
            await bench.get(number)
        tiers = bench.engine.statistics().tiers
        assert (tiers["disk"].reads, tiers["remote"].reads) == ("up", health)

    on_bench(work)


def test_a_sync_that_hangs_keeps_no_other_tier_from_its_own() -> None:
    """The flush names the tier that did not sync in time; the other one was synced each time."""

    async def work(bench: Bench) -> None:
        disk, over = bench.backend.tiers()[0].port, asyncio.Event()

        async def hanging() -> None:
            await over.wait()

        disk.sync = hanging  # type: ignore[method-assign]
        for _ in range(2):
            flushes = bench.backend.records.flushes
            with pytest.raises(DeadlineError, match="the disk did not sync in time"):
                await bench.engine.flush()
            assert bench.backend.records.flushes == flushes + 1
        over.set()

    on_bench(work)


def test_all_tiers_are_opened_with_the_same_sums(tmp_path: Path) -> None:
    """Every tier is opened with the one array of sums of host memory, which devices fill too."""
    cache = CacheConfig(
        tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=HOST, num_ssd_blocks=DISK,
        ssd_cache_dir=str(tmp_path),
    )  # fmt: skip
    backend, given = LocalBackend(cache, cache.sized(MODEL)), list[Sums]()

    def no_tier(arena: Arena, sums: Sums, undo: ExitStack) -> None:
        given.append(sums)

    backend._openers = [no_tier, *backend._openers, no_tier]  # type: ignore[list-item]
    with ExitStack() as undo:
        backend.open(undo, None)
        (parts,) = backend.tiers()
        assert parts.checks is not None
        assert given[0] is given[1]
        assert given[0] is parts.checks.checksummer.sums
        assert backend.sums is given[0]


def test_tiers_with_sums_of_their_own_are_our_mistake() -> None:
    """An engine whose tiers do not share the sums of host memory does not open."""

    async def run() -> None:
        bench = Bench(has_checks=True)
        bench.backend.shares_sums = False
        with pytest.raises(AssertionError, match="not shared"):
            await bench.engine.open()

    run_virtual(run())
