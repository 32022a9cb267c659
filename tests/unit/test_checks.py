"""What an actor does with checksums: forgets, sums, keeps and compares, over fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from errno import EIO

import numpy as np
import pytest

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.actors.pace import Pace
from flexkv.common.errors import (
    CorruptBlockError,
    InvariantError,
    RecalledError,
    StorageError,
    TransferError,
)
from flexkv.common.terms import BlockIds, Route, Tier, Transfer
from flexkv.front.layerwise import LayerProgress
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakeChecksummer, FakePort, sums_of
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual

BLOCKS, BLOCK_BYTES = 16, 16
IDS = np.arange(4)
TO_TIER, TO_HOST = Route(Tier.HOST, Tier.DISK), Route(Tier.DISK, Tier.HOST)
FROM_DEVICE, TO_DEVICE = Route(Tier.DEVICE, Tier.HOST), Route(Tier.HOST, Tier.DEVICE)
QUICK = FaultPlan(1, 0.0, 0.001, 0.002)


class Bench:
    """An actor over fakes: its turns are made by `turn`, and its ends are `ended`.

    A write waits until its places are reported as forgotten, if `forgets` is set.
    """

    def __init__(
        self,
        tier: Tier = Tier.DISK,
        piece_blocks: int = BLOCKS,
        window_blocks: int = BLOCKS,
        port_sums: bool = False,
        forgets: bool = False,
    ) -> None:
        self.store = np.random.default_rng(1).integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8)
        self.host = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        self.port = FakePort(self.store, self.host, QUICK, BLOCK_BYTES)
        self.checksummer = FakeChecksummer(self.host, QUICK)
        self.kept = KeptSums(BLOCKS, lambda block: ("fake", 100 * block))
        self.kept.sums[:] = sums_of(self.store)
        kept = None if tier is Tier.DEVICE else self.kept
        window = Window(window_blocks * BLOCK_BYTES, piece_blocks * BLOCK_BYTES)
        checks = BlockChecks(self.checksummer, kept, port_sums)
        sizes = [BLOCK_BYTES]
        self.actor = TransferActor(tier, self.port, (window, window), 8, sizes, checks)
        self.asked: list[BlockIds] = []
        self.forgotten: list[Callable[[], None]] = []
        if forgets:
            self.kept.forget = self._forget
        self.summed: list[list[int]] = []
        submit = self.checksummer.submit

        def noting(op_id: int, host_ids: BlockIds, urgent: bool, group: int) -> None:
            self.summed.append(host_ids.tolist())
            submit(op_id, host_ids, urgent, group)

        vars(self.checksummer)["submit"] = noting
        self.ended: list[Completion] = []
        self._has_ended = asyncio.Event()
        self.actor.attach(self._report)
        self.task = asyncio.create_task(self.actor.run())

    def _report(self, ends: Sequence[Completion]) -> None:
        self.ended += ends
        self._has_ended.set()

    def _forget(self, places: BlockIds, then: Callable[[], None]) -> bool:
        self.asked.append(places)
        self.forgotten.append(then)
        return False

    async def end(self) -> Completion:
        """Return the next end of a transfer."""
        while not self.ended:
            await self._has_ended.wait()
            self._has_ended.clear()
        return self.ended.pop(0)

    async def run(
        self, route: Route, source_ids: BlockIds = IDS, target_ids: BlockIds = IDS
    ) -> Completion:
        """Run one transfer, and return its end."""
        self.actor.post(Transfer(1, 1, route, source_ids, target_ids))
        return await self.end()

    async def until_moved(self) -> None:
        """Wait until the port has nothing in flight."""
        await asyncio.sleep(0)
        while self.port.in_flight:  # noqa: ASYNC110 -- on a virtual clock
            await asyncio.sleep(0.0001)

    def fail(self, block_id: int, filled: int = 0) -> None:
        """Make transfers that have a block of the store fail, after `filled` blocks."""
        submit, reap, failing = self.port.submit, self.port.reap, set[int]()
        error: TransferError = StorageError("planted", 0, EIO)

        def submitting(transfer: Transfer) -> None:
            if block_id in transfer.sides[1]:
                failing.add(transfer.op_id)
            submit(transfer)

        def reaping() -> list[Completion]:
            return [
                Completion(end.op_id, error, filled) if end.op_id in failing else end
                for end in reap()
            ]

        vars(self.port).update(submit=submitting, reap=reaping)

    def close(self) -> None:
        """Stop the actor, with nothing in flight."""
        self.task.cancel()
        self.actor.close()
        self.port.close()


# -- writes ---------------------------------------------------------------------------------------


def test_nothing_is_written_before_what_was_there_is_forgotten() -> None:
    """A write begins only after the blocks in its places are reported as forgotten."""

    async def run() -> None:
        bench = Bench(forgets=True)
        bench.host[:4] = 1
        before = bench.store.copy()
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS + 2))
        await asyncio.sleep(10.0)  # in virtual time
        assert bench.ended == []
        assert np.array_equal(bench.store, before)
        (asked,) = bench.asked
        assert asked.tolist() == [2, 3, 4, 5]
        assert bench.actor.oldest_s() == 10.0, "the wait counts"
        bench.forgotten[0]()
        assert await bench.end() == Completion(1, None)
        assert (bench.store[2:6] == 1).all()
        bench.close()

    run_virtual(run())


def test_each_piece_of_a_write_has_its_own_places_forgotten() -> None:
    """The pieces of a write are forgotten, and then written, in whatever order."""

    async def run() -> None:
        bench = Bench(piece_blocks=2, forgets=True)
        bench.host[:4] = 1
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS + 2))
        await asyncio.sleep(1.0)
        assert [each.tolist() for each in bench.asked] == [[2, 3], [4, 5]]
        before = bench.store[2:4].copy()
        bench.forgotten[1]()
        await asyncio.sleep(1.0)
        assert np.array_equal(bench.store[2:4], before)
        assert (bench.store[4:6] == 1).all()
        assert bench.ended == []
        bench.forgotten[0]()
        assert await bench.end() == Completion(1, None)
        assert (bench.store[2:4] == 1).all()
        bench.close()

    run_virtual(run())


def test_closing_while_a_write_waits_to_begin_is_our_mistake() -> None:
    """Closing while a write waits to begin raises: its end would never be reported."""

    async def run() -> None:
        bench = Bench(forgets=True)
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS + 2))
        await asyncio.sleep(1.0)
        bench.task.cancel()
        with pytest.raises(InvariantError, match="unreaped: 1 forgetting"):
            bench.actor.close()

    run_virtual(run())


def test_wrong_places_are_refused_before_any_is_forgotten() -> None:
    """A write to a place that does not exist has nothing forgotten: it might be another block."""

    async def run() -> None:
        bench = Bench(forgets=True)
        bench.task.cancel()
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS - 1))
        with pytest.raises(InvariantError):
            bench.actor._turn()
        assert not bench.asked
        bench.actor.close()

    run_virtual(run())


def test_a_write_keeps_the_sums_that_host_memory_had() -> None:
    """The kept sums are those made when the bytes arrived, so damage since then is found later."""

    async def run() -> None:
        bench = Bench()
        bench.checksummer.sums[:4] = [11, 12, 13, 14]
        before = bench.kept.sums.copy()
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS + 2))
        await asyncio.sleep(0)
        bench.checksummer.sums[:4] = 0  # what the places are used for later
        assert np.array_equal(bench.kept.sums, before), "the write has not ended"
        assert await bench.end() == Completion(1, None)
        assert bench.kept.sums[2:6].tolist() == [11, 12, 13, 14]
        assert not bench.summed
        back = await bench.run(TO_HOST, IDS + 2, IDS)
        assert isinstance(back.error, CorruptBlockError)
        bench.close()

    run_virtual(run())


def test_a_failed_write_keeps_no_sums() -> None:
    """The sums of places whose write failed stay as they were; those of other pieces are kept."""

    async def run() -> None:
        bench = Bench(piece_blocks=2)
        bench.checksummer.sums[:4] = [11, 12, 13, 14]
        before = bench.kept.sums.copy()
        bench.fail(4)
        end = await bench.run(TO_TIER, IDS, IDS + 2)
        assert isinstance(end.error, StorageError)
        assert end.filled == 0
        assert bench.kept.sums[2:4].tolist() == [11, 12]
        assert np.array_equal(bench.kept.sums[4:], before[4:])
        bench.close()

    run_virtual(run())


# -- reads ----------------------------------------------------------------------------------------


def test_a_read_ends_when_its_blocks_are_summed_and_compared() -> None:
    """Right blocks end well, with their sums in host memory's array; not before they are summed."""

    async def run() -> None:
        bench = Bench()
        bench.actor.post(Transfer(1, 1, TO_HOST, IDS + 2, IDS))
        await bench.until_moved()
        await asyncio.sleep(0.0005)
        assert bench.summed == [[0, 1, 2, 3]]
        assert bench.ended == []
        assert (bench.actor.depth, bench.actor.is_idle()) == (1, False)
        assert bench.actor.in_flight_bytes[True] == 4 * BLOCK_BYTES
        assert await bench.end() == Completion(1, None)
        assert bench.checksummer.sums[:4].tolist() == sums_of(bench.store[2:6])
        assert bench.actor.is_idle()
        bench.close()

    run_virtual(run())


