"""What more boundaries bring for models with state layers: hit tokens against bytes stored.

A prefix of such a model can be hit only where its states were kept. vLLM keeps them at the end of a
prompt, and with `--prefix-cache-retention-interval` once in each interval of tokens, too. Some
prompts of these conversations continue the last one. Others go back: they part from it somewhere in
its second half, as when a user edits a message. The device cache is emptied before each turn, so
all hits are FlexKV's. Both figures are relative to those of an interval of one block, with which
every block boundary can be hit. Needs vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Options

MODELS = {"nemotron_h": 32, "qwen3_next": 96}
"""Models, and the tokens of their blocks."""
INTERVALS = (1, 2, 4, 8, 0)
"""In blocks; 0 keeps only the ends of prompts."""
CONVERSATIONS, TURNS, FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 4, 10, 400, 80, 8
GOES_BACK = 1 / 3
"""The share of turns that part from their conversation."""
RUN_S = 600.0


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    from tests.vllm.hybrid_models import make

    turns = 3 if options.quick else TURNS
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name).absolute()
        _told(folder, make, str(folder))
        figures: Figures = {}
        for model, block_tokens in MODELS.items():
            found = {n * block_tokens: _found(folder, model, n, turns) for n in INTERVALS}
            (all_hits, most_bytes), *_ = found.values()
            for interval, (hits, stored) in found.items():
                label = f"{model}, {f'each {interval} tokens' if interval else 'ends of prompts'}"
                figures[f"{label}: hit tokens"] = hits / all_hits
                figures[f"{label}: bytes stored"] = stored / most_bytes
    return figures


def _told(folder: Path, work: Any, *arguments: Any) -> Any:
    """Run a generator in a process of its own, and return what it yields first."""
    from tests.vllm.fork import Forked

    process = Forked(folder / "log", work, *arguments)
    try:
        return process.told(RUN_S)
    finally:
        process.kill()


def _found(folder: Path, model: str, interval: int, turns: int) -> tuple[int, int]:
    """Return how many tokens were hit, and how many bytes were stored, with an interval."""
    from tests.vllm.conftest import planned
    from tests.vllm.hybrid_models import HYBRIDS, engine_of

    own = folder / f"{model}-{interval}"
    own.mkdir()
    tokens = interval * MODELS[model]
    plan = planned(
        str(folder / model),
        own,
        {
            "connector": "own",
            "cache": {"num_cpu_blocks": 8192, "num_ssd_blocks": 0},
            "environment": dict(HYBRIDS[model].environment),
            "engine": {**engine_of(model), "prefix_cache_retention_interval": tokens},
            "turns": turns,
        },
    )
    hits, stored = _told(own, asked, plan)
    return hits, stored


def asked(plan: dict[str, Any]) -> Generator[tuple[int, int], Any, None]:
    """Ask an engine in this process, and yield how many tokens it hit, and the bytes stored."""
    from vllm import SamplingParams

    from flexkv.server.operator import command
    from tests.vllm.engine import Plan, finish, scheduler_of, settled, started
    from tests.vllm.hybrid_models import patch_vllm

    patch_vllm()
    run = Plan(**plan)
    llm = started(run)
    chance, hits = random.Random(0), 0
    sampling = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False
    )
    prompts = [_said(chance, FIRST_TOKENS) for _ in range(CONVERSATIONS)]
    for _ in range(run.turns):
        finish(llm)
        command(run.settings["server_recv_port"], "flush")
        assert scheduler_of(llm).reset_prefix_cache()
        asks = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for number, output in enumerate(llm.generate(asks, sampling, use_tqdm=False)):
            hits += output.num_cached_tokens or 0
            prompt = prompts[number] + list(output.outputs[0].token_ids)
            if chance.random() < GOES_BACK:
                prompt = prompt[: chance.randint(len(prompt) // 2, len(prompt))]
            prompts[number] = prompt + _said(chance, TURN_TOKENS)
    finish(llm)
    routes = settled(run)["statistics"]["routes"]
    with closing(llm.llm_engine.engine_core):
        yield hits, routes["device→host"]["bytes"]


def _said(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, 1000) for _ in range(count)]
