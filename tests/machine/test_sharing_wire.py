"""Engines share blocks over a wire with a delay, which loses packets."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv.testing.wire import Quality
from tests.machine.bed import Bed, check_machine
from tests.machine.sharing_node import BLOCKS, PROMPT_BYTES

pytestmark = pytest.mark.machine

PROMPTS = 3


@pytest.mark.parametrize(
    "quality", [Quality(delay_ms=5), Quality(delay_ms=5, loss_percent=1, seed=1)],
    ids=["delay", "loss"],
)  # fmt: skip
def test_blocks_come_over_a_wire(tmp_path: Path, quality: Quality) -> None:
    """Blocks of a peer that is far away come whole and right, if some packets are lost, too."""
    check_machine()
    with Bed(tmp_path, 2, quality) as bed:
        owner, reader = bed.nodes
        for seed in range(PROMPTS):
            owner.do("put", seed=seed)
            reader.until("known", lambda known: known["far"] == BLOCKS, seed=seed)
        for seed in range(PROMPTS):
            got = reader.until("get", lambda got: got["blocks"] == BLOCKS, seed=seed)
            assert got["right"]
        bridged = owner.host.received_bytes + reader.host.received_bytes
        assert bridged < PROMPT_BYTES, "the blocks did not come over the wire"
        assert all(node.end() == 0 for node in bed.nodes)
