"""`python -m benchmarks [CASE …]`: run cases, print their figures, write them as JSON."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Figures, Options, machine, save

CASES = (
    "control",
    "graph",
    "index",
    "hints",
    "cluster_log",
    "gather",
    "disk",
    "remote",
    "remote_beside",
    "remote_s3",
    "mooncake",
    "peer",
    "sharing_beside",
    "survive",
    "neighbours",
    "starved",
    "fuzz",
    "strangers",
    "write_behind",
    "remote_gc",
    "cuda",
    "cuda_get",
    "ttft",
    "layers",
    "tracing",
    "vllm",
    "vllm_steps",
    "vllm_layers",
    "vllm_boundaries",
    "vllm_overhead",
    "vllm_remote",
    "vllm_peers",
)


def run(
    cases: Annotated[
        list[str] | None, typer.Argument(help=f"What to run: {', '.join(CASES)}; default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that are counted.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: a smoke test.")] = False,
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory for files, on the disk to measure.")
    ] = Path(),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Measure FlexKV side by side with its limits."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    options, facts = Options(repeats, quick, directory), machine(directory)
    results: dict[str, Figures] = {}
    for name in cases or CASES:
        if name not in CASES:
            raise typer.BadParameter(f"{name}: known cases are {', '.join(CASES)}")
        results[name] = import_module(f"benchmarks.{name}").measure(options)
        table = Table("figure", "value", title=name)
        for figure, value in results[name].items():
            table.add_row(figure, value if isinstance(value, str) else f"{value:.4g}")
        Console().print(table)
    if json_file:
        save(json_file, results, f"python -m benchmarks {' '.join(sys.argv[1:])}", facts)


if __name__ == "__main__":
    typer.run(run)
