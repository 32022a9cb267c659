"""Runs of the small models with several KV groups, and what their answers are compared with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain
from operator import ne
from pathlib import Path
from typing import Any

import pytest

from . import engine
from .conftest import planned, wait_gone
from .conversations import Sizes
from .engine import Plan, folder_of, scheduler_of
from .fork import Forked
from .hybrid_models import HYBRIDS, engine_of, groups_of, make, patch_vllm, why_not

SIZES = Sizes(first_tokens=300)
SEVERAL = [
    name
    for name, hybrid in HYBRIDS.items()
    if len(hybrid.groups) > 1 or hybrid.groups[0].kind == "SlidingWindow"
]
"""The models with several KV groups, or without full attention."""
support = pytest.mark.support
WINDOWS = support("model", "with sliding windows (Gemma 3 and 4, gpt-oss)")
STATES = support("model", "hybrid: attention and state layers (Nemotron-H, Qwen3-Next)")
SHOWN = {
    "gemma3": WINDOWS,
    "gemma4": WINDOWS,
    "gpt_oss": WINDOWS,
    "llama4": support("model", "with chunked attention (Llama 4)"),
    "mistral": support("model", "with sliding windows alone (Mistral 7B v0.1, Phi-3, StarCoder2)"),
    "qwen3_next": STATES,
    "nemotron_h": STATES,
}
"""The row of the support table that the tests with a model show."""

Told = dict[str, Any]


def run_plan(plan: dict[str, Any]) -> Generator[Told, Any, None]:
    """Run a plan in this process, yield its result and the engine's groups, and keep the engine."""
    patch_vllm()
    told = engine.run(Plan(**plan))
    yield {**told, "groups": groups_of(scheduler_of(engine.KEPT[-1]).kv_cache_config)}


class Hybrids:
    """Engines for the models, which are made once, and their answers without a connector."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._references: dict[tuple[str, str], Told] = {}
        making = Forked(folder / "make.log", make, str(folder))
        making.told()
        making.kill()

    def start(self, name: str, folder: Path, **plan: Any) -> Forked:
        """Start an engine that runs a plan, with FlexKV's files in a folder.

        The plan's `engine` overrides the model's own arguments.
        """
        if why_not(name):
            pytest.skip(why_not(name))
        plan = {**asdict(sizes_of(name)), "environment": dict(HYBRIDS[name].environment), **plan}
        plan["engine"] = {**engine_of(name), **plan.get("engine", {})}
        whole = planned(str(self._folder / name), folder, plan)
        process = Forked(folder_of(whole["settings"]) / "engine.log", run_plan, whole)
        self._stack.callback(process.kill)
        return process

    def run(self, name: str, folder: Path, **plan: Any) -> Told:
        """Run a plan to its end, and wait for the end of FlexKV's server."""
        process = self.start(name, folder, **plan)
        told: Told = process.told()
        process.kill()
        if "server" in told:
            wait_gone(told["server"]["pid"])
        return told

    def small(self, name: str, **engine: Any) -> dict[str, Any]:
        """Return the part of a plan that has a small device cache and the reference's script."""
        blocks = {"num_gpu_blocks_override": HYBRIDS[name].blocks}
        if not HYBRIDS[name].keeps:
            blocks["enable_prefix_caching"] = False
        return {"engine": {**blocks, **engine}, "script": self.script(name)}

    def emptied(self, name: str) -> dict[str, Any]:
        """Return the same with a large device cache that is emptied before each turn.

        It has blocks for all prompts of a turn at once, so vLLM cannot stand still, and no hit is
        local.
        """
        return {"forgets": True, "script": self.script(name)}

    def script(self, name: str) -> Any:
        """Return the answers of the reference, by which all other runs go on."""
        return self.answered(name, "warm")["answers"]

    def answered(self, name: str, how: str) -> Told:
        """Return what a model answers without a connector.

        Args:
            name: of the model.
            how: "warm" with a device cache that keeps everything; its answers are the script of
                all other runs. "small" with one that keeps little, "cold" with one that is emptied
                before each turn.
        """
        if (name, how) not in self._references:
            plans = {"warm": lambda _: {}, "small": self.small, "cold": self.emptied}
            folder = self._folder / f"{name}-{how}"
            folder.mkdir()
            self._references[name, how] = self.run(name, folder, **plans[how](name))
        return self._references[name, how]

    def wrong(self, name: str, told: Told) -> int:
        """Return how many answers are not those of an engine without a connector."""
        return different(told["answers"], self.answered(name, "warm")["answers"])


def case(name: str, *more: Any, is_soak: bool = False) -> Any:
    """Return a test's parameters that begin with a model, and show its row of the support table."""
    marks = [SHOWN[name]] if name in SHOWN else []
    return pytest.param(name, *more, marks=[*marks, pytest.mark.soak] if is_soak else marks)


def sizes_of(name: str) -> Sizes:
    """Return the sizes of a model's conversations."""
    return replace(SIZES, answer_tokens=HYBRIDS[name].answer_tokens)


def different(answers: list[Any], others: list[Any]) -> int:
    """Return how many answers differ, over all turns."""
    return sum(map(ne, chain(*answers), chain(*others)))


def check_sound(told: Told) -> None:
    """Check that no block of the device, no claim and no run is left."""
    assert told["leaked_blocks"] == 0
    statistics = told["server"]["statistics"]
    assert statistics["claims"] == 0
    assert statistics["runs_in_flight"] == 0
