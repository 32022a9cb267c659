"""Tests of a real `vllm serve` over HTTP, with stock flags and nothing of vLLM patched."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.errors import BackendUnavailableError
from flexkv.server.operator import command
from flexkv.testing.vllm_serve import (
    OWN,
    SHIM,
    Served,
    VllmServe,
    cached_tokens,
    completion,
    token_ids,
)

from .conftest import wait_gone
from .conversations import Conversations, Sizes
from .test_kills import eventually, processes_of

ARGUMENTS = (
    "--dtype", "float32", "--kv-cache-memory-bytes", str(16 << 20), "--block-size", "32",
    "--max-model-len", "1536", "--max-num-seqs", "4", "--enable-prompt-tokens-details",
)  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
SIZES = Sizes()

Serve = Callable[..., VllmServe]


@pytest.fixture
def serve(model: str, tmp_path: Path) -> Iterator[Serve]:
    """Yield a function that serves the model with a connector, always over the same folder."""
    cache = {"num_cpu_blocks": 1024, "num_ssd_blocks": 2048, "load_if_faster": False}
    settings = {"cache_config": cache, "server_answer_ms": 60_000}
    with ExitStack() as stack:

        def begin(connector: dict[str, Any], engines: int = 1) -> VllmServe:
            arguments = *ARGUMENTS, "--data-parallel-size", str(engines)
            served = Served(Path(model), connector, settings, arguments, ENVIRONMENT)
            engine = stack.enter_context(VllmServe(served, tmp_path))
            engine.wait_ready()
            wait_lent(engine, engines)
            return engine

        yield begin


def wait_lent(engine: VllmServe, engines: int) -> None:
    """Wait until FlexKV has the memory of every engine; they answer before that, too."""
    until_s = time.monotonic() + 60
    lent: dict[str, list[int]] = {}
    while lent != {str(number): [0] for number in range(engines)}:
        assert time.monotonic() < until_s, f"memory was not lent: {lent}"
        time.sleep(0.05)
        with suppress(BackendUnavailableError):
            instances = command(engine.address, "status")["instances"]
            lent = {number: instance["ranks"] for number, instance in instances.items()}


def by_curl(engine: VllmServe, prompt: list[int]) -> tuple[list[int], int]:
    """Ask by curl, as the documents do; return the answer and how many tokens were hit."""
    told = subprocess.run(
        ["curl", "-sS", "--fail-with-body", f"http://127.0.0.1:{engine.port}/v1/completions",
         "-H", "Content-Type: application/json",
         "-d", json.dumps(completion(prompt, SIZES.answer_tokens))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(told.stdout)
    return token_ids(answer), cached_tokens(answer)


def converse(engine: VllmServe, turns: int = SIZES.turns) -> Conversations:
    """Ask in every conversation at once, turn by turn, in the first by curl."""
    conversations = Conversations(SIZES)

    def ask(number: int) -> tuple[list[int], int]:
        prompt = conversations.prompts[number]
        if number == 0:
            return by_curl(engine, prompt)
        return engine.complete(prompt, SIZES.answer_tokens)

    with ThreadPoolExecutor(SIZES.conversations) as pool:
        for _ in range(turns):
            answered = list(pool.map(ask, range(SIZES.conversations)))
            conversations.answered([ids for ids, _ in answered], [hit for _, hit in answered])
    return conversations


def counted(engine: VllmServe, name: str) -> float:
    """Return a counter of vLLM's own endpoint."""
    said = engine.request("GET", "/metrics").decode()
    values = re.findall(rf"^{name}{{[^}}]*}} (\S+)$", said, re.MULTILINE)
    assert values, f"{name} is not among the metrics"
    return sum(map(float, values))


