"""Tests that real engines share what they compute through a store, and go on without it.

Each engine has a server and host memory of its own, and no SSD. The blocks of a turn fill whole
spans, so each turn asks for some that no earlier turn has fetched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from flexkv.index.spans import SPAN_TOKENS_MAX
from tests.s3 import S3Server, running

from .conftest import Started, planned, wait_gone
from .test_outputs import check_sound, moved

Store: TypeAlias = tuple[S3Server | None, dict[str, Any]]
"""An S3 server or None, and the keys of a remote tier."""
BLOCK_TOKENS = 32
SIZES: dict[str, Any] = {
    "conversations": 4, "turns": 3, "first_tokens": 2 * SPAN_TOKENS_MAX + 8,
    "turn_tokens": SPAN_TOKENS_MAX, "answer_tokens": 12,
}  # fmt: skip
TURNS_WITH_STORE = 1
"""The turns that the second engine asks before its store dies."""


@pytest.fixture(scope="module")
def without(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the answers of an engine without a connector."""
    plan = {"connector": "none", **SIZES}
    engine = Started(planned(model, tmp_path_factory.mktemp("without"), plan))
    answer = engine.answer()
    engine.kill()
    return answer


@pytest.fixture(params=["s3", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Yield an S3 server or None, and the keys of a remote tier over an empty store."""
    if request.param == "directory":
        yield None, {"remote_cache_path": f"file://{tmp_path}/shared"}
        return
    with running() as s3:
        yield (
            s3,
            {
                "remote_cache_path": f"s3://{s3.new_bucket()}/kv/",
                "remote_config_custom": s3.custom,
            },
        )


@pytest.fixture
def engine(start: Callable[..., Started], tmp_path: Path) -> Callable[..., Started]:
    """Return a function that starts an engine with a folder of its own over a store."""

    def begin(name: str, remote: dict[str, Any], **plan: Any) -> Started:
        (folder := tmp_path / name).mkdir()
        cache = {"enable_remote": True, "num_ssd_blocks": 0, **remote}
        settings = {"server_recv_port": f"ipc://{folder}/socket", "prefetch_stop": "complete"}
        plan = {"connector": "own", "flush": True, **SIZES, **plan}
        return start(cache=cache, settings=settings, **plan)

    return begin


def spans_of(prompt_tokens: int) -> int:
    """Return how many tokens of a prompt are in its whole spans."""
    return prompt_tokens // SPAN_TOKENS_MAX * SPAN_TOKENS_MAX


def end(engine: Started, told: dict[str, Any]) -> None:
    """End an engine, and wait for its server."""
    engine.kill()
    wait_gone(told["server"]["pid"])


@pytest.mark.support("feature", "engines that share a store: S3, a shared directory", "served")
def test_an_engine_fetches_what_another_stored_until_the_store_dies(
    engine: Callable[..., Started],
    store: Store,
    without: dict[str, Any],
) -> None:
    """An engine without blocks hits all whole spans of another; it answers right when S3 dies."""
    s3, remote = store
    first = engine("first", remote)
    told = first.answer()
    check_sound(told, without)
    spans = spans_of(SIZES["first_tokens"]) // BLOCK_TOKENS
    assert moved(told)["host→remote"] >= SIZES["conversations"] * spans
    end(first, told)
    kills = {} if s3 is None else {TURNS_WITH_STORE: s3.pid}
    second = engine("second", remote, lists=True, kills=kills)
    told = second.answer()
    check_sound(told, without)
    assert set(told["cached"][0]) == {spans_of(SIZES["first_tokens"])}
    fetched = told["server"]["statistics"]["routes"]["remote→host"]
    assert fetched["blocks"] >= SIZES["conversations"] * spans
    # Only a living store has more than the engine itself has kept.
    tokens = SIZES["first_tokens"] + SIZES["answer_tokens"] + SIZES["turn_tokens"]
    if s3 is None:
        assert set(told["cached"][1]) == {spans_of(tokens)}
        assert fetched["failed_ops"] == 0
    else:
        assert max(told["cached"][1]) < spans_of(tokens)
        assert fetched["failed_ops"] > 0
    end(second, told)


@pytest.mark.parametrize("store", ["directory"], indirect=True)
def test_what_a_killed_engine_has_stored_is_fetched(
    engine: Callable[..., Started],
    store: Store,
    without: dict[str, Any],
) -> None:
    """After `kill -9` of an engine and its server, another one hits what they had stored."""
    _, remote = store
    first = engine("first", remote, flush=False)
    told = first.answer()
    os.kill(told["server"]["pid"], signal.SIGKILL)
    first.kill()
    second = engine("second", remote, lists=True)
    told = second.answer()
    check_sound(told, without)
    assert min(told["cached"][0]) == spans_of(SIZES["first_tokens"])
    assert told["server"]["statistics"]["routes"]["remote→host"]["failed_ops"] == 0
    end(second, told)
