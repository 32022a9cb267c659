"""The `flexkv` command: its subcommands, and how it tells errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flexkv import __version__
from flexkv.cli.demo import demo
from flexkv.cli.doctor import doctor
from flexkv.cli.explain import explain
from flexkv.cli.replay_hits import replay_hits
from flexkv.cli.serve import serve
from flexkv.cli.server import server
from flexkv.cli.ssd import ssd
from flexkv.cli.top import stats, top
from flexkv.cli.trace import trace
from flexkv.cli.vllm_demo import vllm_demo
from flexkv.common.errors import FlexKVError
from flexkv.logs import configure_logging

commands = typer.Typer(
    name="flexkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="A KV-cache engine for LLM inference.",
)  # fmt: skip
commands.command()(demo)
commands.command()(doctor)
commands.command()(explain)
commands.command()(replay_hits)
commands.command()(serve)
commands.command()(stats)
commands.command()(top)
commands.command()(vllm_demo)
commands.add_typer(server, name="server")
commands.add_typer(ssd, name="ssd")
commands.add_typer(trace, name="trace")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexkv {__version__}")
        raise typer.Exit


@commands.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Configure what every subcommand shares."""
    configure_logging(level=log_level)


def app() -> None:
    """Run the command; an error of FlexKV is one line and exit status 2, ctrl-C is 130."""
    try:
        commands()
    except FlexKVError as error:
        typer.echo(f"flexkv: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("flexkv: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    app()
