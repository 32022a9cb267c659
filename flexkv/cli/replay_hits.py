"""`flexkv replay-hits`: hit rate by capacity and policy, as a table, a picture and a page."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flexkv.cli.options import finite
from flexkv.cli.replay_engines import (
    ADMIT,
    LIST_PER_S,
    fleet_of,
    print_rates,
    rates_of,
    sharing_of,
)
from flexkv.common.config_keys import BLOCKS_MAX
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.space import GroupRule
from flexkv.index.eviction import POLICIES, Eviction
from flexkv.trace.engine_hits import ADMISSIONS
from flexkv.trace.group_hits import STORE_RULES, GroupHits, groups_of, replay_groups
from flexkv.trace.hits import Hits, Prompt, belady, infinite, prompts_of, replay
from flexkv.trace.mooncake import read_trace
from flexkv.trace.workloads import WORKLOADS, made_trace, workload_of

_GROUPS_HELP = (
    "KV groups beside the prefix chain, such as window:1024*5,state: compare the hit rates and the "
    "bytes written of several rules for what to store."
)
_WORKLOAD_HELP = f"In place of a trace, one that is made: {', '.join(WORKLOADS)}."
_ADMIT_HELP = f"With --peers: as p2p_admit, {', '.join(ADMISSIONS)}."

Rates = dict[str, list[float]]
"""Policy or bound -> hit rate at each capacity."""


def replay_hits(
    trace: Annotated[
        Path | None, typer.Argument(help="Requests in the Mooncake format, as JSON lines.")
    ] = None,
    workload: Annotated[str, typer.Option(help=_WORKLOAD_HELP)] = "",
    blocks: Annotated[
        str, typer.Option(help="Cache sizes in blocks of 512 tokens, separated by commas.")
    ] = "1000,5000,10000,30000",
    policy: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(POLICIES)}, separated by commas.")
    ] = "all",
    groups: Annotated[str, typer.Option(help=_GROUPS_HELP, metavar="KIND[:TOKENS][*COUNT],…")] = "",
    engines: Annotated[int, typer.Option(min=1, max=1024, help="Engines with a cache each.")] = 1,
    remote: Annotated[bool, typer.Option("--remote", help="Give them one endless store.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="They read from each other.")] = False,
    admit: Annotated[str, typer.Option(help=_ADMIT_HELP)] = ADMIT,
    span_blocks: Annotated[
        int, typer.Option(min=1, max=65536, help="With --remote or --peers: blocks of a span.")
    ] = 1,
    list_per_s: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="With --remote: as remote_list_per_s.")
    ] = LIST_PER_S,
    routing: Annotated[
        str, typer.Option(help="Which engine gets a request: random, or round-robin.")
    ] = "random",
    seed: Annotated[int, typer.Option(help="Of random routing, and of the workload.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many requests at most.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write STEM.png and STEM.html.", metavar="STEM")
    ] = Path("replay-hits"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Do not write pictures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Show the hit rate of each eviction policy on a request trace, by cache size.

    Two bounds are shown beside them: Belady's policy, which knows the future, and a cache without
    limit. A hit is a block of the prompt's longest stored prefix. With --engines, --remote or
    --peers, one policy is shown: what the engines hit alone, and what they hit with what they
    share, and the bound of an endless cache.
    """
    capacities, policies = _capacities(blocks), _policies(policy)
    name, asked = _requests(trace, workload, seed, limit)
    eviction = Eviction("lru" if policy == "all" else policies[-1])
    is_fleet = engines > 1 or remote or peers
    if is_fleet:
        if groups:
            why = "cannot be combined with --engines, --remote and --peers"
            raise ConfigError("groups", groups, why)
        fleet = fleet_of(engines, routing, seed)
        sharing = sharing_of(span_blocks, list_per_s, remote, peers, admit)
        told = rates_of(asked(), capacities, eviction, fleet, sharing)
        print_rates(told, capacities, engines, as_json)
        return
    if groups:
        rates_by_rule = _by_rule(asked(), capacities, groups_of(groups), eviction)
        _print_groups(rates_by_rule, capacities, as_json)
        return
    stem = None if no_plot else _checked(plot)
    draw, prompts = None if stem is None else _drawing(), asked()
    rates = _rates(prompts, capacities, policies, quiet=as_json)
    if as_json:
        _print_json(name, prompts, capacities, rates)
    else:
        _print(capacities, rates)
    if draw is not None and stem is not None:
        title = f"{Path(name).name}: {len(prompts)} requests"
        wrote = _write_pictures(draw, stem, title, rates, capacities)
        if not as_json:
            typer.echo(wrote)


def _checked(plot: Path | None) -> Path | None:
    if plot is not None and not plot.name:
        raise ConfigError("plot", str(plot), "must be the name of a file, without its suffix")
    return plot


def _print_json(name: str, prompts: list[Prompt], capacities: list[int], rates: Rates) -> None:
    count = sum(len(prompt.ids) for prompt in prompts)
    facts = {"trace": name, "requests": len(prompts), "blocks": count}
    typer.echo(json.dumps({**facts, "capacities": capacities, "hit_rate": rates}, indent=2))


