"""Tests that a real engine's answers are the same with FlexKV as without, for less computation.

The model is fp32 and greedy, with weights so wide that a wrong block changes the answer, as the
negative control shows. Eight conversations have eight turns each, whose KV is many times what the
engine's own cache holds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkv.testing.tiny_model import make_tiny_model
from tests.system.mounted import mounted_disk

from .conversations import Sizes

Run = Callable[..., dict[str, Any]]


def moved(told: dict[str, Any]) -> dict[str, int]:
    """Return how many blocks each route has moved."""
    routes = told["server"]["statistics"]["routes"]
    return {route: counts["blocks"] for route, counts in routes.items()}


def check_sound(told: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that the answers are right, and that no block, claim or run is left."""
    assert told["answers"] == expected["answers"]
    assert told["leaked_blocks"] == 0
    statistics = told["server"]["statistics"]
    assert statistics["claims"] == 0
    assert statistics["runs_in_flight"] == 0


@pytest.mark.support("model", "decoders with full attention (Llama, Qwen, OPT)", "served")
@pytest.mark.parametrize("connector", ["shim", "own"])
def test_answers_are_equal_and_later_turns_hit(
    run: Run, expected: dict[str, Any], connector: str
) -> None:
    """Answers are equal, and every turn but the first hits in every conversation."""
    told = run(connector=connector)
    check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0
    # The engine's own cache alone hits less.
    assert sum(map(sum, told["cached"])) > 2 * sum(map(sum, expected["cached"]))
    assert moved(told)["host→device"] > 1000


def test_answers_are_equal_where_prompts_are_put_off(run: Run, expected: dict[str, Any]) -> None:
    """Answers are equal if no step waits for the server, so that prompts are put off."""
    told = run(connector="own", settings={"match_wait_ms": 0})
    check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0
    assert sum(map(sum, told["cached"])) > 2 * sum(map(sum, expected["cached"]))
    assert moved(told)["host→device"] > 500


def test_answers_are_equal_from_ssd(run: Run, expected: dict[str, Any]) -> None:
    """Answers are equal if nearly all hits come from SSD."""
    told = run(connector="shim", cache={"num_cpu_blocks": 80}, flush=True)
    check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0
    assert moved(told)["disk→host"] > 500


