"""`flexkv server` and `flexkv trace start | stop`: commands to a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flexkv.server.operator import command
from flexkv.settings import load_settings

server = typer.Typer(
    no_args_is_help=True,
    help="Inspect, flush or clear a running server.",
)

Address = Annotated[
    str | None,
    typer.Option("--server", help="Address of the server, ipc:///path; default: server_recv_port."),
]


def address_of(address: str | None) -> str:
    """Return the address that an option gives, or the configured one."""
    return address or load_settings().server_recv_port


@server.command("status")
def status(address: Address = None) -> None:
    """Show who is connected, and the engine's statistics, as JSON."""
    typer.echo(json.dumps(command(address_of(address), "status"), indent=2))


@server.command("flush")
def flush(address: Address = None) -> None:
    """Wait until everything that was stored is safe in the lower tiers, and print what is not.

    The exit status is 1 if a configured tier is not in use.
    """
    report = command(address_of(address), "flush")
    if not any(report.values()):
        typer.echo("everything in host memory is in all lower tiers that are configured")
    for tier, blocks in report["lacking_blocks"].items():
        typer.echo(f"{blocks} blocks of host memory are not in the {tier} tier")
    for directory, why in report["unused_directories"].items():
        typer.echo(f"the directory {directory} is not used: {why}")
    for tier, why in report["missing_tiers"].items():
        typer.echo(f"the {tier} tier is not available: {why}")
    if report["missing_tiers"]:
        raise typer.Exit(1)


@server.command("clear")
def clear(
    tier: Annotated[str | None, typer.Option(help="host or disk; default: all tiers.")] = None,
    address: Address = None,
) -> None:
    """Empty the cache: every tier, or one."""
    typer.echo(f"forgot {command(address_of(address), 'clear', tier=tier)} blocks")


def trace_start(
    file: Annotated[
        Path | None, typer.Argument(help="File to write; default: the server's trace_file_path.")
    ] = None,
    tokens: Annotated[
        bool | None,
        typer.Option(help="Record the prompts, too; default: the server's trace_tokens."),
    ] = None,
    address: Address = None,
) -> None:
    """Start a trace in a running server."""
    path = None if file is None else str(file.absolute())
    typer.echo(f"recording {command(address_of(address), 'trace_start', path=path, tokens=tokens)}")


def trace_stop(address: Address = None) -> None:
    """Stop the trace of a running server, and complete its file."""
    path = command(address_of(address), "trace_stop")
    typer.echo("no trace was being recorded" if path is None else f"recorded {path}")