@pytest.mark.support(
    "feature",
    "`vllm serve` over HTTP, metrics on its `/metrics`",
    "served",
    "FlexKV's own metrics with its own connector",
)
def test_answers_over_http_are_equal_and_a_killed_engine_is_warm(
    serve: Serve, expected: dict[str, Any]
) -> None:
    """Answers over HTTP are equal, also from SSD after `kill -9` of every process."""
    engine = serve(SHIM)
    first = converse(engine)
    assert first.answers == expected["answers"]
    assert min(map(min, first.cached[1:])) > 0
    assert counted(engine, "vllm:external_prefix_cache_hits_total") > 1000
    command(engine.address, "flush")
    server = command(engine.address, "status")
    engine.kill()
    os.kill(server["pid"], signal.SIGKILL)

    engine = serve(OWN)
    again = converse(engine)
    assert again.answers == expected["answers"]
    assert min(map(min, again.cached)) > 0
    statistics = command(engine.address, "status")["statistics"]
    assert statistics["restored_blocks"] > 100
    assert statistics["routes"]["disk→host"]["blocks"] > 50
    assert counted(engine, "vllm:external_prefix_cache_hits_total") > 1000
    assert counted(engine, "flexkv_connector_loaded_blocks_total") > 100
    assert counted(engine, "flexkv_connector_failed_blocks_total") == 0


@pytest.mark.parametrize(
    "connector",
    [pytest.param(SHIM, id="shim", marks=pytest.mark.soak), pytest.param(OWN, id="own")],
)
def test_an_engine_that_is_terminated_leaves_what_it_had_on_ssd(
    serve: Serve, connector: dict[str, Any]
) -> None:
    """After SIGTERM to vLLM, which kills all its processes, the server flushes, and ends."""
    engine = serve(connector)
    conversations = converse(engine, turns=1)
    until_idle(engine)
    server = command(engine.address, "status")
    folder = Path(engine.address.removeprefix("ipc://")).parent
    assert server["pid"] not in processes_of(engine.pid)
    engine.terminate()
    wait_gone(server["pid"])
    eventually(lambda: not processes_of(engine.pid))
    assert list(folder.glob("socket*")) == []
    assert [path for path in Path("/dev/shm").iterdir() if "flexkv" in path.name] == []

    engine = serve(connector)
    statistics = command(engine.address, "status")["statistics"]
    assert statistics["restored_blocks"] == server["statistics"]["tiers"]["host"]["ready_blocks"]
    again = converse(engine, turns=1)
    assert again.answers == conversations.answers
    assert min(map(min, again.cached)) >= SIZES.first_tokens // 32 * 32


def until_idle(engine: VllmServe) -> None:
    """Wait until the server has no claims."""
    until_s = time.monotonic() + 100
    while command(engine.address, "status")["statistics"]["claims"]:
        assert time.monotonic() < until_s, "puts are under way still"
        time.sleep(0.05)


@pytest.mark.soak
@pytest.mark.support("feature", "data parallelism", "served")
def test_engines_of_one_vllm_share_a_server(serve: Serve, expected: dict[str, Any]) -> None:
    """Two data-parallel engines answer like one, and hit each other's blocks."""
    engine = serve(SHIM, engines=2)
    conversations = converse(engine, turns=3)
    assert conversations.answers == expected["answers"][:3]
    cached = 0
    for seed in range(1, 6):  # the kernel may keep a process from the CPU for a minute
        prompt = Conversations(Sizes(seed=seed)).prompts[0]
        answer, _ = engine.complete(prompt, SIZES.answer_tokens, dp_rank=0)
        until_idle(engine)
        again, cached = engine.complete(prompt, SIZES.answer_tokens, dp_rank=1)
        assert again == answer
        if cached:
            break
    assert cached == len(prompt) // 32 * 32
    instances = command(engine.address, "status")["instances"]
    assert [each["client"] for each in instances.values()] == [True, True]


def test_a_server_that_cannot_start_ends_the_start_of_vllm_with_its_reason(
    serve: Serve, tmp_path: Path
) -> None:
    """If the server cannot start, vLLM's start fails, and its log has the reason."""
    beyond = {"cpu_cache_gb": 1_000_000}
    with pytest.raises(RuntimeError):
        serve({**OWN, "kv_connector_extra_config": beyond})
    said = (tmp_path / "vllm.log").read_text()
    assert re.search(r"ConfigError: \S*cpu\S*=", said), said[-4000:]
    assert not (tmp_path / "socket").exists()