def test_corrupt_blocks_change_the_answers(run: Run, expected: dict[str, Any]) -> None:
    """Corrupt blocks change the answers: the negative control."""
    told = run(connector="shim", corrupt_loads=True)
    wrong = [
        one != other
        for ours, theirs in zip(told["answers"][1:], expected["answers"][1:], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    assert sum(wrong) > len(wrong) // 2


@pytest.mark.support("feature", "a warm start from SSD, after `kill -9` too", "served")
def test_an_engine_that_was_killed_is_warm_from_ssd(
    run: Run, start: Callable[..., Any], expected: dict[str, Any]
) -> None:
    """After `kill -9` of all processes a new engine on the same directory is warm from SSD."""
    first = start(connector="shim", flush=True)
    told = first.answer()
    os.kill(told["server"]["pid"], signal.SIGKILL)
    first.kill()
    again = run(connector="shim")
    check_sound(again, expected)
    assert again["server"]["statistics"]["restored_blocks"] > 100
    assert min(again["cached"][0]) > 0
    assert moved(again)["disk→host"] > 50


@pytest.mark.support("feature", "weights that are exchanged on disk between two starts", "served")
def test_weights_that_were_exchanged_find_nothing_of_the_old_ones(
    run: Run, model: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Weights exchanged in place, with the same size and time, find none of the old blocks."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    run(model=str(folder), connector="shim", flush=True)
    file = folder / "model.safetensors"
    before = file.stat()
    make_tiny_model(folder, seed=1)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    without = run(model=str(folder), connector="none")
    assert without["answers"] != expected["answers"]
    told = run(model=str(folder), connector="shim")
    check_sound(told, without)
    assert told["server"]["statistics"]["restored_blocks"] == 0


@pytest.mark.support(
    "feature",
    "sleep mode",
    "served",
    "from vLLM 0.33 on, with its own connector",
)
def test_an_engine_that_slept_loads_what_it_had(run: Run, expected: dict[str, Any]) -> None:
    """An engine loads what it had after its KV tensors were taken back and overwritten."""
    told = run(connector="own", naps=True)
    check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0


@pytest.mark.support("feature", "drafts without a KV cache (`ngram`, `suffix`)", "served")
def test_answers_are_equal_where_drafts_are_made(run: Run, expected: dict[str, Any]) -> None:
    """With n-gram drafts answers are equal, and every whole block is stored."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2,
              "prompt_lookup_min": 1}  # fmt: skip
    told = run(connector="shim", engine={"speculative_config": drafts})
    check_sound(told, expected)
    # A turn's prompt is the one before and its answer, whose last token is not computed.
    sizes = Sizes()
    for turn in range(1, sizes.turns):
        before = sizes.first_tokens + (turn - 1) * (sizes.turn_tokens + sizes.answer_tokens)
        stored = (before + sizes.answer_tokens - 1) // 32 * 32
        assert min(told["cached"][turn]) >= stored


LONG: dict[str, Any] = {
    "turns": 3, "first_tokens": 200, "turn_tokens": 40, "answer_tokens": 150,
    "engine": {"max_model_len": 1024, "max_num_batched_tokens": 256},
}  # fmt: skip


BY_LAYER: dict[str, Any] = {"connector": "own", "settings": {"enable_layerwise_transfer": True}}


@pytest.mark.support("feature", "loads layer by layer", "served", "with its own connector")
@pytest.mark.parametrize("is_corrupt", [False, True], ids=["", "corrupt"])
def test_answers_are_equal_where_steps_load_layer_by_layer(
    run: Run, expected: dict[str, Any], is_corrupt: bool
) -> None:
    """Answers are equal if steps wait for layers; corrupt layers change them, as they should."""
    told = run(**BY_LAYER, corrupt_loads=is_corrupt)
    assert told["layer_loads"] > 30
    if is_corrupt:
        assert told["answers"] != expected["answers"]
        return
    check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0


BY_LAYER_FAULTS: dict[str, dict[str, Any]] = {
    "failed_loads": {"failed_loads": 0.02},
    "everything": {
        "failed_loads": 0.01, "cut_links": 0.005, "aborts": 0.3,
        "cache": {"num_cpu_blocks": 160, "num_ssd_blocks": 512},
        "engine": {"kv_cache_memory_bytes": 8 << 20, "max_num_batched_tokens": 256},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BY_LAYER_FAULTS)
def test_faults_in_steps_that_load_layer_by_layer_change_no_answer(
    run: Run, expected: dict[str, Any], name: str
) -> None:
    """Where loads in steps fail, what these steps have computed is not used and not stored."""
    told = run(**BY_LAYER, **BY_LAYER_FAULTS[name])
    check_sound(told, expected)
    assert told["layer_loads"] > 0


@pytest.mark.support("feature", "chunked prefill, preemption", "served")
@pytest.mark.parametrize("faults", [{}, {"failed_loads": 0.1, "aborts": 0.2}], ids=["", "faults"])
def test_preempted_requests_answer_the_same(run: Run, faults: dict[str, Any]) -> None:
    """Requests that are preempted often, in a small pool, give the same answers."""
    expected = run(connector="none", **LONG)
    engine = {**LONG["engine"], "kv_cache_memory_bytes": 5 << 20}
    told = run(connector="shim", **{**LONG, **faults, "engine": engine})
    check_sound(told, expected)
    assert told["preemptions"] > 5


FAULTS: dict[str, dict[str, Any]] = {
    "failed_loads": {"failed_loads": 0.2},
    "cut_links": {"cut_links": 0.02},
    "flipped_bits": {"cache": {"num_cpu_blocks": 80}, "flip": True, "flush": True},
    "full_tiers": {"cache": {"num_cpu_blocks": 48, "num_ssd_blocks": 64}},
    "small_pool": {"engine": {"kv_cache_memory_bytes": 8 << 20, "max_num_batched_tokens": 256}},
    "aborts": {"aborts": 0.4, "engine": {"max_num_batched_tokens": 256}},
    "everything": {
        "failed_loads": 0.1, "cut_links": 0.01, "aborts": 0.3,
        "cache": {"num_cpu_blocks": 80, "num_ssd_blocks": 256},
        "engine": {"kv_cache_memory_bytes": 8 << 20, "max_num_batched_tokens": 256},
    },
}  # fmt: skip


@pytest.mark.support("feature", "aborted requests; `kv_load_failure_policy: recompute`", "served")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_cost_time_never_answers(
    run: Run, expected: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Faults change no answer, and leave every block free."""
    plan = dict(FAULTS[name])
    if plan.pop("flip", False):
        plan["flip_files"] = str(tmp_path)
    told = run(connector="shim", **plan)
    check_sound(told, expected)
    seen = {what: told[what] for what in ("aborted", "preemptions", "seconds")}
    (tmp_path / "seen.json").write_text(json.dumps({**seen, **moved(told)}))


def test_a_disk_that_fails_costs_time_never_answers(
    run: Run, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Failing reads of the SSD tier, in every other turn, change no answer."""
    with mounted_disk(tmp_path) as disk:
        cache = {"num_cpu_blocks": 80, "ssd_cache_dir": str(disk.mounted)}
        told = run(connector="shim", cache=cache, flush=True, disk=str(disk.control))
        check_sound(told, expected)
        assert told["server"]["statistics"]["routes"]["disk→host"]["failed_ops"] > 0
        assert moved(told)["disk→host"] > 0
