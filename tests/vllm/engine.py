"""Run conversations on a real vLLM engine in this process, and return the results.

One run is one process (`fork.py`): an engine cannot be started twice in one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexkv.common.errors import ConfigError
from flexkv.server import client
from flexkv.server.operator import command
from flexkv.testing.vllm_serve import OWN, SHIM
from tests.system.mounted import Disk
from tests.system.serving import eventually
from tests.vllm.conversations import Conversations, Sizes
from tests.vllm.division import DIVIDED, divide
from tests.vllm.fork import fork_workers
from tests.vllm.sabotage import LAYER_LOADS, flip, sabotage
from tests.vllm.watchdog import Watchdog

STAND_IN = {"kv_connector_module_path": "tests.vllm.stand_ins"}
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "none": None, "shim": SHIM, "own": OWN,
    "nothing": {**STAND_IN, "kv_connector": "Nothing"},
    "crude": {**STAND_IN, "kv_connector": "Crude", "kv_load_failure_policy": "recompute"},
}  # fmt: skip
READY_S, DONE_S, HANG_S = 100.0, 180.0, 180.0
"""Long, because engines that busy-wait may take all CPU time for a minute on Linux 6.18."""
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"
KEPT: list[Any] = []
"""Keeps engines alive: a collected engine would end, and its server with it."""


@dataclass(kw_only=True)
class Plan(Sizes):
    """What to run, beside the conversations' sizes."""

    model: str
    connector: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    """FlexKV's settings."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's `LLM` that override the usual ones."""
    corrupt_loads: bool = False
    """Whether loaded blocks are overwritten, as a negative control."""
    layers: str = ""
    """Only layers whose names contain this are overwritten; "" for all."""
    failed_loads: float = 0.0
    """The probability that a copy to the device fails."""
    cut_links: float = 0.0
    """The probability, for each copy, that the agent's connection is cut."""
    flip_files: str = ""
    """A folder in whose files bits are flipped after each turn."""
    group: int | None = None
    """The only KV group, by FlexKV's number, whose loads and files have the faults above."""
    disk: str = ""
    """The control file of the SSD tier's disk, whose reads fail with EIO in every other turn."""
    aborts: float = 0.0
    """The probability that a request is aborted in the middle, and asked again."""
    flush: bool = False
    """Whether to wait before each turn until everything is on SSD."""
    forgets: bool = False
    """Whether the device cache is emptied before each turn."""
    lists: bool = False
    """Whether to wait at first until the store of the remote tier was listed."""
    meets: bool = False
    """Whether to wait at first until it is known what another node has."""
    kills: dict[int, int] = field(default_factory=dict)
    """Processes that are killed before a turn, by turn."""
    naps: bool = False
    """Whether the engine's memory is taken back, overwritten and lent anew between turns."""
    events: str = ""
    """The address at which KV events are published."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that override the process's own."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The connector's `kv_connector_extra_config`."""
    kernel_tokens: int = 0
    """Tokens of the attention backend's blocks, if they are smaller than vLLM's."""
    script: list[list[list[int]]] = field(default_factory=list)
    """Answers by turn, by which conversations go on whatever the engine answers."""

    @property
    def has_server(self) -> bool:
        """Return whether the connector is FlexKV's."""
        return self.connector in ("shim", "own")


def folder_of(settings: dict[str, Any]) -> Path:
    """Return the folder of FlexKV's socket."""
    address: str = settings["server_recv_port"]
    return Path(address.removeprefix("ipc://")).parent


