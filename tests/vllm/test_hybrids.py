"""Tests that models with KV groups answer the same with FlexKV as without, on real engines.

Their weights are random and so wide that a wrong byte of any group changes answers, as the negative
controls show. Each asks 64 greedy requests in 8 growing conversations over a small device cache.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from .hybrid_models import HYBRIDS, reachable_blocks
from .hybrids import SEVERAL, Hybrids, case, check_sound, sizes_of

LATER = ("gemma3", "gemma4", "mistral", "qwen3_next")
"""The models whose runs with a connector that finds nothing are left to `make soak-vllm`."""
ALIKE = ("gemma3", "gpt_oss", "qwen3_next")
"""The models whose runs with FlexKV are left to it, too: they are slow, or similar to others."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.soak if each in LATER else ()) for each in HYBRIDS],
)
def test_a_connector_that_finds_nothing_changes_nothing(
    hybrids: Hybrids, tmp_path: Path, name: str
) -> None:
    """With a connector that keeps nothing, answers and local hits are those without one.

    vLLM looks for local hits in another way where there is a connector. Its groups are those that
    are known.
    """
    without = hybrids.answered(name, "small")
    assert without["groups"] == list(HYBRIDS[name].groups)
    told = hybrids.run(name, tmp_path, connector="nothing", **hybrids.small(name))
    assert told["answers"] == without["answers"]
    assert told["cached"] == without["cached"]
    assert told["leaked_blocks"] == 0


@pytest.mark.soak
def test_answers_in_bf16_do_not_depend_on_hits(hybrids: Hybrids) -> None:
    """Without a connector a prompt that is computed as a whole gets the answer of one that hits.

    Hence all runs with this model can be compared with one.
    """
    warm, cold = hybrids.answered("qwen3_next", "warm"), hybrids.answered("qwen3_next", "cold")
    assert min(chain(*warm["cached"][1:])) > max(chain(*cold["cached"])) == 0
    assert cold["answers"] == warm["answers"]


@pytest.mark.parametrize("name", [case(each, is_soak=each in ALIKE) for each in SEVERAL])
def test_answers_are_equal_and_later_turns_hit(hybrids: Hybrids, tmp_path: Path, name: str) -> None:
    """Answers are equal, and every later turn hits, from host memory and from SSD.

    Hits are as long as those of an endless device cache, and hardly more is stored than can be hit.
    """
    reachable = reachable_blocks(name, sizes_of(name))
    cache = {"num_cpu_blocks": reachable // HYBRIDS[name].host_share, "num_ssd_blocks": 4096}
    plan = hybrids.small(name)
    told = hybrids.run(name, tmp_path, connector="own", cache=cache, flush=True, **plan)
    check_sound(told)
    assert hybrids.wrong(name, told) == 0
    hits, warm = [[*chain(*each["cached"][1:])] for each in (told, hybrids.answered(name, "warm"))]
    # vLLM reports no hit of a request that it preempted after its load.
    assert hits.count(0) <= told["preemptions"]
    assert sum(told["external"]) > sum(map(sum, told["cached"])) // 2
    assert sum(hits) >= 0.98 * sum(local for local, hit in zip(warm, hits, strict=True) if hit)
    routes = told["server"]["statistics"]["routes"]
    assert routes["disk→host"]["blocks"] > 20
    assert routes["host→disk"]["blocks"] <= 1.2 * reachable
