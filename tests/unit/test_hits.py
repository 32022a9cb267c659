"""Replay of traces: the index against plain models, policies against bounds, and the command."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from typer.testing import CliRunner
from walks import lines, write_trace

from flexkv.cli.main import commands
from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.index.eviction import POLICIES, Eviction
from flexkv.trace.hits import Prompt, belady, infinite, prompts_of, replay
from flexkv.trace.mooncake import TraceLine

RUNNER = CliRunner()


def lru(prompts: list[Prompt], capacity: int) -> int:
    """Return the hits of a plain LRU of blocks, in which a request's leaf is its least recent."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        found = 0
        while found < len(prompt.ids) and prompt.ids[found] in order:
            found += 1
        hits += found
        kept = prompt.ids[:capacity]
        for block in reversed(kept[:found]):
            order.move_to_end(block)
        for block in kept[found:]:
            if len(order) >= capacity:
                order.popitem(last=False)
            order[block] = None
        for block in reversed(kept):
            order.move_to_end(block)
    return hits


@pytest.mark.parametrize("seed", range(20))
def test_lru_of_the_index_is_that_of_a_plain_model(seed: int) -> None:
    """The index under lru has exactly the hits of a plain LRU, at every capacity."""
    prompts = prompts_of(lines(seed))
    for capacity in (10, 25, 60):
        assert replay(prompts, capacity, Eviction("lru")).hit_blocks == lru(prompts, capacity)


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_beats_the_bounds(seed: int) -> None:
    """No policy beats Belady with bypass, which stays below an endless tier unless it is large."""
    prompts = prompts_of(lines(seed))
    most = infinite(prompts)
    for capacity in (5, 20, 1000):
        bound = belady(prompts, capacity)
        assert bound.asked_blocks == most.asked_blocks
        for name in POLICIES:
            assert replay(prompts, capacity, Eviction(name)).hit_blocks <= bound.hit_blocks, name
        assert bound.hit_blocks <= most.hit_blocks
    assert bound == most


def test_equal_ids_behind_other_prefixes_are_other_blocks() -> None:
    """A hash id names a block only together with the ids before it."""
    prompts = prompts_of([TraceLine(0, 1, 1, [1, 7]), TraceLine(0, 1, 1, [2, 7])])
    assert len({*prompts[0].ids, *prompts[1].ids}) == 4
    assert infinite(prompts).rate == 0
    assert infinite([]).rate == 0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return the path of a small trace file."""
    return write_trace(tmp_path / "trace.jsonl")


def test_the_command_prints_and_draws(trace: Path, tmp_path: Path) -> None:
    """The command prints a table of every policy and bound, and draws a PNG and an HTML page."""
    stem = tmp_path / "hits"
    result = RUNNER.invoke(
        commands, ["replay-hits", str(trace), "--blocks", "20,50", "--plot", str(stem)]
    )
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in [*POLICIES, "belady", "infinite"])
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = stem.with_suffix(".html").read_text()
    assert "<svg" in page
    assert "belady" in page


def test_the_command_gives_json(trace: Path) -> None:
    """With --json the command prints one object: capacities, and rates by policy and capacity."""
    arguments = [
        "replay-hits",
        str(trace),
        "--json",
        "--no-plot",
        "--policy",
        "lfu",
        "--limit",
        "50",
    ]
    result = RUNNER.invoke(commands, arguments)
    told = json.loads(result.stdout)
    assert told["requests"] == 50
    assert told["capacities"] == [1000, 5000, 10000, 30000]
    assert set(told["hit_rate"]) == {"lru", "lfu", "belady", "infinite"}
    assert all(0 <= rate <= 1 for rates in told["hit_rate"].values() for rate in rates)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--blocks", "10,x"], "blocks"),
        (["--blocks", "0"], "blocks"),
        (["--policy", "lru,best"], "policy"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    trace: Path, arguments: list[str], field: str
) -> None:
    """A wrong option is an error that names it."""
    result = RUNNER.invoke(commands, ["replay-hits", str(trace), "--no-plot", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == field


def test_without_matplotlib_the_command_says_what_to_do(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib, the command names the missing extra before it replays anything."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = RUNNER.invoke(commands, ["replay-hits", str(trace)])
    assert isinstance(result.exception, FlexKVError)
    assert "flexkv[plot]" in str(result.exception)
