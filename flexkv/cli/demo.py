"""`flexkv demo`: a simulated workload on real tiers, with every byte checked."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flexkv.cli.options import finite
from flexkv.cli.replay import Outcome, SimulatedEngine
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.engine.statistics import Statistics
from flexkv.index.keys import KeyChain
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer
from flexkv.observe.logs import LEVEL_VARIABLE, configure_logging
from flexkv.testing.known_bytes import KnownDevice
from flexkv.testing.workload import ChatShape, Prompt, chat
from flexkv.trace.mooncake import read_trace

TOKENS_PER_BLOCK = 16
MODEL = ModelConfig(num_layers=8, num_kv_heads=4, head_size=64, dtype="float16", model_id="demo")
"""A small model, so that a run takes seconds: a block has 128 KiB."""
(SPACE,) = MODEL.spaces(TOKENS_PER_BLOCK)

DEVICE_BLOCKS = 4096
CONCURRENCY = 16


def demo(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this request trace (Mooncake format) instead.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Requests to run; default: 10000.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the chat workload's random numbers.")
    ] = 0,
    host_blocks: Annotated[
        int, typer.Option(min=1, help="Size of the cache in host memory, in blocks.")
    ] = 3000,
    ssd_blocks: Annotated[
        int, typer.Option(min=0, help="Size of the cache on SSD, in blocks; 0 = no SSD.")
    ] = 9000,
    ssd_dir: Annotated[
        Path | None, typer.Option(help="Directory on SSD; default: a temporary one.")
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(
            callback=finite,
            help="1 = requests come at the times of the trace; 0 = as fast as possible.",
        ),
    ] = 0.0,
    enable_trace: Annotated[
        bool, typer.Option("--enable-trace", help="Record ./flexkv_trace.log for `flexkv trace`.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve metrics on this port during the run."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, too.")
    ] = None,
) -> None:
    """Run a simulated chat workload over device, host memory and SSD, and check every byte."""
    _log_errors_only(context)
    console = Console()
    count = requests or 10_000
    prompts = _of_trace(trace, count) if trace else chat(count, seed, ChatShape())
    with ExitStack() as stack:
        directory = ssd_dir or stack.enter_context(_temporary())
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=host_blocks,
            num_ssd_blocks=ssd_blocks,
            ssd_cache_dir=str(directory),
            enable_trace=enable_trace,
            strict=True,
        )
        console.print(_introduction(cache, "trace" if trace else "chat workload"))
        begin = time.monotonic()
        outcome, statistics = _finished(
            _run(cache, list(prompts), time_scale, console, metrics_port)
        )
        figures = _figures(outcome, statistics, time.monotonic() - begin)
    console.print(_table(figures))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if outcome.mismatched_blocks:
        console.print(f"[bold red]{outcome.mismatched_blocks} blocks came back with wrong bytes")
        raise typer.Exit(1)
    console.print("[green]every block that was loaded had the bytes that were stored")


def _log_errors_only(context: typer.Context) -> None:
    """Log no warnings unless the user asked for them, as the tiers are too small on purpose."""
    if context.obj is None and not os.environ.get(LEVEL_VARIABLE):
        configure_logging("error")


def _introduction(cache: CacheConfig, workload: str) -> str:
    """Return a sentence about the run, which explains the figures printed below it."""
    block = f"blocks of {TOKENS_PER_BLOCK} tokens ({SPACE.block_bytes >> 10} KiB)"
    on_ssd = f", and for {cache.num_ssd_blocks:,} on SSD ('disk')" if cache.num_ssd_blocks else ""
    return (
        f"A {workload} over numpy arrays that stand in for a GPU's KV cache ('device'), with room "
        f"for {cache.num_cpu_blocks:,} {block} in host memory{on_ssd}."
    )


OPTIONS = {
    "num_cpu_blocks": "--host-blocks",
    "num_ssd_blocks": "--ssd-blocks",
    "ssd_cache_dir": "--ssd-dir",
}


def _finished(run: Coroutine[Any, Any, tuple[Outcome, Statistics]]) -> tuple[Outcome, Statistics]:
    """Run a demo to its end, and return its outcome and statistics.

    Raises:
        ConfigError: an option is invalid; the error names it instead of the key that it sets.
    """
    try:
        return asyncio.run(run)
    except ConfigError as error:
        option = OPTIONS.get(error.field)
        if option is None:
            raise
        why = error.why.replace(error.field, option)
        raise ConfigError(option, error.value, why) from error


def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory in the working directory, since /tmp may be in memory."""
    return tempfile.TemporaryDirectory(prefix=".flexkv-demo-", dir=".")


