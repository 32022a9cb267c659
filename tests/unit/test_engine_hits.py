"""Tests of what several engines hit with one store: against a plain model, and by the command."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
from typer.testing import CliRunner
from walks import lines, write_trace

from flexkv.cli.main import commands
from flexkv.common.errors import ConfigError
from flexkv.index.eviction import Eviction
from flexkv.trace.engine_hits import Fleet, Sharing, Store, replay_engines
from flexkv.trace.hits import Prompt, infinite, prompts_of, replay
from flexkv.trace.mooncake import TraceLine

LRU = Eviction("lru")
AT_ONCE = 256.0
"""Requests a second that list all of a small store between two prompts."""


class Model:
    """Engines as plain LRU lists, and their store as a set of spans' last blocks."""

    def __init__(self, engines: int, capacity: int, span_blocks: int) -> None:
        self.caches = [OrderedDict[int, None]() for _ in range(engines)]
        self.store: set[int] = set()
        self.capacity, self.span_blocks = capacity, span_blocks

    def serve(self, engine: int, ids: list[int]) -> tuple[int, int]:
        """Serve a request; return the hits in the engine's cache, and those behind them."""
        cache, size = self.caches[engine], self.span_blocks
        own = 0
        while own < len(ids) and ids[own] in cache:
            own += 1
        last = own
        while (end := (last // size + 1) * size) <= len(ids) and ids[end - 1] in self.store:
            last = end
        kept = ids[: self.capacity]
        last = max(own, min(last, len(kept)))
        for block in reversed(kept[:own]):
            cache.move_to_end(block)
        for block in kept[own:]:
            if len(cache) >= self.capacity:
                cache.popitem(last=False)
            cache[block] = None
        for block in reversed(kept):
            cache.move_to_end(block)
        self.store.update(kept[size - 1 :: size])
        return own, last - own


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("span_blocks", [1, 3])
def test_engines_with_a_store_hit_what_a_plain_model_does(seed: int, span_blocks: int) -> None:
    """If a store is listed at once, own and far hits and its spans are exactly a plain model's."""
    prompts = prompts_of(lines(seed))
    for capacity in (12, 25, 60):
        model = Model(3, capacity, span_blocks)
        hits = [model.serve(at % 3, [*prompt.ids]) for at, prompt in enumerate(prompts)]
        told = replay_engines(
            prompts, capacity, LRU, Fleet(3, "round-robin"), Sharing(span_blocks, AT_ONCE)
        )
        own, far = (sum(each) for each in zip(*hits, strict=True))
        assert (told.own_blocks, told.far_blocks) == (own, far)
        assert told.stored_spans == len(model.store)
        assert far > 0


class Pair(Model):
    """Two engines as plain LRU lists that read from each other."""

    def serve(self, engine: int, ids: list[int]) -> tuple[int, int]:
        """Serve a request; return the hits in the engine's cache, and those behind them."""
        cache, other, size = self.caches[engine], self.caches[1 - engine], self.span_blocks
        own = next((at for at, block in enumerate(ids) if block not in cache), len(ids))
        last = own
        while (end := (last // size + 1) * size) <= len(ids) and ids[end - 1] in other:
            last = end
        if last > own:
            for block in reversed(ids[:last]):
                other.move_to_end(block)
        self.store.update(ids[own:last])
        kept = ids[: self.capacity]
        last = max(own, min(last, len(kept)))
        for block in reversed(kept[:own]):
            cache.move_to_end(block)
        for block in kept[own:]:
            if len(cache) >= self.capacity:
                cache.popitem(last=False)
            cache[block] = None
        for block in reversed(kept):
            cache.move_to_end(block)
        return own, last - own


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("span_blocks", [1, 3])
def test_peers_hit_what_a_plain_model_does(seed: int, span_blocks: int) -> None:
    """What one of two engines has is read from it, by whole spans, and counts as used there."""
    prompts = prompts_of(lines(seed))
    sharing = Sharing(span_blocks, has_store=False, has_peers=True)
    for capacity in (12, 25, 60):
        model = Pair(2, capacity, span_blocks)
        hits = [model.serve(at % 2, [*prompt.ids]) for at, prompt in enumerate(prompts)]
        told = replay_engines(prompts, capacity, LRU, Fleet(2, "round-robin"), sharing)
        own, far = (sum(each) for each in zip(*hits, strict=True))
        assert (told.own_blocks, told.far_blocks, told.peer_blocks) == (own, far, far)
        assert told.stored_spans == 0
        assert far > 0


@pytest.mark.parametrize(("admit", "own"), [("always", 4), ("second_use", 8), ("policy", 4)])
def test_what_is_read_from_peers_is_kept_as_the_rule_says(admit: str, own: int) -> None:
    """Under second_use older blocks of peers go before those that the engine alone has."""
    asked = [(1, 2), range(100, 108), (3, 4), (1, 2), (5, 6), (3, 4), (9,), (5, 6)]
    asked += [(10,), (20, 21), (11,), (30, 31, 32, 33), (12,), range(100, 108)]
    prompts = prompts_of(
        TraceLine(1000.0 * at, 512 * len(ids), 1, [*ids]) for at, ids in enumerate(asked)
    )
    sharing = Sharing(1, has_store=False, has_peers=True, admit=admit)
    told = replay_engines(prompts, 16, LRU, Fleet(2, "round-robin"), sharing)
    assert (told.own_blocks, told.peer_blocks) == (own, 6)


@pytest.mark.parametrize("engines", [4, 7])
def test_peers_and_a_store_hit_what_an_endless_cache_does(engines: int) -> None:
    """What no peer has any more comes from the store; peers with room for all need no store."""
    prompts, small = prompts_of(lines(3)), 160 // engines
    fleet, bound = Fleet(engines, "random", 5), infinite(prompts).rate
    both = replay_engines(prompts, small, LRU, fleet, Sharing(1, AT_ONCE, has_peers=True))
    assert both.rate == bound
    assert 0 < both.peer_blocks < both.far_blocks
    roomy = Sharing(1, has_store=False, has_peers=True)
    assert replay_engines(prompts, 100_000, LRU, fleet, roomy).rate == bound
    few = replay_engines(prompts, small, LRU, fleet, roomy).rate
    assert replay_engines(prompts, small, LRU, fleet).rate < few < bound


@pytest.mark.parametrize("routing", ["random", "round-robin"])
def test_a_store_makes_up_for_routing(routing: str) -> None:
    """With spans of a block engines and a store hit what an endless cache does; alone, less."""
    prompts = prompts_of(lines(3))
    fleet, bound = Fleet(4, routing, 5), infinite(prompts)
    shared = replay_engines(prompts, 40, LRU, fleet, Sharing(1, AT_ONCE))
    assert shared.rate == bound.rate
    alone = replay_engines(prompts, 40, LRU, fleet)
    assert alone.far_blocks == 0
    assert alone.rate < 0.8 * bound.rate
    assert (
        replay_engines(prompts, 40, LRU, Fleet()).own_blocks == replay(prompts, 40, LRU).hit_blocks
    )


def test_what_others_store_is_known_once_it_is_listed() -> None:
    """Without listing, an engine finds its own spans only; the more requests, the more is found."""
    prompts = prompts_of(lines(4))
    fleet = Fleet(4, "random", 1)
    far = [
        replay_engines(prompts, 12, LRU, fleet, Sharing(1, per_s)).far_blocks
        for per_s in (0.0, 8.0, AT_ONCE)
    ]
    assert 0 < far[0] < far[1] < far[2]


def test_a_listing_has_what_is_there_when_its_page_is_asked_for() -> None:
    """Each key is in one listing, in pages of 1000; later listings have only what is new."""
    store, seen = Store(), [0] * 256
    keys = [bytes([0]) + number.to_bytes(15, "big") for number in range(2001)]
    for key in [*keys, keys[0]]:
        store.put(key)
    pages = list(store.pages(seen))
    assert [len(page) // 16 for page in pages[:4]] == [1000, 1000, 1, 0]
    assert (b"".join(pages), len(pages), len(store)) == (b"".join(keys), 258, 2001)
    later = store.pages(seen)
    store.put(bytes([255]) * 16)
    assert b"".join(later) == bytes([255]) * 16


def test_nothing_is_hit_in_an_empty_trace() -> None:
    """A trace without requests has the hit rate 0."""
    nothing: list[Prompt] = []
    assert replay_engines(nothing, 4, LRU, Fleet(2), Sharing(1, 1.0)).rate == 0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return the path of a small trace file."""
    return write_trace(tmp_path / "trace.jsonl")


def test_the_command_shows_alone_shared_and_the_bound(trace: Path) -> None:
    """`replay-hits --engines --remote` prints the three rates, as JSON and as a table."""
    command = ["replay-hits", str(trace), "--engines", "4", "--remote", "--blocks", "20,40"]
    told = CliRunner().invoke(commands, [*command, "--list-per-s", "256", "--json"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    rates = facts["hit_rate"]
    assert (facts["engines"], facts["capacities"]) == (4, [20, 40])
    assert rates["alone"][0] < rates["alone"][1] < rates["shared"][0]
    assert rates["shared"] == rates["endless cache"]
    assert 0 < rates["of that, from the store"][1] < rates["of that, from the store"][0]
    table = CliRunner().invoke(commands, [*command, "--span-blocks", "4"]).output
    assert all(name in table for name in ("alone", "shared", "from the store", "endless cache"))
    command = ["replay-hits", str(trace), "--engines", "2", "--peers", "--blocks", "20", "--json"]
    rates = json.loads(CliRunner().invoke(commands, command).stdout)["hit_rate"]
    assert rates["alone"] < rates["shared"] < rates["endless cache"]
    assert "of that, from the store" not in rates
    table = CliRunner().invoke(commands, ["replay-hits", str(trace), "--engines", "2"]).output
    assert "shared" not in table
    assert "alone" in table


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--engines", "2", "--routing", "best"], "routing"),
        (["--remote", "--groups", "state"], "groups"),
        (["--peers", "--admit", "never"], "admit"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    trace: Path, arguments: list[str], field: str
) -> None:
    """A wrong option is an error that names it."""
    result = CliRunner().invoke(commands, ["replay-hits", str(trace), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == field
