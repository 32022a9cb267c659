"""`flexkv vllm-demo`: a real vLLM engine on this machine, with and without FlexKV."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from flexkv.common.errors import BackendUnavailableError
from flexkv.testing.tiny_model import Shape, make_tiny_model

MODEL = Shape(layers=8, hidden=512, heads=8, kv_heads=4)
BLOCK_SIZE = 32
ENGINE_S = 1200.0


def vllm_demo(
    conversations: Annotated[int, typer.Option(min=1, help="Conversations, which take turns.")] = 4,
    turns: Annotated[int, typer.Option(min=2, help="Questions of each conversation.")] = 4,
    first_tokens: Annotated[int, typer.Option(min=32, help="Length of the first prompt.")] = 1500,
    turn_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each turn adds.")] = 100,
    host_blocks: Annotated[
        int, typer.Option(min=1, help="FlexKV's room in host memory, in blocks of 32 tokens.")
    ] = 220,
    ssd_blocks: Annotated[int, typer.Option(min=0, help="FlexKV's room on SSD, in blocks.")] = 4000,
) -> None:
    """Run a real vLLM with and without FlexKV, and compare the time to the first token.

    A small random model holds conversations whose KV cache is larger than vLLM's room for it. On
    the CPU this takes some minutes.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError(
            "vllm", "install it; scripts/vllm-venv makes an environment for CPUs"
        )
    console = Console()
    with tempfile.TemporaryDirectory(prefix=".flexkv-demo-", dir=".") as name:
        folder = Path(name).absolute()
        with _stage(console, "making a model"):
            model = make_tiny_model(folder / "model", MODEL)
        # vLLM's pool has room for one and a half conversations.
        longest = first_tokens + turns * (turn_tokens + 8) + BLOCK_SIZE
        token_bytes = MODEL.layers * 2 * MODEL.kv_heads * MODEL.head_size * 4
        wanted: dict[str, Any] = {
            "model": str(model), "conversations": conversations, "turns": turns,
            "first_tokens": first_tokens, "turn_tokens": turn_tokens, "block_size": BLOCK_SIZE,
            "tokens_max": longest, "pool_bytes": longest * token_bytes * 3 // 2,
            "address": f"ipc://{folder}/socket",
        }  # fmt: skip
        settings = {
            "server_recv_port": wanted["address"],
            "log_level": "warning",
            "cache_config": {
                "num_cpu_blocks": host_blocks,
                "num_ssd_blocks": ssd_blocks,
                "enable_ssd": bool(ssd_blocks),
                "ssd_cache_dir": str(folder),
            },
        }
        (folder / "flexkv.json").write_text(json.dumps(settings))
        told = []
        for with_flexkv in (False, True):
            which = "with" if with_flexkv else "without"
            with _stage(console, f"running vLLM {which} FlexKV (a minute or more)"):
                told.append(_engine({**wanted, "with_flexkv": with_flexkv}, folder))
    console.print(_table(*told))
    if [turn["answers"] for turn in told[0]] != [turn["answers"] for turn in told[1]]:
        console.print("[bold red]the answers differ")
        raise typer.Exit(1)
    console.print("the answers are equal")


def _stage(console: Console, what: str) -> AbstractContextManager[object]:
    """Show what is under way: as a spinner in a terminal, as a line elsewhere."""
    if console.is_terminal:
        return console.status(what)
    console.print(what)
    return nullcontext()


def _engine(wanted: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run one engine in a process of its own, and return its turns."""
    environment = {**os.environ, "FLEXKV_CONFIG_PATH": str(folder / "flexkv.json")}
    command = [sys.executable, "-m", "flexkv.cli.vllm_demo_engine"]
    command.append(msgspec.json.encode(wanted).decode())
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=ENGINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        late = f"it did not end within {ENGINE_S:.0f} s; ask for fewer conversations or tokens"
        raise BackendUnavailableError("vllm", late) from error
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BackendUnavailableError(
            "vllm", why[0] if why else f"it ended with status {done.returncode}"
        )
    turns: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return turns


def _table(without: list[dict[str, Any]], having: list[dict[str, Any]]) -> Table:
    table = Table(
        "turn", "prompt tokens", "TTFT ms without", "with", "ratio", "cached tokens without",
        "with", "FlexKV hits, tokens", title="vLLM without and with FlexKV",
    )  # fmt: skip
    for number, (one, two) in enumerate(zip(without, having, strict=True), 1):
        before_ms, after_ms = (1e3 * median(turn["ttft_s"]) for turn in (one, two))
        hits = (f"{t} {n * BLOCK_SIZE:,}" for t, n in two["hit_blocks"].items() if n)
        table.add_row(
            str(number),
            f"{one['prompt_tokens']:,}",
            f"{before_ms:.0f}",
            f"{after_ms:.0f}",
            f"{before_ms / after_ms:.1f}",
            f"{one['cached_tokens']:,}",
            f"{two['cached_tokens']:,}",
            ", ".join(hits),
        )
    return table
