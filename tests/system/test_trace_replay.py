"""Tests that a replayed trace has the same requests, hits and routes."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary

REQUESTS, PER_BLOCK = 400, 4


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the trace of a demo whose tiers are too small for it."""
    monkeypatch.chdir(tmp_path)
    options = ["--requests", str(REQUESTS), "--host-blocks", "700", "--ssd-blocks", "1500"]
    assert CliRunner().invoke(commands, ["demo", *options, "--enable-trace"]).exit_code == 0
    return tmp_path / "flexkv_trace.log"


def outcomes(trace: Trace) -> list[tuple[object, ...]]:
    """Return the outcome of each request, in the order in which they were issued."""
    issued = sorted(trace.requests, key=lambda request: request.request_id)
    return [
        (r.kind, r.token_count, r.first_block, r.status, r.moved_blocks, r.hit_blocks)
        for r in issued
    ]


async def one_after_the_other(path: Path) -> None:
    """Put and get prompts that share prefixes, so many that both tiers evict."""
    model = ModelConfig(num_layers=1, num_kv_heads=1, head_size=64, dtype="float16")
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK,
        num_cpu_blocks=60,
        num_ssd_blocks=300,
        ssd_cache_dir=str(path.parent),
        enable_trace=True,
        trace_file_path=str(path),
    )
    async with KVManager(model, cache) as manager:
        manager.register_kv_caches([np.zeros((2, 64, PER_BLOCK, 1, 64), np.float16)])
        random = np.random.default_rng(0)
        for _ in range(300):
            blocks, first = int(random.integers(1, 20)), int(random.integers(0, 30))
            tokens = np.arange(blocks * PER_BLOCK) + 1000 * first
            slots = np.arange(len(tokens))
            await manager.get(tokens, slots, namespace=["", "tenant"][first % 2])
            await manager.put(tokens, slots, namespace=["", "tenant"][first % 2])
            await manager.flush()


def test_a_replay_of_a_replay_is_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay, and a replay of its trace, have the recording's outcomes and blocks by route."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / name for name in ("recorded", "again", "and again")]
    asyncio.run(one_after_the_other(paths[0]))
    for source, to in pairwise(paths):
        told = CliRunner().invoke(commands, ["trace", "replay", str(source), "-o", str(to)])
        assert told.exit_code == 0, told.output
        assert "600 of 600 requests ended as recorded" in " ".join(told.output.split())
    traces = [load(path) for path in paths]
    blocks = [{r: facts.blocks for r, facts in Summary(t).routes.items()} for t in traces]
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[0]["disk→host"] > 0
    assert all(Summary(trace).evicted["host"] > 0 for trace in traces)
    assert outcomes(traces[0]) == outcomes(traces[1]) == outcomes(traces[2])


def test_requests_that_overlapped_overlap_again(recorded: Path, tmp_path: Path) -> None:
    """A replay of overlapping requests has nearly the same outcomes: evictions vary with timing."""
    to = tmp_path / "again"
    told = CliRunner().invoke(commands, ["trace", "replay", str(recorded), "-o", str(to)])
    assert told.exit_code == 0, told.output
    pairs = zip(outcomes(load(recorded)), outcomes(load(to)), strict=True)
    assert sum(old == new for old, new in pairs) > 0.9 * 2 * REQUESTS


def test_another_configuration_gives_other_hits(recorded: Path, tmp_path: Path) -> None:
    """A replay with more host memory and no SSD has more host hits, and no transfers of an SSD."""
    to = tmp_path / "again"
    options = ["--host-blocks", "5000", "--ssd-blocks", "0", "-o", str(to)]
    told = CliRunner().invoke(commands, ["trace", "replay", str(recorded), *options])
    assert told.exit_code == 0, told.output
    before, after = Summary(load(recorded)), Summary(load(to))
    assert set(after.routes) == {"device→host", "host→device"}
    assert after.hits["host"] > before.hits["host"]