class Asking:
    """A driver of an engine in this process that asks in every conversation at once."""

    def __init__(self, plan: Plan, llm: Any) -> None:
        from vllm import SamplingParams

        self._plan, self._engine = plan, llm.llm_engine
        self._chance = random.Random(plan.seed + 1)
        self.sampling = SamplingParams(
            temperature=0, max_tokens=plan.answer_tokens, ignore_eos=True, detokenize=False
        )
        self.conversations = Conversations(plan)
        self.aborted = 0
        self.external: list[int] = []
        """Tokens by turn that the connector found."""

    def turn(self) -> None:
        """Run one turn: ask in every conversation, and record the answers."""
        engine, conversations = self._engine, self.conversations
        number = len(conversations.answers)
        before = counted(engine, EXTERNAL_HITS)
        wanted = {f"{number}-{i}": prompt for i, prompt in enumerate(conversations.prompts)}
        for name, prompt in wanted.items():
            self._ask(name, prompt)
        to_abort = [name for name in wanted if self._chance.random() < self._plan.aborts]
        done: dict[str, Any] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
                    if output.request_id in to_abort:
                        to_abort.remove(output.request_id)  # it has ended already
            steps += 1
            if to_abort and steps >= 3:
                name = to_abort.pop()
                done.pop(name, None)
                engine.abort_request([name])
                self.aborted += 1
                self._ask(name + "b", wanted[name])
        outputs = [done.get(name) or done[name + "b"] for name in wanted]
        conversations.answered(
            [list(output.outputs[0].token_ids) for output in outputs],
            [output.num_cached_tokens or 0 for output in outputs],
            self._plan.script[number] if self._plan.script else None,
        )
        self.external.append(counted(engine, EXTERNAL_HITS) - before)

    def _ask(self, name: str, prompt: list[int]) -> None:
        # A copy, since the prompt grows.
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, self.sampling)


def started(plan: Plan) -> Any:
    """Start an engine, and return it once its device is lent."""
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **plan.environment})
    if plan.has_server:
        config = folder_of(plan.settings) / "flexkv.json"
        config.write_text(json.dumps(plan.settings))
        os.environ["FLEXKV_CONFIG_PATH"] = str(config)
        sabotage(plan)
    from vllm import LLM

    fork_workers()
    engine = {
        "model": plan.model, "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "block_size": 32,
        "max_model_len": 1536, "max_num_seqs": 4, "disable_log_stats": False,
    }  # fmt: skip
    client.HANG_S = HANG_S
    chosen = CONNECTORS[plan.connector]
    if chosen is not None:
        engine["kv_transfer_config"] = {**chosen, "kv_role": "kv_both"}
        if plan.extra:
            engine["kv_transfer_config"]["kv_connector_extra_config"] = plan.extra
    if plan.events:
        engine["kv_events_config"] = {
            "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": plan.events,
        }  # fmt: skip
    llm = LLM(**{**engine, **plan.engine})
    KEPT.append(llm)
    pace(core_of(llm))
    Watchdog(core_of(llm))
    if plan.has_server:
        wait_ready(scheduler_of(llm))
    return llm


