"""The time that the connector adds to a step of vLLM's scheduler: 32 requests of 32k tokens.

A synthetic scheduler calls the hooks as vLLM does, over a real server, agent and KV caches. It
prefills one prompt at a time in chunks (every other prompt is known), decodes the others, and has
everything stored. Limit: 1 ms (p99). Needs vLLM in this Python for its classes.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness import Figures, Options, percentile
from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.server.agent import Agent

RUNNING, PROMPT_TOKENS, CHUNK_TOKENS, BLOCK = 32, 32_768, 8192, 16
ANSWER_TOKENS = 64
DECODE_S, PREFILL_TOKENS_PER_S = 0.005, 200_000
"""The time of a forward, as on a fast GPU: prefill is several times as fast as an 8B model's."""
MODEL = ModelConfig(num_layers=2, num_kv_heads=1, head_size=64, dtype="float16")


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        return _measure(Path(name).absolute(), 100 if options.quick else 1500)


@dataclass
class _Request:
    """The fields of vLLM's request that the connector reads."""

    request_id: str
    prompt_token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int = 0
    waits: bool = False
    lora_request: Any = None
    cache_salt: Any = None
    prompt_embeds: Any = None
    mm_features: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.all_token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class _Scheduler:
    """A scheduler that calls the hooks, and records the seconds that they took in each step."""

    def __init__(self, side: Any, agent: Agent, blocks: int) -> None:
        self._side, self._agent = side, agent
        self._free = list(range(blocks))
        self._held: dict[str, _Request] = {}
        self._running: dict[str, _Request] = {}
        self._loading: dict[str, _Request] = {}
        self._waiting: list[_Request] = []
        self._words = np.random.default_rng(0)
        self._known: list[list[int]] = []
        self.arrived = 0
        self.steps_s: list[float] = []
        self.loads = self.late = 0

    def _prompt(self) -> list[int]:
        if self.arrived % 2 and self._known:
            return list(self._known[self.arrived % len(self._known)])
        prompt: list[int] = self._words.integers(0, 100_000, PROMPT_TOKENS).tolist()
        self._known = [*self._known[-3:], prompt]
        return prompt

    def step(self) -> None:
        """Schedule a step, sleep as long as its forward takes, and process its output."""
        took, new = self._arrivals(), list(self._waiting)
        output = SimpleNamespace(
            scheduled_new_reqs=[], num_scheduled_tokens={}, scheduled_spec_decode_tokens={},
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
            ),
        )  # fmt: skip
        cached = output.scheduled_cached_reqs
        for request in self._running.values():
            left = request.num_tokens - request.num_computed_tokens
            cached.req_ids.append(request.request_id)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            after = request.num_computed_tokens + min(left, CHUNK_TOKENS)
            fresh = [self._free.pop() for _ in range(-(-after // BLOCK) - len(request.block_ids))]
            request.block_ids += fresh
            cached.new_block_ids.append((fresh,) if fresh else None)
            output.num_scheduled_tokens[request.request_id] = min(left, CHUNK_TOKENS)
        for request in [r for r in self._loading.values() if not r.waits]:
            del self._loading[request.request_id]
            new.append(request)
        for request in new:
            begin = time.perf_counter()
            if not request.num_computed_tokens:
                extra, _ = self._side.get_num_new_matched_tokens(request, 0)
                if extra is None:
                    self.late += 1
                    took += time.perf_counter() - begin
                    continue
                self._waiting.remove(request)
                blocks = -(-(extra or CHUNK_TOKENS) // BLOCK)
                request.block_ids = [self._free.pop() for _ in range(blocks)]
                told = SimpleNamespace(get_block_ids=lambda r=request: (r.block_ids,))
                self._side.update_state_after_alloc(request, told, extra)
                if extra:
                    self.loads += 1
                    request.num_computed_tokens, request.waits = extra, True
                    self._loading[request.request_id] = request
                    took += time.perf_counter() - begin
                    continue
            took += time.perf_counter() - begin
            left = min(CHUNK_TOKENS, request.num_tokens - request.num_computed_tokens)
            need = -(-(request.num_computed_tokens + left) // BLOCK) - len(request.block_ids)
            request.block_ids += [self._free.pop() for _ in range(need)]
            output.num_scheduled_tokens[request.request_id] = left
            output.scheduled_new_reqs.append(
                SimpleNamespace(
                    req_id=request.request_id, block_ids=(request.block_ids,),
                    num_computed_tokens=request.num_computed_tokens,
                )
            )  # fmt: skip
            self._running[request.request_id] = request
        begin = time.perf_counter()
        step = self._side.build_connector_meta(output)
        took += time.perf_counter() - begin
        prefilled = sum(n for n in output.num_scheduled_tokens.values() if n > 1)
        time.sleep(DECODE_S + prefilled / PREFILL_TOKENS_PER_S)
        self._agent.ready(step.puts)
        took += self._take(output, step)
        self.steps_s.append(took)

    def _prefilling(self) -> bool:
        return any(r.num_tokens - r.num_computed_tokens > 1 for r in self._running.values())

    def _arrivals(self) -> float:
        """Add a prompt if there is room for it, and return the seconds that its hook took.

        As in vLLM's engine, requests that arrived during a step are added right before the next.
        """
        is_full = len(self._running) + len(self._loading) >= RUNNING
        if is_full or self._prefilling() or self._waiting:
            return 0.0
        self.arrived += 1
        request = _Request(str(self.arrived), self._prompt(), [])
        self._waiting.append(request)
        begin = time.perf_counter()
        self._side.on_new_request(request)
        return time.perf_counter() - begin

    def _take(self, output: Any, step: Any) -> float:
        """Process the output of a step, and return the seconds that its hooks took."""
        for name in step.received:
            self._loading[name].waits = False
        for name in step.sent:
            self._free += self._held.pop(name).block_ids
        took = 0.0
        for name, count in output.num_scheduled_tokens.items():
            request = self._running[name]
            request.num_computed_tokens += count
            if request.num_computed_tokens == request.num_tokens:
                request.all_token_ids.append(7)
            if request.num_tokens > PROMPT_TOKENS + ANSWER_TOKENS:
                del self._running[name]
                begin = time.perf_counter()
                holds = self._side.request_finished(request)
                took += time.perf_counter() - begin
                if holds:
                    self._held[name] = request
                else:
                    self._free += request.block_ids
        begin = time.perf_counter()
        self._side.step_ended()
        return took + time.perf_counter() - begin


def _measure(folder: Path, steps: int) -> Figures:
    from flexkv.integration.vllm.scheduler import SchedulerSide
    from flexkv.integration.vllm.setup import Setup

    prompt_blocks = PROMPT_TOKENS // BLOCK
    device_blocks = (RUNNING + 8) * (prompt_blocks + ANSWER_TOKENS)
    cache = CacheConfig(
        tokens_per_block=BLOCK,
        num_cpu_blocks=24 * prompt_blocks,
        num_ssd_blocks=48 * prompt_blocks,
        ssd_cache_dir=str(folder),
    )
    settings = Settings(
        server_recv_port=f"ipc://{folder}/socket", cache_config=cache, log_level="error"
    )
    side = SchedulerSide(Setup(MODEL, settings, 0, launches=True))
    agent = Agent(settings.server_recv_port, MODEL, cache)
    shape = (2, device_blocks, BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    agent.start([np.zeros(shape, np.float16) for _ in range(MODEL.num_layers)])
    try:
        while not side._ready():
            time.sleep(0.01)
        scheduler = _Scheduler(side, agent, device_blocks)
        gc.collect()
        gc.freeze()  # as vLLM does when it has started
        for _ in range(steps):
            scheduler.step()
    finally:
        gc.unfreeze()
        agent.close()
        side.close()
    counted = scheduler.steps_s[len(scheduler.steps_s) // 10 :]
    return {
        "a step, p50, us": 1e6 * percentile(counted, 50),
        "p99, us": 1e6 * percentile(counted, 99),
        "most, us": 1e6 * max(counted),
        "p99 / 1 ms": percentile(counted, 99) / 1e-3,
        "loads": float(scheduler.loads),
        "prompts": float(scheduler.arrived),
        "late matches / prompts": scheduler.late / scheduler.arrived,
    }