def _of_trace(path: Path, limit: int) -> Iterator[Prompt]:
    """Yield the requests of a trace, scaled down: each hash id becomes one block."""
    offsets = np.arange(TOKENS_PER_BLOCK)
    numbers: dict[int, int] = {}  # hash ids may be larger than token ids
    for line in read_trace(path, limit):
        of_line = line.hash_ids[: DEVICE_BLOCKS // 4]
        ids = np.array([numbers.setdefault(each, len(numbers)) for each in of_line], np.int64)
        tokens = (ids[:, None] * TOKENS_PER_BLOCK + offsets).ravel()
        yield Prompt(line.timestamp / 1000, tokens)


async def _run(
    cache: CacheConfig,
    prompts: list[Prompt],
    time_scale: float,
    console: Console,
    metrics_port: int | None,
) -> tuple[Outcome, Statistics]:
    device = KnownDevice(MODEL, TOKENS_PER_BLOCK, DEVICE_BLOCKS)
    keys = KeyChain(SPACE)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("requests", total=len(prompts))
        async with KVManager(MODEL, cache) as manager, AsyncExitStack() as stack:
            manager.register_kv_caches(device.kv_caches)
            if metrics_port is not None:
                server = stack.enter_context(MetricsServer(manager, metrics_port))
                console.print(f"metrics at {server.url}")
            engine = SimulatedEngine(manager, device, keys)
            outcome = await engine.run(
                prompts, CONCURRENCY, time_scale, lambda: progress.advance(bar)
            )
            await manager.flush()
            return outcome, manager.statistics()


def _figures(outcome: Outcome, statistics: Statistics, wall_s: float) -> dict[str, Any]:
    """Return everything that the table shows, by name."""
    asked = max(statistics.asked_blocks, 1)
    return {
        "requests": outcome.requests,
        "tokens": outcome.tokens,
        "wall_s": round(wall_s, 2),
        "hit_rate": {tier: round(n / asked, 4) for tier, n in statistics.hit_blocks.items()},
        "moved_gb": {route: round(r.bytes / 1e9, 3) for route, r in statistics.routes.items()},
        "gb_per_s": {
            route: round(r.bytes / 1e9 / wall_s, 3) for route, r in statistics.routes.items()
        },
        "evicted_blocks": {t: tier.evicted_blocks for t, tier in statistics.tiers.items()},
        "unwritten_blocks": {
            tier: sum(behind.given_up_blocks.values())
            for tier, behind in statistics.write_behind.items()
        },
        "get_ms": _percentiles(outcome.get_s),
        "put_ms": _percentiles(outcome.put_s),
        "backing": {t: tier.backing for t, tier in statistics.tiers.items()},
        "mismatches": outcome.mismatched_blocks,
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Return p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(np.array(seconds or [0.0]) * 1e3, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def _table(figures: dict[str, Any]) -> Table:
    table = Table("figure", "value", title="FlexKV demo")
    for name, value in figures.items():
        if value != {}:
            table.add_row(LABELS.get(name, name), _shown(name, value))
    return table


LABELS = {
    "tokens": "prompt tokens",
    "wall_s": "seconds",
    "hit_rate": "hit rate",
    "moved_gb": "GB moved",
    "gb_per_s": "GB/s on average",
    "evicted_blocks": "blocks evicted",
    "unwritten_blocks": "blocks never written",
    "get_ms": "get, ms",
    "put_ms": "put, ms",
    "backing": "held in",
    "mismatches": "blocks with wrong bytes",
}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(name, each)}" for key, each in value.items())
    if name == "hit_rate":
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)
