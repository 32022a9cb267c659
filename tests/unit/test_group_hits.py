"""Replay of traces with several KV groups: the index against a plain model, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.errors import ConfigError
from flexkv.common.space import GroupRule
from flexkv.index.eviction import POLICIES, Eviction
from flexkv.trace.group_hits import STORE_RULES, groups_of, replay_groups
from flexkv.trace.hits import Prompt, infinite, prompts_of
from flexkv.trace.mooncake import TraceLine
from tests.unit.test_hits import lines

RUNNER = CliRunner()
SHAPES = ("state", "window:512", "window:1024", "window:1536*2,state", "chunk:1024", "full")


def needed(rule: GroupRule, end: int) -> set[int]:
    """Return the positions whose leaves a prefix of `end` blocks needs, by the definition."""
    size = rule.block_tokens
    tokens = end * size
    first = {
        0: 0,
        1: max(0, tokens - rule.window + 1) // size,
        2: tokens // rule.window * rule.window // size if rule.window else 0,
        3: max(0, end - 1),
    }[rule.kind]
    return set(range(first, end))


def endless(prompts: list[Prompt], rules: tuple[GroupRule, ...], store_rule: str) -> int:
    """Return the hits of a cache without limit."""
    chain: set[int] = set()
    leaves: set[tuple[int, int]] = set()
    hits = 0
    for prompt in prompts:
        known = 0
        while known < len(prompt.ids) and prompt.ids[known] in chain:
            known += 1
        end = known
        while any(
            (rule.group, prompt.ids[at]) not in leaves for rule in rules for at in needed(rule, end)
        ):
            end -= 1
        hits += end
        chain.update(prompt.ids)
        ends = {prompt.whole_blocks, known if store_rule == "junctions" and known > end else 0}
        if store_rule == "every block":
            ends = set(range(len(prompt.ids) + 1))
        leaves |= {
            (rule.group, prompt.ids[at])
            for rule in rules for end in ends for at in needed(rule, end)
        }  # fmt: skip
    return hits


@pytest.mark.parametrize("store_rule", STORE_RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_endless_cache_has_the_hits_of_a_plain_model(shape: str, store_rule: str) -> None:
    """With room for everything, the index hits what sets of blocks do, whatever the groups are."""
    rules = groups_of(shape)
    for seed in range(8):
        prompts = prompts_of(lines(seed))
        wanted = endless(prompts, rules, store_rule)
        for policy in POLICIES:
            assert replay_groups(prompts, 5000, Eviction(policy), rules, store_rule).hit_blocks == (
                wanted
            )


@pytest.mark.parametrize("shape", ["state", "window:600"])
def test_a_prompt_ends_at_its_last_whole_block(shape: str) -> None:
    """The next turn goes on behind the whole blocks: the last block of a prompt is not one."""
    turns = [TraceLine(0, 2 * 512 + 5, 1, [1, 2, 3]), TraceLine(1000, 4 * 512, 1, [1, 2, 4, 5])]
    rules = groups_of(shape)
    assert replay_groups(prompts_of(turns), 100, Eviction("lru"), rules, "ends").hit_blocks == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rule_that_stores_more_hits_no_less_in_an_endless_cache(shape: str) -> None:
    """Ends hit no more than junctions, these no more than every block, and that is the chain's."""
    rules, prompts = groups_of(shape), prompts_of(lines(3))
    every, ends, junctions = (
        replay_groups(prompts, 5000, Eviction("lru"), rules, name) for name in STORE_RULES
    )
    assert ends.hit_blocks <= junctions.hit_blocks <= every.hit_blocks
    assert ends.stored_blocks <= junctions.stored_blocks <= every.stored_blocks
    assert every.hit_blocks == infinite(prompts).hit_blocks


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_cache_replays_with_every_policy(policy: str) -> None:
    """A tier that is smaller than one prompt with its leaves evicts, and hits less."""
    rules, prompts = groups_of("window:1024*2,state"), prompts_of(lines(5))
    small, large = (
        replay_groups(prompts, size, Eviction(policy), rules, "junctions") for size in (8, 5000)
    )
    assert small.hit_blocks <= large.hit_blocks
    assert small.asked_blocks == large.asked_blocks


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("windows:3", "windows:3"),
        ("window", "window"),
        ("state:5", "state:5"),
        ("window:0", "window:0"),
        ("state*0", "state*0"),
        ("state*32", "state*32"),
        ("state,,state", ""),
        ("window:-1", "window:-1"),
    ],
)
def test_a_wrong_group_is_named(text: str, wrong: str) -> None:
    """What is not a group is refused, with the part that is wrong."""
    with pytest.raises(ConfigError) as caught:
        groups_of(text)
    assert caught.value.field == "groups"
    assert caught.value.value == wrong


def test_the_command_compares_store_rules(tmp_path: Path) -> None:
    """The command prints hit rates, and the share of bytes that each rule writes."""
    file = tmp_path / "trace.jsonl"
    fields = ("timestamp", "input_length", "output_length", "hash_ids")
    rows = [{name: getattr(line, name) for name in fields} for line in lines(1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["replay-hits", str(file), "--groups", "window:1024*2,state", "--blocks", "50,900"]
    shown = RUNNER.invoke(commands, command)
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in STORE_RULES)
    told = json.loads(RUNNER.invoke(commands, [*command, "--json"]).stdout)
    assert told["capacities"] == [50, 900]
    assert set(told["hit_rate"]) == set(told["stored_share"]) == set(STORE_RULES)
    assert told["stored_share"]["every block"] == [1, 1]
