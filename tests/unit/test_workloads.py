"""Request traces that are made: their sizes, and that they are the same for the same seed."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.errors import ConfigError
from flexkv.trace.hits import infinite, prompts_of
from flexkv.trace.mooncake import TOKENS_PER_HASH_ID
from flexkv.trace.workloads import BLOCKS_MAX, WORKLOADS, made_trace

PUBLISHED = {
    "conversation-like": (12_031, 12_035, 3537, 0.366),
    "tool-agent": (23_608, 8_596, 3537, 0.59),
    "synthetic": (3_993, 15_325, 1022, 0.640),
}
"""Requests, tokens of a prompt on average, seconds, and what an endless cache hits."""


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_workload_has_the_published_size(name: str, seed: int) -> None:
    """Requests are as many; lengths, duration and reuse are about those of the original."""
    lines = list(made_trace(WORKLOADS[name], seed))
    requests, tokens, seconds, rate = PUBLISHED[name]
    assert len(lines) == requests
    assert sum(line.input_length for line in lines) / requests == pytest.approx(tokens, rel=0.12)
    assert lines[-1].timestamp / 1000 == pytest.approx(seconds, rel=0.1)
    assert infinite(prompts_of(lines)).rate == pytest.approx(rate, abs=0.04)
    assert all(one.timestamp <= other.timestamp for one, other in pairwise(lines))
    for line in lines:
        assert 0 < len(line.hash_ids) <= BLOCKS_MAX + 1
        last = line.input_length - (len(line.hash_ids) - 1) * TOKENS_PER_HASH_ID
        assert 0 < last <= TOKENS_PER_HASH_ID


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    """Another seed makes another one; a limit cuts it."""
    one, again, other = (list(made_trace(WORKLOADS["synthetic"], seed)) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert list(made_trace(WORKLOADS["synthetic"], 3, 10)) == one[:10]


def test_the_command_makes_a_workload() -> None:
    """`replay-hits --workload` needs no file, alone and for engines that share."""
    command = ["replay-hits", "--workload", "tool-agent", "--limit", "300", "--blocks", "500"]
    told = CliRunner().invoke(commands, [*command, "--no-plot", "--policy", "lru", "--json"])
    facts = json.loads(told.stdout)
    assert (facts["trace"], facts["requests"]) == ("tool-agent", 300)
    told = CliRunner().invoke(commands, [*command, "--engines", "4", "--peers", "--json"])
    rates = json.loads(told.stdout)["hit_rate"]
    assert 0 < rates["alone"][0] < rates["shared"][0] <= rates["endless cache"][0]
    other = CliRunner().invoke(
        commands, [*command, "--engines", "4", "--peers", "--json", "--seed", "5"]
    )
    assert json.loads(other.stdout)["hit_rate"]["endless cache"] != rates["endless cache"]


@pytest.mark.parametrize(
    "arguments", [[], ["a trace", "--workload", "synthetic"], ["--workload", "nothing"]]
)
def test_the_command_takes_either_a_trace_or_a_workload(arguments: list[str]) -> None:
    """Anything else is an error that names the option."""
    result = CliRunner().invoke(commands, ["replay-hits", "--no-plot", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == "workload"
