"""What FlexKV adds to the latency of `vllm serve` when it has nothing to offer.

A steady load of prompts with shared prefixes arrives at random times: 55 % of what the machine can
do. The device's own cache has every prefix, so a connector finds nothing more, but it is asked
about every prompt, and FlexKV stores the blocks behind the prefixes. Limit: a connector that does
nothing, since any connector costs something in vLLM itself (`docs/vllm.md` lists what). That
connector runs twice, in two engines; their difference is the error of the measurement. All engines
run all the time; the load goes to one after the other, with the same prompts at the same times.
Needs vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Figures, Options, percentile
from benchmarks.vllm import LOADED
from flexkv.testing.tiny_model import LLAMA, Shape, make_tiny_model
from flexkv.testing.vllm_serve import OWN, Served, VllmServe

ROOT = Path(__file__).parents[1]
NOTHING = {"kv_connector": "Nothing", "kv_connector_module_path": "benchmarks.nothing"}
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "none": None, "nothing": NOTHING, "FlexKV": OWN, "nothing again": NOTHING,
}  # fmt: skip
LIMIT, CONTROL = "nothing", "nothing again"
BLOCK_SIZE = 32
RUNNING_MAX = 8
LOAD = 0.55
"""Requests per second, as a share of what the machine can do."""


class Sizes(NamedTuple):
    """The size of the load."""

    model: Shape = Shape(layers=12, hidden=512, heads=8, kv_heads=8)
    prefixes: int = 8
    prefix_tokens: int = 1024
    suffix_tokens: int = 96
    answer_tokens: int = 24
    full_requests: int = 40
    """How many requests at once measure what the machine can do."""
    round_s: float = 12.0


QUICK = Sizes(LLAMA, 2, 64, 40, 8, 8, 2.0)


class Latencies(NamedTuple):
    """The seconds to the first token of each request, and those between its tokens."""

    first_s: list[float]
    each_s: list[float]


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    sizes = QUICK if options.quick else Sizes()
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        folder = Path(name).absolute()
        model = make_tiny_model(folder / "model", sizes.model, "bfloat16")
        engines = {}
        for arm, connector in CONNECTORS.items():
            (folder / arm).mkdir()
            engine = VllmServe(_served(model, connector), folder / arm)
            engines[arm] = stack.enter_context(engine)
            engine.wait_ready()  # one after the other: each uses all CPUs to start
        load = _Load(sizes)
        for engine in engines.values():
            load.warm_up(engine)
        per_s = LOAD * statistics.median(load.capacity_per_s(e) for e in engines.values())
        rounds = _rounds(engines, load, per_s, 1 if options.quick else options.repeats)
        if hits := engines["FlexKV"].counted(LOADED):
            raise RuntimeError(f"FlexKV loaded {hits:.0f} tokens, so its overhead was not measured")
    return {"requests/s": per_s, **_figures(rounds)}


def _served(model: Path, connector: dict[str, Any] | None) -> Served:
    arguments = (
        "--dtype", "bfloat16", "--kv-cache-memory-bytes", str(1 << 30),
        "--block-size", str(BLOCK_SIZE), "--max-model-len", "2048",
        "--max-num-seqs", str(RUNNING_MAX),
    )  # fmt: skip
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    cache = {"num_cpu_blocks": 2048, "num_ssd_blocks": 0}
    return Served(model, connector, {"cache_config": cache}, arguments, environment)


class _Load:
    """Prompts that begin with one of a few prefixes, each with a suffix of its own."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self._words = sizes, random.Random(0)
        self._prefixes = [self._some(sizes.prefix_tokens) for _ in range(sizes.prefixes)]

    def _some(self, count: int) -> list[int]:
        return [self._words.randrange(3, 1000) for _ in range(count)]

    def prompt(self) -> list[int]:
        """Return a prompt that begins with one of the prefixes and is otherwise new."""
        return self._words.choice(self._prefixes) + self._some(self.sizes.suffix_tokens)

    def warm_up(self, engine: VllmServe) -> None:
        """Have an engine compute every prefix."""
        for prefix in self._prefixes:
            engine.first_token_s(prefix + self._some(self.sizes.suffix_tokens))

    def capacity_per_s(self, engine: VllmServe) -> float:
        """Return how many requests per second an engine answers at most."""
        prompts = [self.prompt() for _ in range(self.sizes.full_requests)]
        begin_s = time.perf_counter()
        with ThreadPoolExecutor(RUNNING_MAX) as pool:
            list(pool.map(lambda prompt: self._ask(engine, prompt), prompts))
        return len(prompts) / (time.perf_counter() - begin_s)

    def arriving(self, per_s: float) -> list[tuple[float, list[int]]]:
        """Return the prompts of a round, each with the second in which it arrives."""
        count = max(1, round(per_s * self.sizes.round_s))
        at_s = sorted(self._words.uniform(0, self.sizes.round_s) for _ in range(count))
        return [(each_s, self.prompt()) for each_s in at_s]

    def run(self, engine: VllmServe, arriving: list[tuple[float, list[int]]]) -> Latencies:
        """Ask an engine for a round of prompts, each at its time, and return the latencies."""
        begin_s = time.perf_counter()
        with ThreadPoolExecutor(len(arriving)) as pool:
            asked = []
            for at_s, prompt in arriving:
                time.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
                asked.append(pool.submit(self._ask, engine, prompt))
            took = [each.result() for each in asked]
        return Latencies([first_s for first_s, _ in took], [each_s for _, each_s in took])

    def _ask(self, engine: VllmServe, prompt: list[int]) -> tuple[float, float]:
        """Return the seconds to the first token, and the mean of those between two tokens."""
        tokens = self.sizes.answer_tokens
        first_s, *_, last_s, _end_s = engine.arrivals_s(prompt, tokens)
        return first_s, (last_s - first_s) / (tokens - 1)