@pytest.mark.parametrize("piece_blocks", [1, 2, 4])
def test_blocks_before_the_first_wrong_one_are_filled(piece_blocks: int) -> None:
    """The error names each wrong block and the first one's place; those before it are filled."""

    async def run() -> None:
        bench = Bench(piece_blocks=piece_blocks)
        bench.store[[4, 5]] ^= 1
        op_id, error, filled = await bench.run(TO_HOST, IDS + 2, IDS)
        assert (op_id, filled) == (1, 2)
        assert isinstance(error, CorruptBlockError)
        assert (error.path, error.offset_bytes) == ("fake", 400)
        assert list(error.block_ids) == [4, 5]
        bench.close()

    run_virtual(run())


@pytest.mark.parametrize(("filled", "port_sums"), [(0, False), (2, True)])
def test_blocks_without_a_sum_have_not_arrived(filled: int, port_sums: bool) -> None:
    """Of a piece that fails nothing counts unless it is summed here; pieces before it count."""

    async def run() -> None:
        bench = Bench(piece_blocks=2, port_sums=port_sums)
        bench.fail(5, filled=filled)
        end = await bench.run(TO_HOST, IDS + 2, IDS)
        assert isinstance(end.error, StorageError)
        assert end.filled == 2
        assert bench.summed == ([] if port_sums else [[0, 1]])
        bench.close()

    run_virtual(run())


