"""`flexkv replay-hits` of several engines: alone, with one store for all, or with each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError
from flexkv.index.eviction import Eviction
from flexkv.trace.engine_hits import (
    ADMISSIONS,
    ROUTINGS,
    EngineHits,
    Fleet,
    Sharing,
    replay_engines,
)
from flexkv.trace.hits import Prompt, infinite

LIST_PER_S: float = CacheConfig.model_fields["remote_list_per_s"].default
ADMIT: str = CacheConfig.model_fields["p2p_admit"].default


class Rates(NamedTuple):
    """What engines hit on a trace, by capacity; `shared` is None if nothing is shared."""

    alone: list[EngineHits]
    shared: list[EngineHits] | None
    endless: float
    """The hit rate of one cache without a limit: no engines hit more."""


def fleet_of(engines: int, routing: str, seed: int) -> Fleet:
    """Return some engines, and how requests come to them.

    Raises:
        ConfigError: there is no such routing.
    """
    if routing not in ROUTINGS:
        raise ConfigError("routing", routing, f"must be one of {', '.join(ROUTINGS)}")
    return Fleet(engines, routing, seed)


def sharing_of(
    span_blocks: int, list_per_s: float, remote: bool, peers: bool, admit: str
) -> Sharing | None:
    """Return what engines share, if anything; `admit` is the name of a rule.

    Raises:
        ConfigError: there is no such rule.
    """
    if admit not in ADMISSIONS:
        raise ConfigError("admit", admit, f"must be one of {', '.join(ADMISSIONS)}")
    if not (remote or peers):
        return None
    return Sharing(span_blocks, list_per_s, remote, peers, admit)


def rates_of(
    prompts: Sequence[Prompt],
    capacities: Sequence[int],
    eviction: Eviction,
    fleet: Fleet,
    sharing: Sharing | None,
) -> Rates:
    """Return what engines hit, and show how far the work is."""
    kinds = [None] if sharing is None else [None, sharing]
    hits: list[list[EngineHits]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(kinds) * len(capacities))
        for kind in kinds:
            hits.append([])
            for capacity in capacities:
                hits[-1].append(replay_engines(prompts, capacity, eviction, fleet, kind))
                progress.advance(task)
    return Rates(hits[0], hits[1] if len(hits) > 1 else None, infinite(prompts).rate)


def print_rates(rates: Rates, capacities: Sequence[int], engines: int, as_json: bool) -> None:
    """Print the rates as a table, or as JSON."""
    rows = {"alone": [hits.rate for hits in rates.alone]}
    if rates.shared is not None:
        rows["shared"] = [hits.rate for hits in rates.shared]
        if any(hits.peer_blocks for hits in rates.shared):
            rows["of that, from other engines"] = [
                hits.peer_blocks / max(1, hits.asked_blocks) for hits in rates.shared
            ]
        if any(hits.stored_spans for hits in rates.shared):
            rows["of that, from the store"] = [
                (hits.far_blocks - hits.peer_blocks) / max(1, hits.asked_blocks)
                for hits in rates.shared
            ]
    rows["endless cache"] = [rates.endless] * len(capacities)
    if as_json:
        told = {"engines": engines, "capacities": [*capacities], "hit_rate": rows}
        typer.echo(json.dumps(told, indent=2))
        return
    table = Table("cache", title=f"hit rate of {engines} engines by blocks of each")
    for capacity in capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2%}" for value in values))
    Console().print(table)