def core_of(llm: Any) -> Any:
    """Return the core of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core


def scheduler_of(llm: Any) -> Any:
    """Return the scheduler of an engine in this process."""
    return core_of(llm).scheduler


def pace(core: Any) -> None:
    """Make steps that compute nothing pause, as they do in a core in a process of its own.

    Without a pause such steps use all CPU time, so that what they wait for gets none.
    """
    step = core.step_fn

    def paced() -> tuple[Any, bool]:
        outputs, executed = step()
        if not executed and core.scheduler.has_requests():
            time.sleep(0.001)
        return outputs, executed

    core.step_fn = paced


def finish(llm: Any) -> None:
    """Step until the scheduler has no requests left: puts may still be under way."""
    scheduler, until_s = scheduler_of(llm), time.monotonic() + DONE_S
    while scheduler.has_requests():
        llm.llm_engine.step()
        assert time.monotonic() < until_s, f"not done after {DONE_S} s"


def run(plan: Plan) -> dict[str, Any]:
    """Run the plan, and return its results."""
    if plan.kernel_tokens:
        divide(plan.kernel_tokens)
    llm = started(plan)
    scheduler, asking = scheduler_of(llm), Asking(plan, llm)
    flips, flipped = random.Random(plan.seed + 2), 0
    if plan.lists:
        wait_listed(plan)
    if plan.meets:
        wait_met(plan)
    begin = time.monotonic()
    for number in range(plan.turns):
        prepare(plan, number)
        if plan.forgets:
            assert scheduler.reset_prefix_cache()
        asking.turn()
        if plan.naps:
            nap(llm)
        if plan.flip_files:
            flipped += flip(plan.flip_files, flips, plan.group)
    finish(llm)
    pool = scheduler.kv_cache_manager.block_pool
    told = {
        "answers": asking.conversations.answers,
        "cached": asking.conversations.cached,
        "external": asking.external,
        "aborted": asking.aborted,
        "flipped": flipped,
        "seconds": time.monotonic() - begin,
        "leaked_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "preemptions": counted(llm, "vllm:num_preemptions"),
        "drafted": counted(llm, "vllm:spec_decode_num_draft_tokens"),
        "accepted": counted(llm, "vllm:spec_decode_num_accepted_tokens"),
        "layer_loads": len(LAYER_LOADS),
        "divided": DIVIDED,
    }
    if plan.has_server:
        flush(plan)
        if plan.events:  # vLLM reports changes at the end of a step
            time.sleep(0.1)
            llm.generate({"prompt_token_ids": [5, 6, 7]}, asking.sampling)
        told["server"] = settled(plan)
    return told


def prepare(plan: Plan, turn: int) -> None:
    """Do what the plan says about the surroundings of the engine, before a turn."""
    if turn in plan.kills:
        os.kill(plan.kills[turn], signal.SIGKILL)
    if plan.flush:
        flush(plan)
    if plan.disk:
        Disk(Path(), Path(plan.disk)).suffers_from("read" if turn % 2 else "")


def settled(plan: Plan) -> Any:
    """Return the status of FlexKV's server once it has no claims and no runs."""

    def idle() -> Any:
        status = command(plan.settings["server_recv_port"], "status")
        statistics = status["statistics"]
        return not (statistics["claims"] or statistics["runs_in_flight"]) and status

    return eventually(idle, DONE_S)


def wait_listed(plan: Plan) -> None:
    """Wait until FlexKV's server knows what the store of the remote tier has."""

    def is_listed() -> bool:
        statistics = command(plan.settings["server_recv_port"], "status")["statistics"]
        return bool(statistics["stores"]["remote"]["listed_rounds"])

    eventually(is_listed, DONE_S)


def wait_met(plan: Plan) -> None:
    """Wait until FlexKV's server knows what another node has."""

    def is_met() -> bool:
        statistics = command(plan.settings["server_recv_port"], "status")["statistics"]
        nodes = statistics["cluster"]["state"]["nodes"]
        return any(node["spans"] and not node["is_behind"] for node in nodes)

    eventually(is_met, DONE_S)


def nap(llm: Any) -> None:
    """Put an engine to sleep as vLLM does, and wake it with nothing in its own cache."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler, connector = scheduler_of(llm), get_kv_transfer_group()
    finish(llm)
    assert llm.reset_prefix_cache()
    connector.unregister_kv_caches()
    connector.unregister_kv_caches()
    wait_ready(scheduler, False)
    for tensor in connector.worker._lent.values():
        tensor.fill_(7.0)
    connector.restore_kv_caches()
    wait_ready(scheduler)


def flush(plan: Plan) -> None:
    """Wait until what was put is on SSD."""
    try:
        command(plan.settings["server_recv_port"], "flush")
    except ConfigError:  # a failure to store is reported only once
        command(plan.settings["server_recv_port"], "flush")


def wait_ready(scheduler: Any, ready: bool = True) -> None:
    """Wait until the scheduler knows that the worker's device is lent, or is not."""
    connector = scheduler.connector
    side = getattr(connector, "_flexkv_connector", connector).scheduler
    until = time.monotonic() + READY_S
    while side._ready() is not ready:
        side._poll()
        assert time.monotonic() < until, f"lent is not {ready} within {READY_S} s"
        time.sleep(0.02)


def counted(engine: Any, name: str) -> int:
    """Return the value of one of vLLM's counters."""
    return sum(int(metric.value) for metric in engine.get_metrics() if metric.name == name)