def test_what_a_port_without_checks_says_has_arrived_counts() -> None:
    """Without checks, the leading blocks that the port reports are filled."""

    async def run() -> None:
        bench = Bench(piece_blocks=2)
        bench.actor._checks = None
        bench.fail(5, filled=1)
        end = await bench.run(TO_HOST, IDS + 2, IDS)
        assert isinstance(end.error, StorageError)
        assert end.filled == 3
        assert not bench.summed
        bench.close()

    run_virtual(run())


def test_closing_while_blocks_are_summed_is_our_mistake() -> None:
    """Closing while blocks that have arrived are being summed raises: they are still lent."""

    async def run() -> None:
        bench = Bench()
        bench.actor.post(Transfer(1, 1, TO_HOST, IDS, IDS))
        await bench.until_moved()
        await asyncio.sleep(0.0005)
        bench.task.cancel()
        with pytest.raises(InvariantError, match="unreaped: 1 summing"):
            bench.actor.close()

    run_virtual(run())


def test_a_recalled_read_ends_when_what_arrived_is_summed() -> None:
    """The pieces in flight are moved and summed; then the recalled rest is reported."""

    async def run() -> None:
        bench = Bench(piece_blocks=1, window_blocks=1)
        bench.actor.post(Transfer(1, 1, TO_HOST, IDS, IDS))
        await asyncio.sleep(0)
        bench.actor.recall(1)
        await bench.until_moved()
        await asyncio.sleep(0.0005)
        assert bench.ended == []
        end = await bench.end()
        assert isinstance(end.error, RecalledError)
        assert end.filled == 0
        assert bench.summed == [[0]]
        bench.close()

    run_virtual(run())


@pytest.mark.parametrize("window_blocks", [1, 2, 3])
def test_the_window_discounts_one_window_of_what_is_summed(window_blocks: int) -> None:
    """While nothing is summed, at most two windows are in flight, one of them at the port."""

    async def run() -> None:
        bench = Bench(piece_blocks=1, window_blocks=window_blocks)
        vars(bench.checksummer)["submit"] = lambda *_, **__: None  # sums nothing
        bench.actor.post(Transfer(1, 1, TO_HOST, np.arange(BLOCKS), np.arange(BLOCKS)))
        at_port = 0
        for _ in range(1000):
            await asyncio.sleep(0.0001)
            at_port = max(at_port, bench.port.in_flight)
        assert at_port == window_blocks
        assert bench.port.in_flight == 0
        assert bench.actor.in_flight_bytes[True] == 2 * window_blocks * BLOCK_BYTES
        bench.task.cancel()

    run_virtual(run())


