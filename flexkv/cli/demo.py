"""`flexkv demo`: the main job, run for real, with every byte checked."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
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
from flexkv.index.keys import KeyChain
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer
from flexkv.statistics import Statistics
from flexkv.testing.known_bytes import KnownDevice
from flexkv.testing.workload import ChatShape, Prompt, chat
from flexkv.trace.mooncake import read_trace

TOKENS_PER_BLOCK = 16
MODEL = ModelConfig(num_layers=8, num_kv_heads=4, head_size=64, dtype="float16", model_id="demo")
"""Small, so that a run takes seconds: a block has 128 KiB."""

DEVICE_BLOCKS = 4096
CONCURRENCY = 16


def demo(
    trace: Annotated[
        Path | None, typer.Option(help="Replay this trace in the Mooncake format instead.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Requests to run; the default is 10000.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the chat workload.")] = 0,
    host_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the host tier.")] = 3000,
    ssd_blocks: Annotated[int, typer.Option(min=0, help="Blocks of the SSD tier.")] = 9000,
    ssd_dir: Annotated[
        Path | None, typer.Option(help="Directory of the SSD tier; the default is temporary.")
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(callback=finite, help="1 = in the trace's own time, 0 = as fast as it goes."),
    ] = 0.0,
    enable_trace: Annotated[
        bool, typer.Option("--enable-trace", help="Write ./flexkv_trace.log.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics meanwhile.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Run a multi-turn chat workload over device, host and SSD, and check every byte."""
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
        )
        begin = time.monotonic()
        outcome, statistics = asyncio.run(
            _run(cache, list(prompts), time_scale, console, metrics_port)
        )
        figures = _figures(outcome, statistics, time.monotonic() - begin)
    console.print(_table(figures))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if outcome.mismatched_blocks:
        console.print(f"[bold red]{outcome.mismatched_blocks} blocks came back wrong")
        raise typer.Exit(1)


def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Give a directory on the file system of the working directory: /tmp may be in memory."""
    return tempfile.TemporaryDirectory(prefix=".flexkv-demo-", dir=".")


def _of_trace(path: Path, limit: int) -> Iterator[Prompt]:
    """Give a trace's requests, scaled down: each hash id becomes one block."""
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
    keys = KeyChain(MODEL, TOKENS_PER_BLOCK)
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
            engine = SimulatedEngine(manager, device, keys, TOKENS_PER_BLOCK)
            outcome = await engine.run(
                prompts, CONCURRENCY, time_scale, lambda: progress.advance(bar)
            )
            await manager.flush()
            return outcome, manager.statistics()


def _figures(outcome: Outcome, statistics: Statistics, wall_s: float) -> dict[str, Any]:
    """Give everything that the table shows, by name."""
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
        "get_ms": _percentiles(outcome.get_s),
        "put_ms": _percentiles(outcome.put_s),
        "backing": {t: tier.backing for t, tier in statistics.tiers.items()},
        "mismatches": outcome.mismatched_blocks,
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Give p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(np.array(seconds or [0.0]) * 1e3, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def _table(figures: dict[str, Any]) -> Table:
    table = Table("figure", "value", title="FlexKV demo")
    for name, value in figures.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), str(text))
    return table
