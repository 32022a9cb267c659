"""Time to the first token of real `vllm serve` engines over HTTP, with and without FlexKV.

Peers: no connector, vLLM's own ExampleConnector (files), and LMCache where it is installed. Limit:
vLLM's own device cache. All engines run at once and are asked in turn. Prompts are not chunked,
since ExampleConnector fails with chunks. Needs vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import lmcache
from benchmarks.harness import Figures, Options, median_ratio
from flexkv.server.operator import command
from flexkv.testing.tiny_model import Shape, make_tiny_model
from flexkv.testing.vllm_serve import SHIM, Served, VllmServe

MODEL = Shape(layers=12, hidden=1024, heads=16, kv_heads=16)
BLOCK_SIZE, PROMPT_TOKENS = 32, 6000
HOST_PROMPTS = 4
"""Prompts that fit into FlexKV's host memory; LMCache, which evicts now and then, gets twice."""
PROMPT_BYTES = PROMPT_TOKENS * MODEL.layers * 2 * MODEL.kv_heads * MODEL.head_size * 2
PEERS = {"Example": "ExampleConnector", "LMCache": "LMCache"}
"""Names of the peers in the figures."""
LOADED = "vllm:external_prefix_cache_hits_total"
"""The tokens that a connector has loaded."""


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        folder = Path(name).absolute()
        model = make_tiny_model(folder / "model", MODEL, "bfloat16")
        connectors = _connectors(folder)
        if not lmcache.missing():
            host_gb = 2 * HOST_PROMPTS * PROMPT_BYTES / 2**30
            server = lmcache.LMCacheServer(folder, BLOCK_SIZE, host_gb)
            connectors["LMCache"] = stack.enter_context(server).connector
        engines = {}
        for name, connector in connectors.items():
            (folder / name).mkdir()
            engine = VllmServe(_served(model, connector), folder / name)
            engines[name] = stack.enter_context(engine)
        for engine in engines.values():
            engine.wait_ready()
            engine.first_token_s([7] * 100)
        figures = _measure(engines, repeats, 600 if options.quick else PROMPT_TOKENS)
    if absent := lmcache.missing():
        figures["LMCache"] = f"is not measured: pip install --no-deps {' '.join(absent)}"
    return figures


def _connectors(folder: Path) -> dict[str, dict[str, Any] | None]:
    return {
        "none": None,
        "FlexKV": SHIM,
        "Example": {
            "kv_connector": "ExampleConnector",
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
        },
    }


def _served(model: Path, connector: dict[str, Any] | None) -> Served:
    blocks = PROMPT_TOKENS // BLOCK_SIZE
    arguments = (
        "--dtype", "bfloat16", "--kv-cache-memory-bytes", str(1 << 30),
        "--block-size", str(BLOCK_SIZE), "--max-model-len", "8192",
        "--max-num-batched-tokens", "8192",
    )  # fmt: skip
    return Served(
        model,
        connector,
        {"cache_config": {"num_cpu_blocks": HOST_PROMPTS * blocks, "num_ssd_blocks": 12 * blocks}},
        arguments,
        {"VLLM_CPU_OMP_THREADS_BIND": "0", "LMCACHE_TRACK_USAGE": "false"},
    )


def _throughput_s(engine: VllmServe, prompts: list[list[int]]) -> float:
    """Return the seconds that prompts take, eight at once."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: engine.first_token_s(prompt, 16), prompts))
    return time.perf_counter() - begin


def _measure(engines: dict[str, VllmServe], repeats: int, prompt_tokens: int) -> Figures:
    words = random.Random(0)
    took: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        took.setdefault(name, []).append(seconds)

    for turn in range(repeats + 1):
        prompt = [words.randrange(3, 1000) for _ in range(prompt_tokens)]
        prompts = [[words.randrange(3, 1000) for _ in range(256)] for _ in range(16)]
        for name in engines if turn % 2 else reversed(engines):
            engine = engines[name]
            engine.forget()
            seconds = {"cold": engine.first_token_s(prompt), "device": engine.first_token_s(prompt)}
            if name == "FlexKV":
                command(engine.address, "flush")
            engine.forget()
            if name != "none":
                before = engine.counted(LOADED)
                seconds["host"] = engine.first_token_s(prompt)
                if engine.counted(LOADED) - before < prompt_tokens // 2:
                    raise RuntimeError(f"{name} computed tokens that it should have loaded")
            if name == "FlexKV":
                command(engine.address, "clear", tier="host")
                engine.forget()
                seconds["disk"] = engine.first_token_s(prompt)
            engine.forget()
            seconds["many"] = _throughput_s(engine, prompts)
            if turn:  # the first warms up
                for what, value in seconds.items():
                    note(f"{name} {what}", value)
    return _figures(took, repeats)


def _figures(took: dict[str, list[float]], repeats: int) -> Figures:
    ours = {what: took[f"FlexKV {what}"] for what in ("cold", "device", "host", "disk", "many")}
    figures: Figures = {
        "recompute, ms": 1e3 * sorted(ours["cold"])[repeats // 2],
        "device hit, ms": 1e3 * sorted(ours["device"])[repeats // 2],
        "host / device hit": median_ratio(ours["host"], ours["device"]),
        "SSD / device hit": median_ratio(ours["disk"], ours["device"]),
        "recompute / host": median_ratio(ours["cold"], ours["host"]),
    }
    for name, shown in PEERS.items():
        if (host := took.get(f"{name} host")) is not None:
            figures[f"{shown} / its device hit"] = median_ratio(host, took[f"{name} device"])
            figures[f"{shown} / FlexKV from host"] = median_ratio(host, ours["host"])
    return figures | {
        "no hit: TTFT / without a connector": median_ratio(ours["cold"], took["none cold"]),
        "no hit: time of 16 prompts / without": median_ratio(ours["many"], took["none many"]),
    }
