"""`flexkv server` and `flexkv trace start | stop`: what an operator asks a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flexkv.server.operator import command
from flexkv.settings import load_settings

server = typer.Typer(
    no_args_is_help=True, help="Ask a running server (flexkv serve, or an engine's)."
)

Address = Annotated[
    str | None, typer.Option("--server", help="Its address; by default server_recv_port.")
]


def _at(address: str | None) -> str:
    return address or load_settings().server_recv_port


@server.command("status")
def status(address: Address = None) -> None:
    """Show who is connected, and the engine's statistics, as JSON."""
    typer.echo(json.dumps(command(_at(address), "status"), indent=2))


@server.command("flush")
def flush(address: Address = None) -> None:
    """Return once everything put before is on stable storage, and print what is not.

    The exit status is 1 when a tier that was asked for is not there.
    """
    report = command(_at(address), "flush")
    for tier, blocks in report["lacking_blocks"].items():
        typer.echo(f"{tier} lacks {blocks} blocks of host memory")
    for directory, why in report["unused_directories"].items():
        typer.echo(f"the directory {directory} is not used: {why}")
    for tier, why in report["missing_tiers"].items():
        typer.echo(f"{tier} is not there: {why}")
    if report["missing_tiers"]:
        raise typer.Exit(1)


@server.command("clear")
def clear(
    tier: Annotated[str | None, typer.Option(help="host or disk; both when not given.")] = None,
    address: Address = None,
) -> None:
    """Forget every block of a tier, or of every one."""
    typer.echo(f"{command(_at(address), 'clear', tier=tier)} blocks forgotten")


def trace_start(
    file: Annotated[
        Path | None, typer.Argument(help="By default the server's trace_file_path.")
    ] = None,
    tokens: Annotated[
        bool | None, typer.Option(help="Record prompts in clear; by default as trace_tokens says.")
    ] = None,
    address: Address = None,
) -> None:
    """Let a running server record a trace from now on."""
    path = None if file is None else str(file.absolute())
    typer.echo(f"tracing to {command(_at(address), 'trace_start', path=path, tokens=tokens)}")


def trace_stop(address: Address = None) -> None:
    """Let a running server record no more; the file is whole then."""
    path = command(_at(address), "trace_stop")
    typer.echo("no trace was on" if path is None else f"traced to {path}")
