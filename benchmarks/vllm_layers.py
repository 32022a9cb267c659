"""Two `vllm serve` engines with FlexKV: one loads beside its steps, the other by layer in them.

A prompt whose KV is in host memory is asked alone, and while another request generates tokens. The
figures are the time to its first token, and the longest pause between two tokens of the other one:
a step that loads holds up everybody in it. Both engines run at once and are asked in turn. Needs
vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import tempfile
import threading
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import Figures, Options, median_ratio
from flexkv.server.operator import command
from flexkv.testing.tiny_model import Shape, make_tiny_model
from flexkv.testing.vllm_serve import OWN, Served, VllmServe

MODEL = Shape(layers=12, hidden=512, heads=8, kv_heads=8)
BLOCK_SIZE, PROMPT_TOKENS, QUICK_TOKENS = 32, 4000, 600
BEFORE_TOKENS, OTHER_TOKENS = 8, 40
"""The other request's tokens: before the prompt is asked, and in total."""
ENGINES = {"beside": False, "by layer": True}


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    tokens = QUICK_TOKENS if options.quick else PROMPT_TOKENS
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        folder = Path(name).absolute()
        model = make_tiny_model(folder / "model", MODEL, "bfloat16")
        engines = {}
        for engine, by_layer in ENGINES.items():
            (folder / engine).mkdir()
            served = VllmServe(_served(model, by_layer), folder / engine)
            engines[engine] = stack.enter_context(served)
        for served in engines.values():
            served.wait_ready()
        return _measure(engines, tokens, repeats)


def _served(model: Path, by_layer: bool) -> Served:
    arguments = (
        "--dtype", "bfloat16", "--kv-cache-memory-bytes", str(1 << 30),
        "--block-size", str(BLOCK_SIZE), "--max-model-len", "8192",
        "--max-num-batched-tokens", "8192",
    )  # fmt: skip
    cache = {"num_cpu_blocks": 512, "num_ssd_blocks": 0}
    settings = {"cache_config": cache, "enable_layerwise_transfer": by_layer}
    return Served(model, OWN, settings, arguments, {"VLLM_CPU_OMP_THREADS_BIND": "0"})


def _measure(engines: dict[str, VllmServe], tokens: int, repeats: int) -> Figures:
    words = random.Random(0)
    prompt, other = ([words.randrange(3, 1000) for _ in range(n)] for n in (tokens, 16))
    took: dict[str, list[float]] = {}
    for engine in engines.values():
        engine.first_token_s(prompt)
        command(engine.address, "flush")
    for turn in range(repeats + 1):
        for name in engines if turn % 2 else reversed(engines):
            engine = engines[name]
            engine.forget()
            seconds = {"alone": engine.first_token_s(prompt)}
            engine.forget()
            seconds["busy"], seconds["pause"] = _beside_another(engine, prompt, other)
            if turn:  # the first warms up
                for what, value in seconds.items():
                    took.setdefault(f"{name} {what}", []).append(value)
    figures: Figures = {}
    for what, shown in (
        ("alone", "first token, alone"),
        ("busy", "first token, beside another request"),
        ("pause", "longest pause of the other request"),
    ):
        beside, by_layer = (took[f"{name} {what}"] for name in engines)
        figures[f"{shown}: beside, ms"] = 1e3 * statistics.median(beside)
        figures[f"{shown}: by layer / beside"] = median_ratio(by_layer, beside)
    return figures


def _beside_another(engine: VllmServe, prompt: list[int], other: list[int]) -> tuple[float, float]:
    """Return the seconds to a prompt's first token, and the longest pause of another request."""
    arrivals: list[float] = []
    has_begun = threading.Event()

    def generate() -> None:
        for arrival_s in engine.arrivals_s(other, OTHER_TOKENS):
            arrivals.append(arrival_s)
            if len(arrivals) == BEFORE_TOKENS:
                has_begun.set()

    generating = threading.Thread(target=generate)
    generating.start()
    has_begun.wait()
    first_s = engine.first_token_s(prompt)
    generating.join()
    return first_s, max(end - begin for begin, end in pairwise(arrivals[BEFORE_TOKENS - 1 :]))