def _requests(
    trace: Path | None, workload: str, seed: int, limit: int | None
) -> tuple[str, Callable[[], list[Prompt]]]:
    """Return the name of a trace or a workload, and what reads or makes it.

    Raises:
        ConfigError: both are given, or none, or there is no such workload.
    """
    if (trace is None) is not bool(workload):
        raise ConfigError("workload", workload, "give either a trace, or a workload")
    if trace is not None:
        return str(trace), lambda: prompts_of(read_trace(trace, limit))
    shape = workload_of(workload)
    return workload, lambda: prompts_of(made_trace(shape, seed, limit))


def _write_pictures(
    draw: Callable[..., str], stem: Path, title: str, rates: Rates, capacities: list[int]
) -> str:
    """Write both pictures, and return a text that names them."""
    picture, page = stem.with_suffix(".png"), stem.with_suffix(".html")
    svg = draw(capacities, rates, title, picture)
    page.write_text(_page(capacities, rates, title, svg), encoding="utf-8")
    return f"wrote {picture} and {page}"


def _capacities(text: str) -> list[int]:
    try:
        capacities = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError("blocks", text, "must be numbers separated by commas") from error
    if capacities[0] < 1 or capacities[-1] > BLOCKS_MAX:
        raise ConfigError("blocks", text, f"each must be from 1 to {BLOCKS_MAX}")
    return capacities


def _policies(text: str) -> list[str]:
    names = list(POLICIES) if text == "all" else text.split(",")
    for name in names:
        if name not in POLICIES:
            raise ConfigError("policy", name, f"must be all, or one of {', '.join(POLICIES)}")
    # LRU is always included, for comparison.
    return names if "lru" in names else ["lru", *names]


def _rates(prompts: list[Prompt], capacities: list[int], policies: list[str], quiet: bool) -> Rates:
    def under(name: str) -> Callable[[int], Hits]:
        return lambda capacity: replay(prompts, capacity, Eviction(name))

    contestants = {name: under(name) for name in policies}
    contestants["belady"] = lambda capacity: belady(prompts, capacity)
    contestants["infinite"] = lambda capacity: infinite(prompts)
    rates: Rates = {name: [] for name in contestants}
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("replaying", total=len(contestants) * len(capacities))
        for name, contestant in contestants.items():
            for capacity in capacities:
                rates[name].append(contestant(capacity).rate)
                progress.advance(task)
    return rates


def _by_rule(
    prompts: list[Prompt],
    capacities: list[int],
    rules: tuple[GroupRule, ...],
    eviction: Eviction,
) -> dict[str, list[GroupHits]]:
    """Return what each store rule gives at each capacity."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(STORE_RULES) * len(capacities))
        results: dict[str, list[GroupHits]] = {}
        for name in STORE_RULES:
            results[name] = []
            for capacity in capacities:
                results[name].append(replay_groups(prompts, capacity, eviction, rules, name))
                progress.advance(task)
    return results


def _print_groups(
    results: dict[str, list[GroupHits]], capacities: list[int], as_json: bool
) -> None:
    dense = results[STORE_RULES[0]]
    shares = {
        name: [
            own.stored_blocks / max(1, all_.stored_blocks)
            for own, all_ in zip(hits, dense, strict=True)
        ]
        for name, hits in results.items()
    }
    rates = {name: [each.rate for each in hits] for name, hits in results.items()}
    if as_json:
        told = {"capacities": capacities, "hit_rate": rates, "stored_share": shares}
        typer.echo(json.dumps(told, indent=2))
        return
    table = Table("stored", title="hit rate, bytes written (first row: 100 %), by number of blocks")
    for capacity in capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for name, values in rates.items():
        pairs = zip(values, shares[name], strict=True)
        table.add_row(name, *(f"{rate:.2%}, {share:.0%}" for rate, share in pairs))
    Console().print(table)


def _print(capacities: list[int], rates: Rates) -> None:
    table = Table("policy", title="hit rate by capacity in blocks")
    for capacity in capacities:
        table.add_column(f"{capacity:,}", justify="right")
    for name, values in rates.items():
        table.add_row(name, *(f"{value:.2%}" for value in values))
    Console().print(table)


def _drawing() -> Callable[[list[int], Rates, str, Path], str]:
    """Return a function that draws a PNG file and returns the same picture as SVG.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        why = "run pip install 'flexkv[plot]', or use --no-plot"
        raise BackendUnavailableError("matplotlib", why) from error

    def draw(capacities: list[int], rates: Rates, title: str, file: Path) -> str:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for name, values in rates.items():
            bound = name in ("belady", "infinite")
            percent = [100 * value for value in values]
            axes.plot(capacities, percent, "--" if bound else "o-", label=name)
        axes.set(xscale="log", xlabel="blocks", ylabel="hit rate, %", title=title)
        axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
        axes.legend()
        axes.grid(alpha=0.3)
        drawn = io.StringIO()
        figure.savefig(file, dpi=120)
        figure.savefig(drawn, format="svg")
        pyplot.close(figure)
        return drawn.getvalue()

    return draw


def _page(capacities: list[int], rates: Rates, title: str, svg: str) -> str:
    """Return the picture and the figures as one self-contained HTML page."""

    def row(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    rows = [row(["policy", *(f"{capacity:,}" for capacity in capacities)], "th")]
    rows += [row([name, *(f"{v:.2%}" for v in values)], "td") for name, values in rates.items()]
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:right}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{svg[svg.index('<svg') :]}"
        f"<table>{''.join(rows)}</table>\n"
    )