def test_a_pace_measures_the_time_at_the_port_alone() -> None:
    """Neither the time to forget nor the time to sum counts as the disk's."""

    async def run() -> None:
        bench, loop = Bench(forgets=True), asyncio.get_running_loop()
        measured: list[tuple[int, float, float]] = []

        class Noting(Pace):
            def ended(self, nbytes: int, begin_s: float, now_s: float) -> None:
                measured.append((nbytes, begin_s, now_s))

        window = BLOCKS * BLOCK_BYTES
        bench.actor._paces = dict.fromkeys((True, False), Noting(window, window, BLOCK_BYTES))
        bench.actor.post(Transfer(1, 1, TO_TIER, IDS, IDS + 2))
        await asyncio.sleep(1.0)
        bench.forgotten[0]()
        await bench.end()
        assert measured == [(4 * BLOCK_BYTES, 1.0, loop.time())]
        bench.checksummer._faults = FaultPlan(1, 0.0, 1.0, 1.0)
        begin_s = loop.time()
        await bench.run(TO_HOST)
        assert loop.time() > begin_s + 1.0
        (_, (nbytes, from_s, to_s)) = measured
        assert (nbytes, from_s) == (4 * BLOCK_BYTES, begin_s)
        assert to_s <= begin_s + 0.002
        bench.close()

    run_virtual(run())


# -- devices --------------------------------------------------------------------------------------


def test_what_a_device_brings_is_summed_and_what_it_gets_is_not() -> None:
    """Blocks from a device end when they are summed, and are compared with nothing."""

    async def run() -> None:
        bench = Bench(Tier.DEVICE)
        assert await bench.run(FROM_DEVICE, IDS + 2, IDS) == Completion(1, None)
        assert bench.summed == [[0, 1, 2, 3]]
        assert bench.checksummer.sums[:4].tolist() == sums_of(bench.store[2:6])
        assert await bench.run(TO_DEVICE) == Completion(1, None)
        assert bench.summed == [[0, 1, 2, 3]]
        assert np.array_equal(bench.store[:4], bench.host[:4])
        bench.close()

    run_virtual(run())


def test_what_a_port_has_summed_is_not_summed_again() -> None:
    """Whole blocks from a port that sums them end at once."""

    async def run() -> None:
        bench = Bench(Tier.DEVICE, port_sums=True)
        assert await bench.run(FROM_DEVICE) == Completion(1, None)
        assert not bench.summed
        bench.close()

    run_virtual(run())


@pytest.mark.parametrize("port_sums", [False, True])
@pytest.mark.parametrize(("layers", "ready"), [(1, 1), (2, 2), (2, 1), (5, 5), (5, 3), (5, 0)])
def test_blocks_that_come_layer_by_layer_are_summed_once_all_are_there(
    port_sums: bool, layers: int, ready: int
) -> None:
    """Blocks are summed once, behind their last layer, even if the port sums whole blocks."""

    async def run() -> None:
        bench = Bench(Tier.DEVICE, port_sums=port_sums)
        progress = LayerProgress(layers, ready)
        bench.actor.post(Transfer(1, 1, FROM_DEVICE, IDS + 2, IDS, progress))
        if ready < layers:
            await asyncio.sleep(1.0)
            assert not bench.summed
            progress.let_go(layers)
            bench.actor.nudge()
        assert await bench.end() == Completion(1, None)
        assert bench.summed == [[0, 1, 2, 3]]
        assert bench.checksummer.sums[:4].tolist() == sums_of(bench.store[2:6])
        progress.end()
        bench.close()

    run_virtual(run())


def test_blocks_of_which_a_layer_fails_are_not_summed() -> None:
    """If one piece of a layer-wise transfer fails, the others end without a sum."""

    async def run() -> None:
        bench = Bench(Tier.DEVICE)
        progress, reap = LayerProgress(4, 4), bench.port.reap
        failed: list[int] = []

        def reaping() -> list[Completion]:
            ends = reap()
            if ends and not failed:
                failed.append(ends[0].op_id)
                ends[0] = Completion(ends[0].op_id, StorageError("planted", 0, EIO))
            return ends

        vars(bench.port)["reap"] = reaping
        bench.actor.post(Transfer(1, 1, FROM_DEVICE, IDS, IDS, progress))
        assert isinstance((await bench.end()).error, StorageError)
        assert not bench.summed
        assert bench.actor.is_idle()
        progress.end()
        bench.close()

    run_virtual(run())
