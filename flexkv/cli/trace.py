"""`flexkv trace`: a trace file shown in the terminal, as a page, or for other viewers."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flexkv.cli.server import trace_start, trace_stop
from flexkv.cli.trace_replay import replay
from flexkv.common.errors import ConfigError
from flexkv.trace.chrome import chrome
from flexkv.trace.findings import findings
from flexkv.trace.load import load
from flexkv.trace.summary import Summary
from flexkv.trace.view import page

trace = typer.Typer(
    no_args_is_help=True,
    help="Record a trace, and read it to see why requests were slow.",
)

File = Annotated[
    Path,
    typer.Argument(help="A trace file; its rotated predecessors are read, too."),
]


@trace.command("summary")
def summary(
    file: File,
    slowest: Annotated[
        int, typer.Option(min=0, help="How many of the slowest requests to list.")
    ] = 5,
) -> None:
    """Print what was wrong, where the time went, and how fast each route was."""
    told, console = Summary(load(file)), Console()
    _print_findings(told, console)
    if not told.trace.requests and not told.trace.ops:
        return
    for table in (_requests(told), _hits(told), _time(told), _routes(told)):
        console.print(table)
    if slowest:
        console.print(_slowest(told, slowest))


def _print_findings(told: Summary, console: Console) -> None:
    trace, found = told.trace, findings(told)
    console.print(
        f"{len(trace.requests)} requests and {len(trace.ops)} transfers in {trace.seconds:.2f} s"
        + (f"; the last of {trace.runs} runs in the file" if trace.runs > 1 else "")
    )
    for finding in found:
        after_s = (finding.at_ns - trace.begin_ns) / 1e9
        words = f"[bold red]{finding.kind}[/] at {after_s:.2f} s: {escape(finding.text)}"
        console.print(words, soft_wrap=True)
    if not found:
        console.print("[bold green]nothing was wrong")


def _requests(told: Summary) -> Table:
    table = Table("request", "count", "p50 ms", "p90 ms", "p99 ms", "max ms", "ended as")
    for kind, facts in told.kinds.items():
        statuses = ", ".join(f"{status} {count}" for status, count in facts.statuses.items())
        table.add_row(kind, str(facts.count), *(f"{ms:.2f}" for ms in facts.ms), statuses)
    return table


def _hits(told: Summary) -> Table:
    table = Table("tier", "hit rate", "evicted blocks")
    for tier in sorted(told.hits.keys() | told.evicted.keys()):
        rate = f"{100 * told.hits.get(tier, 0.0):.1f} %"
        table.add_row(tier, rate, str(told.evicted.get(tier, 0)))
    return table


def _time(told: Summary) -> Table:
    table = Table("request", "where the callers' time went")
    for kind, steps in told.time_by_step.items():
        whole = max(1, sum(steps.values()))
        parts = [f"{100 * ns / whole:.0f} % {what}" for what, ns in steps.items()]
        table.add_row(kind, ", ".join(part for part in parts if not part.startswith("0 %")))
    return table


def _routes(told: Summary) -> Table:
    columns = ("queued p50/p99 ms", "on the device p50/p99 ms", "GB/s busy", "GB/s best")
    table = Table(Column("route", no_wrap=True), "ops", "GB", *columns, "failed")
    for route, facts in told.routes.items():
        table.add_row(
            escape(route),
            str(facts.ops),
            f"{facts.bytes / 1e9:.3f}",
            " / ".join(f"{ms:.2f}" for ms in facts.queue_ms),
            " / ".join(f"{ms:.2f}" for ms in facts.service_ms),
            f"{facts.rate / 1e9:.2f}",
            f"{facts.peak_rate / 1e9:.2f}",
            str(facts.failed_ops),
        )
    return table


def _slowest(told: Summary, count: int) -> Table:
    table = Table("slowest", "request", "blocks", "ended as", "where its time went")
    for breakdown in told.slowest(count):
        request = breakdown.request
        blocks = f"{request.moved_blocks} of {request.asked_blocks}"
        table.add_row(
            request.kind, str(request.request_id), blocks, request.status, escape(breakdown.words)
        )
    return table


@trace.command("diff")
def diff(
    before: Annotated[Path, typer.Argument(help="A trace file.")],
    after: Annotated[Path, typer.Argument(help="The trace file to compare with it.")],
) -> None:
    """Compare two runs: latencies, hits, rates, and what went wrong in one of them."""
    told, console = [Summary(load(path)) for path in (before, after)], Console()
    table = Table("figure", before.name, after.name, "ratio")
    for name, values in _compared(told[0], told[1]):
        old, new = values
        ratio = f"{new / old:.2f}" if old else ""
        table.add_row(name, f"{old:.4g}", f"{new:.4g}", ratio)
    console.print(table)
    old_kinds, new_kinds = ({finding.kind for finding in findings(each)} for each in told)
    for path, kinds in ((before, old_kinds - new_kinds), (after, new_kinds - old_kinds)):
        for kind in sorted(kinds):
            console.print(f"only in {path.name}: [bold red]{kind}")


def _compared(old: Summary, new: Summary) -> list[tuple[str, tuple[float, float]]]:
    """Return the name and both values of every figure that either summary has."""
    figures = [_figures(each) for each in (old, new)]
    names = list(dict.fromkeys([*figures[0], *figures[1]]))
    return [(name, (figures[0].get(name, 0.0), figures[1].get(name, 0.0))) for name in names]


def _figures(told: Summary) -> dict[str, float]:
    figures = {"seconds": told.trace.seconds, "requests": float(len(told.trace.requests))}
    for kind, facts in told.kinds.items():
        for name, ms in zip(("p50", "p99"), (facts.ms[0], facts.ms[2]), strict=True):
            figures[f"{kind} {name}, ms"] = ms
    for tier, rate in told.hits.items():
        figures[f"hits in {tier}, %"] = 100 * rate
    for route, route_facts in told.routes.items():
        figures[f"{route}, GB"] = route_facts.bytes / 1e9
        figures[f"{route} while busy, GB/s"] = route_facts.rate / 1e9
    return figures


@trace.command("view")
def view(
    file: File,
    to: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path(
        "flexkv_trace.html"
    ),
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write an HTML page: timeline, requests and their plans, curves, and what was wrong."""
    _write(to, page(Summary(load(file))).encode(), "needs no network")
    if open_it:
        webbrowser.open(to.resolve().as_uri())


@trace.command("export")
def export(
    file: File,
    to: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
) -> None:
    """Convert a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""
    _write(to, chrome(load(file)), "open it in ui.perfetto.dev")


def _write(to: Path, content: bytes, what_now: str) -> None:
    """Write a file, and print its size and what to do with it."""
    try:
        to.write_bytes(content)
    except OSError as error:
        raise ConfigError("output", str(to), f"cannot be written: {error.strerror}") from error
    Console().print(f"{to}: {len(content) / 1e6:.1f} MB, {what_now}")


trace.command("replay")(replay)
trace.command("start")(trace_start)
trace.command("stop")(trace_stop)
