"""The `flexkv` command: its subcommands, and how it reports errors."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn, TextIO

import typer

from flexkv import __version__
from flexkv.cli.cluster import cluster
from flexkv.cli.demo import demo
from flexkv.cli.doctor import doctor
from flexkv.cli.explain import explain
from flexkv.cli.remote import remote
from flexkv.cli.replay_hits import replay_hits
from flexkv.cli.serve import serve
from flexkv.cli.server import server
from flexkv.cli.ssd import ssd
from flexkv.cli.top import stats, top
from flexkv.cli.trace import trace
from flexkv.cli.vllm_demo import vllm_demo
from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.observe.logs import LEVEL_VARIABLE, LEVELS, configure_logging

commands = typer.Typer(
    name="flexkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="FlexKV keeps the KV cache of LLM inference in host memory and on SSD.",
)  # fmt: skip
commands.command()(demo)
commands.command()(doctor)
commands.command()(explain)
commands.command()(replay_hits)
commands.command()(serve)
commands.command()(stats)
commands.command()(top)
commands.command()(vllm_demo)
commands.add_typer(cluster, name="cluster")
commands.add_typer(remote, name="remote")
commands.add_typer(server, name="server")
commands.add_typer(ssd, name="ssd")
commands.add_typer(trace, name="trace")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexkv {__version__}")
        raise typer.Exit


@commands.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(help="Lowest severity of log lines: debug, info, warning, error or critical."),
    ] = None,
) -> None:
    """Configure what every subcommand shares."""
    if log_level is not None and log_level.lower() not in LEVELS:
        raise ConfigError("--log-level", log_level, f"must be one of {', '.join(LEVELS)}")
    context.obj = log_level
    level = log_level or (None if os.environ.get(LEVEL_VARIABLE) else "warning")
    configure_logging(level)  # None: the level that the environment sets


def app() -> NoReturn:
    """Run the command and exit: an error of FlexKV prints one line, status 2; ctrl-C is 130.

    If the reader of the output goes away (`flexkv … | head`), the command ends silently, status 1.
    """
    _prepare_streams()
    status: int | str | None
    try:
        commands()
        status = 0
    except SystemExit as ended:
        status = ended.code
    except KeyboardInterrupt:
        status = _failed("interrupted", 130)
    except (FlexKVError, OSError, MemoryError, BaseExceptionGroup) as error:
        status = _told(error)
    for stream in (sys.stdout, sys.stderr):
        if (error_of_stream := _finish(stream)) is not None and not status:
            status = 1
            if not isinstance(error_of_stream, BrokenPipeError) and stream is sys.stdout:
                _failed(f"the output cannot be written: {error_of_stream.strerror}", 1)
    sys.exit(status)


def _told(error: BaseException) -> int:
    """Print an error of a command in one line, and return the command's exit status.

    Raises:
        BaseException: the error is a bug of FlexKV; it is raised again.
    """
    if isinstance(error, BaseExceptionGroup):
        return _told(error.exceptions[0])
    if isinstance(error, FlexKVError):
        return _failed(str(error), 2)
    if isinstance(error, MemoryError):
        return _failed("there is not enough memory", 1)
    if not isinstance(error, OSError):
        raise error
    if error.filename is None:
        return _failed(f"the output cannot be written: {error.strerror or error}", 1)
    return _failed(f"{error.filename}: {error.strerror}", 1)


def _prepare_streams() -> None:
    """Replace standard streams that are closed, and escape characters that cannot be encoded.

    Otherwise the first file that is opened would get the descriptor of a closed stream, and
    everything printed to that stream would go into the file.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(why: str, status: int) -> int:
    with suppress(OSError, ValueError):
        typer.echo(f"flexkv: {why}", err=True)
    return status


def _finish(stream: TextIO) -> OSError | None:
    """Flush a stream, or drop its content so that Python does not complain; return the error."""
    if not isinstance(stream, io.TextIOWrapper):
        return None
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
        return error
    except ValueError:  # it is closed
        return None
    return None


if __name__ == "__main__":
    app()
