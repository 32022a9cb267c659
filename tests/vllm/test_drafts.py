"""Blocks that a running request completes with drafts, of which some are accepted later."""

from __future__ import annotations

import pytest

from tests.system.conftest import PER_BLOCK

pytest.importorskip("vllm")

from flexkv.integration.vllm import scheduler

from .test_scheduler_faults import LONG, device_blocks, goes_on, put_of
from .test_scheduler_side import TOKENS, Request, Rig, answered, output, rig

__all__ = ["rig"]


def test_blocks_of_accepted_drafts_are_stored_in_the_next_step(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that accepted drafts have completed does not wait until the next one is whole."""
    monkeypatch.setattr(scheduler, "STEPS_LATE", 1)  # a step inside a block is not looked at
    answered(rig, Request("a", num_tokens=LONG))
    assert device_blocks(put_of(rig, output(("a", [1, 2, 3, 4])))) == [1, 2, 3]
    drafted = goes_on("a", TOKENS, PER_BLOCK, [5], drafts=PER_BLOCK - 1)
    assert not rig.side.build_connector_meta(drafted).puts
    accepted = goes_on("a", TOKENS + PER_BLOCK, 2, [], drafts=1)
    accepted.scheduled_cached_reqs.new_block_ids = [None]
    assert device_blocks(put_of(rig, accepted)) == [4]
