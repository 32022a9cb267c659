"""Tests of engines that share a server or an SSD store, and of others that must share nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv.testing.tiny_model import make_tiny_model

from .conftest import External, Started, planned

Run = Callable[..., dict[str, Any]]

SHORT = {"conversations": 4, "turns": 3}
TP2: dict[str, Any] = {
    "engine": {"tensor_parallel_size": 2},
    "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}


@pytest.fixture
def server(model: str, model_file: Path, tmp_path: Path) -> Iterator[External]:
    """Yield a server in the folder that the engines of a test use."""
    settings = planned(model, tmp_path, {"cache": {"tokens_per_block": 32}})["settings"]
    server = External(model_file, settings)
    server.status()
    yield server
    assert server.end() == 0
    assert list(tmp_path.glob("socket*")) == []


def as_instance(number: int) -> dict[str, str]:
    """Return the environment of an engine that shares a server."""
    return {"FLEXKV_SERVER_LAUNCH_MODE": "external", "FLEXKV_INSTANCE_ID": str(number)}


def check_idle(told: dict[str, Any]) -> None:
    """Check that nothing of an engine's requests is left."""
    assert told["leaked_blocks"] == 0
    statistics = told["server"]["statistics"]
    assert (statistics["claims"], statistics["runs_in_flight"]) == (0, 0)


@pytest.mark.support("feature", "several engines at one server", "served")
def test_engines_share_a_server(
    start: Callable[..., Started], server: External, expected: dict[str, Any]
) -> None:
    """An engine hits in its first turn what another stored; each goes on when the other is gone."""
    first = start(connector="shim", environment=as_instance(0))
    told = first.answer()
    assert told["answers"] == expected["answers"]
    check_idle(told)
    second = start(connector="own", environment=as_instance(1))
    again = second.answer()
    assert again["answers"] == expected["answers"]
    check_idle(again)
    assert min(map(min, again["cached"])) > 0
    assert len(again["server"]["instances"]) == 2
    first.kill()
    third = start(connector="shim", environment=as_instance(0))
    assert third.answer()["answers"] == expected["answers"]


@pytest.mark.support("feature", "tensor parallelism", "served")
def test_two_ranks_answer_as_without_and_share_nothing_with_one(run: Run, model: str) -> None:
    """TP 2 answers as without FlexKV, and TP 1 over the same store finds nothing of it."""
    expected = run(connector="none", **SHORT, **TP2)
    told = run(connector="shim", **SHORT, **TP2)
    assert told["answers"] == expected["answers"]
    check_idle(told)
    assert min(map(min, told["cached"][1:])) > 0
    single = run(connector="shim", **SHORT)
    assert single["answers"] == run(connector="none", **SHORT)["answers"]
    assert max(single["cached"][0]) == 0
    check_idle(single)


OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"seed": 1},
    "dtype": {"engine": {"dtype": "bfloat16"}},
    "block size": {"engine": {"block_size": 64}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_engine_over_the_same_store_hits_nothing(
    run: Run, model: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, what: str
) -> None:
    """An engine of other weights, dtype or block size hits nothing, and harms no stored block."""
    other = dict(OTHERS[what])
    seed = other.pop("seed", 0)
    theirs = str(make_tiny_model(tmp_path_factory.mktemp("other") / "tiny", seed=seed))
    first = run(connector="shim", flush=True, **SHORT)
    told = run(connector="shim", model=theirs, **SHORT, **other)
    assert max(told["cached"][0]) == 0
    # With bf16, hits change the rounding, even those of vLLM's own cache.
    if what != "dtype":
        assert told["answers"] == run(connector="none", model=theirs, **SHORT, **other)["answers"]
    check_idle(told)
    again = run(connector="shim", **SHORT)
    assert again["answers"] == first["answers"]
    check_idle(again)
