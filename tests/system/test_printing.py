"""Tests that what a user prints in a shell is one line; arrays and tables are in the fields."""

from __future__ import annotations

import pickle
import re

import numpy as np

from flexkv.common.errors import CapacityError
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.index.found import PrefixMatch

from .conftest import PER_BLOCK, MakeManager, kv_caches, slots_of

PROMPT = np.arange(10 * PER_BLOCK)


def test_a_response_counts_its_tokens() -> None:
    """A response prints its status, its tokens and the reason for any shortfall, pickled or not."""
    mask = np.arange(64) < 48
    response = KVResponse(KVResponseStatus.SUCCESS, 1, mask)
    assert str(response) == repr(response) == "KVResponse(success, 48 of 64 tokens)"
    error = CapacityError("host", 4, 0, 1)
    told = repr(KVResponse(KVResponseStatus.UNREADY, 1, mask & False, error))
    assert told == f"KVResponse(unready, 0 of 64 tokens: {error})"
    again = pickle.loads(pickle.dumps(response))  # noqa: S301 -- our own bytes
    assert (again.return_mask == mask).all()
    assert repr(again) == repr(response)


def test_a_match_names_its_tiers() -> None:
    """A match prints the tiers that have blocks."""
    assert repr(PrefixMatch(0, {Tier.HOST: 0, Tier.DISK: 0}, 0)) == "PrefixMatch(0 tokens)"
    match = PrefixMatch(64, {Tier.HOST: 32, Tier.DISK: 16}, 16)
    assert repr(match) == "PrefixMatch(64 tokens: host 32, disk 16, 16 pending)"
    match = PrefixMatch(64, {Tier.HOST: 64}, 0, {Tier.REMOTE: 128})
    assert repr(match) == "PrefixMatch(64 tokens: host 64; 128 more in remote)"
    match = PrefixMatch(0, {Tier.HOST: 0}, 0, {Tier.REMOTE: 128})
    assert repr(match) == "PrefixMatch(0 tokens; 128 more in remote)"


async def test_what_an_engine_answers_is_one_line_each(make_manager: MakeManager) -> None:
    """Responses, matches, statistics and flush reports of an engine print as one line each."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        put = await manager.put(PROMPT, slots_of(range(10)))
        flushed = await manager.flush()
        got = await manager.get(PROMPT, slots_of(range(10, 20)))
        statistics = manager.statistics()
        answers = [put, got, flushed, manager.match(PROMPT), statistics,
                   statistics.tiers["host"], manager.explain("get", PROMPT)]  # fmt: skip
    for answer in answers:
        assert re.fullmatch(r"\w+\([^\n\[\]]{1,120}\)", repr(answer)), repr(answer)
    assert repr(put) == repr(got) == "KVResponse(success, 40 of 40 tokens)"
    assert repr(flushed) == "FlushReport(everything is written)"
    assert repr(FlushReport({"disk": 3})) == "FlushReport(disk lacks 3 blocks)"
    assert repr(statistics).startswith("Statistics(host 10 of 32 blocks, disk 10 of 128 blocks, ")
