"""Reads that a port could make only in part: what arrived is summed and compared, over fakes."""

from __future__ import annotations

import pytest

from flexkv.actors.checks import BlockChecks
from flexkv.common.errors import CorruptBlockError, StorageError
from flexkv.common.terms import Transfer
from flexkv.testing.fakes import sums_of
from flexkv.testing.virtual_time import run_virtual
from tests.unit.test_checks import IDS, TO_HOST, Bench


@pytest.mark.parametrize("piece_blocks", [2, 4])
@pytest.mark.parametrize("keeps", [True, False])
def test_the_leading_blocks_of_a_piece_that_fails_count_once_summed(
    keeps: bool, piece_blocks: int
) -> None:
    """They are summed, compared if the tier keeps sums, and filled; the rest is not summed."""

    async def run() -> None:
        bench = Bench(piece_blocks=piece_blocks)
        if not keeps:
            bench.actor._checks = BlockChecks(bench.checksummer)
        bench.fail(5, filled=3 % piece_blocks)
        end = await bench.run(TO_HOST, IDS + 2, IDS)
        assert isinstance(end.error, StorageError)
        assert end.filled == 3
        assert sorted(at for ids in bench.summed for at in ids) == [0, 1, 2]
        assert bench.checksummer.sums[:3].tolist() == sums_of(bench.store[2:5])
        assert bench.actor.in_flight_bytes == {True: 0, False: 0}
        bench.close()

    run_virtual(run())


def test_a_wrong_block_before_the_one_that_did_not_arrive_ends_the_piece() -> None:
    """The error names the wrong block, and only those before it are filled."""

    async def run() -> None:
        bench = Bench()
        bench.store[3] ^= 1
        bench.fail(5, filled=3)
        end = await bench.run(TO_HOST, IDS + 2, IDS)
        assert isinstance(end.error, CorruptBlockError)
        assert (end.filled, end.error.block_ids) == (1, (3,))
        bench.close()

    run_virtual(run())


def test_nothing_follows_a_piece_that_fails_while_its_leading_blocks_are_summed() -> None:
    """Its transfer is not continued meanwhile, and a recall changes nothing."""

    async def run() -> None:
        bench = Bench(piece_blocks=2, window_blocks=2)
        bench.fail(3, filled=1)
        bench.actor.post(Transfer(1, 1, TO_HOST, IDS + 2, IDS))
        await bench.until_moved()
        bench.actor.recall(1)
        end = await bench.end()
        assert isinstance(end.error, StorageError)
        assert end.filled == 1
        assert bench.summed == [[0]]
        bench.close()

    run_virtual(run())
