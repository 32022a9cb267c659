"""A ledger over the journals of two directories: what one of them goes through costs the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import StorageError
from flexkv.common.terms import Tier
from flexkv.io.ssd import journals
from flexkv.io.ssd.journal import NEW_NAME, Journal
from flexkv.testing.faults import FaultPlan
from flexkv.testing.lossy_files import LossyFiles
from flexkv.testing.virtual_time import VirtualThread, run_virtual
from flexkv.tiers.ledger import Ledger
from tests.unit.test_ledger import Index

BLOCKS, STEP_BLOCKS = 64, 4


class CountingIndex(Index):
    """An index that records how many turns another task has had whenever it is asked for blocks."""

    def __init__(self) -> None:
        self.turns = 0
        self.turns_when_asked: list[int] = []

    def export(self, tier: Tier, block_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a record for each block."""
        self.turns_when_asked.append(self.turns)
        return super().export(tier, block_ids)

    async def take_turns(self) -> None:
        """Count turns, few enough that virtual time goes on."""
        for self.turns in range(1, 1000):
            await asyncio.sleep(0)


class Directory(LossyFiles):
    """The files of one directory; counts how often a journal is begun anew."""

    def __init__(self) -> None:
        self.faults, self.begun = FaultPlan(0), 0
        super().__init__(self.faults)

    def open(self, path: Path) -> int:
        """Open a file, or create it."""
        self.begun += path.name == NEW_NAME
        return super().open(path)

    def rows(self) -> list[int]:
        """Return the rows that the next run would restore."""
        left = {name: bytes(file.content) for name, file in self._names.items()}
        return sorted(Journal(Path("fake"), LossyFiles(FaultPlan(0), left)).live.rows.tolist())


class Rig:
    """A ledger whose journals are written anew a few blocks at a time, all blocks noted."""

    def __init__(self) -> None:
        self.directories, self.index = (Directory(), Directory()), CountingIndex()
        opened = [Journal(Path("fake"), each) for each in self.directories]
        sums = np.arange(BLOCKS, dtype=np.uint64)
        self.ledger = Ledger(opened, BLOCKS, sums, lambda _: VirtualThread(lambda: 0.01))
        self.ledger.snapshot_blocks = STEP_BLOCKS
        self.ledger.restore(self.index)  # type: ignore[arg-type]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write notes; close everything at the end."""
        writing = asyncio.ensure_future(self.ledger.run())
        yield
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        self.ledger.close()
        assert [each.open_files for each in self.directories] == [0, 0]

    async def fail_a_sync(self) -> None:
        """Note all blocks, and let the first directory fail to sync its journal."""
        self.ledger.stored(np.arange(BLOCKS))
        await self.ledger.written()
        faults = self.directories[0].faults
        faults.failure_probability = 1.0
        with pytest.raises(StorageError):
            await self.ledger.flush()
        faults.failure_probability = 0.0


def test_a_flush_waits_until_a_suspect_journal_is_written_anew_to_its_end() -> None:
    """A flush succeeds although the suspect journal takes many steps, and the other one none."""

    async def work() -> None:
        rig = Rig()
        async with rig.running():
            await rig.fail_a_sync()
            await rig.ledger.flush()
            assert [each.rows() for each in rig.directories] == [list(range(BLOCKS // 2))] * 2

    run_virtual(work())


def test_only_a_flush_writes_a_journal_anew_and_only_the_suspect_one() -> None:
    """A suspect journal is not written anew by later notes, and a sound one by no flush."""

    async def work() -> None:
        rig = Rig()
        async with rig.running():
            await rig.fail_a_sync()
            rig.ledger.stored(np.arange(BLOCKS))
            await rig.ledger.written()
            await asyncio.sleep(1.0)  # in virtual time
            assert [each.begun for each in rig.directories] == [0, 0]
            await rig.ledger.flush()
            assert [each.begun for each in rig.directories] == [1, 0]

    run_virtual(work())


def test_noting_a_tier_again_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that an emptied journal lacks are noted again in steps, with turns in between."""
    monkeypatch.setattr(journals, "KEPT_BYTES_MAX", 0)

    async def work() -> None:
        rig = Rig()
        async with rig.running():
            rig.directories[0].faults.failure_probability = 1.0
            rig.ledger.stored(np.arange(BLOCKS))
            with pytest.raises(StorageError):
                await rig.ledger.written()
            rig.directories[0].faults.failure_probability = 0.0
            other = asyncio.ensure_future(rig.index.take_turns())
            rig.index.turns_when_asked.clear()
            await rig.ledger.flush()
            await other
            asked = rig.index.turns_when_asked
            assert len(asked) == BLOCKS // 2 // STEP_BLOCKS
            assert all(earlier < later for earlier, later in pairwise(asked))
            assert rig.directories[0].rows() == list(range(BLOCKS // 2))

    run_virtual(work())
