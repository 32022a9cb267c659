"""The port over several ranks: when a transfer ends, and with which error."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.errors import InvariantError, TransferError
from flexkv.common.space import BlockSpace
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.device.ranks import RanksPort
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan

ERRORS = [TransferError(1, "host→device", 1, why) for why in ("first", "second")]
IDS = np.arange(2)


class Rank(FakePort):
    """A rank whose transfers end when the test says so."""

    def __init__(self) -> None:
        blocks = np.zeros((4, 8), np.uint8)
        super().__init__(blocks, blocks.copy(), FaultPlan(1), 8)
        self.ends: list[Completion] = []

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer."""

    def reap(self) -> list[Completion]:
        """Return the ends that the test has set."""
        ends, self.ends = self.ends, []
        return ends


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((None, None), None),
        ((ERRORS[0], None), ERRORS[0]),
        ((None, ERRORS[1]), ERRORS[1]),
        ((ERRORS[0], ERRORS[1]), ERRORS[0]),
    ],
)
def test_a_transfer_ends_with_its_last_rank_and_the_first_error(
    errors: tuple[TransferError | None, ...], expected: TransferError | None
) -> None:
    """Nothing is reported before every rank has ended; then the first error is, if there was one.

    A later transfer of the same op id knows nothing of it.
    """
    ranks = [Rank(), Rank()]
    space = BlockSpace(16, (), (), ranks=2, parts=2, facts={})
    port = RanksPort(ranks, [space], 4)
    for outcome, wanted in ((errors, expected), ((None, None), None)):
        port.submit(Transfer(1, 1, Route(Tier.HOST, Tier.DEVICE), IDS, IDS))
        ranks[0].ends.append(Completion(1, outcome[0]))
        assert port.reap() == []
        with pytest.raises(InvariantError, match="1 transfers of several ranks unreaped"):
            port.close()
        ranks[1].ends.append(Completion(1, outcome[1]))
        assert port.reap() == [Completion(1, wanted)]
    port.close()
