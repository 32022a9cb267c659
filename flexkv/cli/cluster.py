"""`flexkv cluster`: what a running server knows of the nodes that share blocks with it."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexkv.cli.server import Address, address_of
from flexkv.common.errors import ConfigError
from flexkv.io.peer.mooncake import MooncakeCounts
from flexkv.io.peer.port import PeerReads
from flexkv.server.operator import command
from flexkv.tiers.parts import ClusterStatistics

cluster = typer.Typer(
    no_args_is_help=True,
    help="Inspect or reset the cluster of nodes with which a running server shares blocks.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SHOWN_OF_LIFE = 8
"""Characters of a life in tables, which have to fit into a terminal; JSON has all."""
APART = (
    "apart: it was cleared alone, or started after another node was; it shares nothing until "
    "`flexkv cluster reset`"
)


@cluster.command()
def status(address: Address = None, as_json: AsJson = False) -> None:
    """Show the nodes, what each is said to have, and what was read of it.

    The exit status is 1 if this node shares nothing at the moment.
    """
    statistics = command(address_of(address), "status")["statistics"]
    told = statistics["cluster"]
    if told is None:
        raise _not_shared(statistics["missing_tiers"].get("peer"))
    known = msgspec.convert(told, ClusterStatistics)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        _show(known)
    if known.shared_generation is None or not known.state.is_registered:
        raise typer.Exit(1)


@cluster.command()
def reset(
    address: Address = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make all nodes of the cluster forget every block: they begin a new generation."""
    server = address_of(address)
    statistics = command(server, "status")["statistics"]
    told = statistics["cluster"]
    if told is None:
        raise _not_shared(statistics["missing_tiers"].get("peer"))
    if not yes:
        nodes = len(told["state"]["nodes"]) + 1
        question = f"{nodes} nodes forget every block that they have, in all tiers. Go on?"
        typer.confirm(question, abort=True, err=True)
    generation = command(server, "cluster_reset")
    if as_json:
        typer.echo(json.dumps({"generation": generation}))
    else:
        typer.echo(f"the cluster begins generation {generation}; each node clears its tiers now")


def _not_shared(why: str | None) -> ConfigError:
    """Return the error for a server that shares no blocks."""
    told = "this server shares no blocks: set enable_p2p_cpu or enable_p2p_ssd"
    if why is not None:
        told = f"this server cannot share blocks: {why}"
    return ConfigError("cluster", None, told)


def _show(known: ClusterStatistics) -> None:
    console = Console(highlight=False)
    for name, value in _facts(known).items():
        console.print(f"[bold]{name:>11}[/]  {value}", soft_wrap=True)
    if not known.state.nodes:
        why = "they need the same model, settings and p2p_zone"
        if not known.state.is_store_up:
            why = "Redis does not answer, and none was heard of before"
        console.print(f"no other node is known: {why}")
        return
    columns = "node", "life", "spans", "heard s", "state", "blocks", "MB", "busy", "failed"
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for row in _rows(known):
        table.add_row(*row)
    console.print(table)


def _mooncake(counts: MooncakeCounts) -> str:
    """Return the line that is shown of reads by Mooncake."""
    runs = f"at {counts.endpoint}" if counts.endpoint else "[bold red]does not run[/]"
    return (
        f"{runs}, started {counts.lives} times; {counts.reads} reads, {counts.failed} failed, "
        f"{counts.blocks} blocks; {counts.fallbacks} reads over TCP instead; "
        f"{counts.spoiled_bytes / 1e6:.1f} MB in {counts.spoiled} slots spoiled"
    )


def _facts(known: ClusterStatistics) -> dict[str, str]:
    """Return what is shown of this node, by name."""
    state, grants = known.state, known.grants
    if known.shared_generation is None:
        generation = f"[bold red]{APART}[/]"
    else:
        generation = str(known.shared_generation)
        if known.shared_generation != state.generation:
            generation += f" (the cluster's: {state.generation})"
    up = "up" if state.is_store_up else f"[bold red]down[/]: {escape(state.store_error)}"
    registered = "" if state.is_registered else ", [bold red]not registered[/]"
    mooncake = {} if known.mooncake is None else {"Mooncake": _mooncake(known.mooncake)}
    return {
        "this node": f"{known.address}, life {state.life[:SHOWN_OF_LIFE]}, "
        f"zone {state.zone}{registered}",
        "generation": generation,
        "metadata": f"{escape(state.store)}: {up}; the log has {state.log_bytes / 1e6:.1f} MB",
        "hears": f"{state.entries_per_s:.1f} entries/s, {state.entries} in all, "
        f"{state.malformed_entries} malformed; {state.snapshots} snapshots taken",
        "tells": f"{state.published_seq} entries; {state.pending_spans} spans wait to be told; "
        f"{state.gaps} gaps",
        "lends": f"{grants.pinned_blocks} blocks by {grants.grants} grants to {known.connections} "
        f"connections; {known.lent_bytes / 1e6:.1f} MB in all",
        "was asked": f"{grants.granted} granted, {grants.missed} had gone, {grants.busy} put off, "
        f"{grants.prefetched} from SSD, {grants.expired} expired",
        **mooncake,
    }


def _rows(known: ClusterStatistics) -> list[tuple[str, ...]]:
    """Return a row of cells for each other node, those with most spans first."""
    rows: list[tuple[str, ...]] = []
    for node in sorted(known.state.nodes, key=lambda each: (-each.spans, each.address)):
        read = known.read.get(node.address, PeerReads())
        state = "[bold red]down" if node.address in known.down else "up"
        rows.append((
            node.address, node.life[:SHOWN_OF_LIFE], f"{node.spans:,}",
            f"{node.stale_s:.1f}", "behind" if node.is_behind and state == "up" else state,
            f"{read.blocks:,}", f"{read.bytes / 1e6:,.1f}", f"{read.busy:,}",
            f"{read.failed + read.missing + read.wrong:,}",
        ))  # fmt: skip
    return rows