def _rounds(
    engines: dict[str, VllmServe], load: _Load, per_s: float, repeats: int
) -> list[dict[str, Latencies]]:
    """Return the latencies of each round, by engine; the first round is not counted."""
    rounds = []
    names = list(engines)
    for turn in range(repeats + 1):
        arriving = load.arriving(per_s)
        first = turn % len(names)
        told = {name: load.run(engines[name], arriving) for name in names[first:] + names[:first]}
        if turn:
            rounds.append(told)
    return rounds


def _figures(rounds: list[dict[str, Latencies]]) -> Figures:
    figures: Figures = {
        "requests of each engine": float(sum(len(r[LIMIT].first_s) for r in rounds))
    }
    p99 = {arm: percentile([s for r in rounds for s in r[arm].first_s], 99) for arm in CONNECTORS}
    for arm in CONNECTORS:
        first, each = ([statistics.median(r[arm][i]) for r in rounds] for i in (0, 1))
        figures[f"{arm}: TTFT p50, ms"] = 1e3 * statistics.median(first)
        figures[f"{arm}: TTFT p99, ms"] = 1e3 * p99[arm]
        figures[f"{arm}: TPOT p50, ms"] = 1e3 * statistics.median(each)
    for number, what in enumerate(("TTFT p50", "TPOT p50")):
        ratios = {
            arm: [
                statistics.median(r[arm][number]) / statistics.median(r[LIMIT][number])
                for r in rounds
            ]
            for arm in CONNECTORS
        }
        for arm in ("FlexKV", "none", CONTROL):
            figures[f"{arm} / {LIMIT}: {what}"] = statistics.median(ratios[arm])
        spread = max(abs(ratio - 1) for ratio in ratios[CONTROL])
        figures[f"{CONTROL} / {LIMIT}: {what}, furthest from 1"] = spread
    for arm in ("FlexKV", "none", CONTROL):
        figures[f"{arm} / {LIMIT}: TTFT p99"] = p99[arm] / p99[LIMIT]
    return figures
