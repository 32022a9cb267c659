"""`flexkv ssd`: commands that inspect, verify or empty a directory of the SSD tier."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flexkv.common.directories import directories_of
from flexkv.common.errors import ConfigError
from flexkv.io.ssd.offline import OfflineSsd
from flexkv.io.ssd.paths import expanded, shown

ssd = typer.Typer(
    no_args_is_help=True,
    help="Inspect, verify or clear a directory of a stopped engine.",
)

Folder = Annotated[Path, typer.Argument(help="A directory that ssd_cache_dir names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _opened(directory: Path) -> OfflineSsd:
    """Open a directory that is written in any form that `ssd_cache_dir` allows."""
    try:
        (found,) = directories_of(directory)
    except ValueError as error:
        raise ConfigError("directory", shown(directory), str(error)) from None
    return OfflineSsd(expanded(found, "directory"))


@ssd.command()
def inspect(directory: Folder, as_json: AsJson = False) -> None:
    """Show what a directory holds: the model, and how many blocks."""
    with _opened(directory) as tier:
        blocks = tier.live.blocks
        firsts = blocks[blocks[:, 32] > 0] if len(blocks) else blocks
        figures: dict[str, Any] = {
            **tier.superblock.block_identity,
            "format version": tier.superblock.version,
            "block stride bytes": tier.superblock.block_stride_bytes,
            "blocks": len(tier.live.rows),
            "block bytes": len(tier.live.rows) * tier.superblock.block_stride_bytes,
            "prompts' first blocks": len(firsts),
            "namespaces": len(np.unique(firsts[:, 16:32], axis=0)) if len(firsts) else 0,
            "bytes of block files": tier.file_bytes,
            "bytes of the journal": tier.journal_bytes,
        }
    _show(figures, f"{directory}", as_json)


@ssd.command()
def verify(
    directory: Folder,
    drop: Annotated[
        bool, typer.Option("--drop", help="Remove corrupt blocks, so that no engine uses them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every block and compare its checksum; the exit status is 1 if one is corrupt."""
    begin, read = time.monotonic(), 0
    bad: list[int] = []
    console = Console(stderr=True)
    with _opened(directory) as tier, Progress(console=console, disable=as_json) as progress:
        bar = progress.add_task("blocks", total=len(tier.live.rows))
        for checked in tier.verify():
            read += len(checked.rows)
            bad += checked.bad.tolist()
            progress.advance(bar, len(checked.rows))
        if drop and bad:
            tier.drop(np.array(bad, np.int64))
        stride = tier.superblock.block_stride_bytes
    seconds = time.monotonic() - begin
    figures = {
        "blocks read": read,
        "GB/s": round(read * stride / 1e9 / max(seconds, 1e-9), 3),
        "corrupt": len(bad),
        "rows of corrupt blocks": bad[:20],
        "dropped": len(bad) if drop else 0,
    }
    _show(figures, f"{directory}", as_json)
    if bad:
        raise typer.Exit(1)


@ssd.command()
def clear(
    directory: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Empty a directory; its files keep their size, and are overwritten later."""
    with _opened(directory) as tier:
        count = len(tier.live.rows)
        if not yes:
            typer.confirm(f"Forget {count} blocks of {directory}?", abort=True)
        tier.clear()
    typer.echo(f"forgot {count} blocks")


def _show(figures: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    table = Table("what", "value", title=title)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
