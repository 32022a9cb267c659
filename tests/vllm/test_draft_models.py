"""Tests of drafts with a KV cache: a draft model that is a copy of the model, so that it is right.

vLLM accepts nearly all of its drafts, as long as the KV of the drafts' layers is right, and next to
none where it is wrong; the answers are right either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]

SMALL, LARGE = 72, 1024
"""Device blocks: too few for the conversations, and more than enough."""
DRAFT_LAYERS = "draft_model."
BOTH = pytest.mark.parametrize("connector", [pytest.param("crude", marks=pytest.mark.soak), "own"])


@pytest.fixture
def drafted(run: Run, model: str) -> Run:
    """Return a function that runs a plan with drafts, over a device cache of a given size."""

    def once(blocks: int, **plan: Any) -> dict[str, Any]:
        drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
        engine = {"speculative_config": drafts, "num_gpu_blocks_override": blocks}
        return run(turns=4, first_tokens=300, engine=engine, **plan)

    return once


@pytest.fixture
def local(drafted: Run) -> dict[str, Any]:
    """Return a run with local hits only."""
    return drafted(LARGE, connector="none")


def accepted(told: dict[str, Any]) -> float:
    """Return the share of drafts that were accepted."""
    share: float = told["accepted"] / told["drafted"]
    return share


@pytest.mark.soak
def test_a_connector_that_finds_nothing_changes_nothing(drafted: Run) -> None:
    """With a connector that keeps nothing, answers, local hits and drafts are those without one."""
    without, told = (drafted(SMALL, connector=name) for name in ("none", "nothing"))
    for what in ("answers", "cached", "accepted", "drafted"):
        assert told[what] == without[what]
    assert told["leaked_blocks"] == 0


@pytest.mark.support(
    "feature",
    "drafts with a KV cache of their own: draft models",
    "served",
    "with its own connector",
)
@BOTH
def test_drafts_after_a_load_are_as_good_as_after_a_local_hit(
    drafted: Run, local: dict[str, Any], connector: str
) -> None:
    """As many drafts are accepted after external hits as after local ones; answers are equal."""
    told = drafted(SMALL, connector=connector)
    assert told["answers"] == local["answers"]
    assert min(map(min, told["cached"][1:])) > 0
    assert sum(told["external"]) > sum(map(sum, told["cached"])) // 2
    assert told["leaked_blocks"] == 0
    assert accepted(local) > 0.9
    assert abs(accepted(told) - accepted(local)) < 0.01


@BOTH
def test_corrupt_drafts_are_not_accepted(
    drafted: Run, local: dict[str, Any], connector: str
) -> None:
    """If the drafts' blocks are corrupt, drafts fail, and answers are right: they do no harm."""
    bad: dict[str, Any] = {"extra": {"corrupt_layers": DRAFT_LAYERS}}
    if connector == "own":
        bad = {"corrupt_loads": True, "layers": DRAFT_LAYERS}
    told = drafted(SMALL, connector=connector, **bad)
    assert told["answers"] == local["answers"]
    assert accepted(told) < accepted(local) - 0.3
