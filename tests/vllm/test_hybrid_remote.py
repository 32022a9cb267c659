"""Tests that engines of models with several KV groups share what they compute through a store.

Each engine has a server and host memory of its own, and no SSD.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .hybrid_models import HYBRIDS
from .hybrids import Hybrids, Told, case, check_sound, different

SIZES: dict[str, Any] = {"conversations": 4, "turns": 2, "first_tokens": 300, "turn_tokens": 60}


class Pair:
    """Two engines with the same model, the second of which begins when the first has ended."""

    def __init__(self, hybrids: Hybrids, name: str, folder: Path) -> None:
        self._hybrids, self._name, self._folder = hybrids, name, folder
        self.without = self._run("without")

    def _run(self, called: str, **plan: Any) -> Told:
        (folder := self._folder / called).mkdir()
        return self._hybrids.run(self._name, folder, **SIZES, **plan)

    def run(self, called: str, **plan: Any) -> Told:
        """Run an engine over the store that both share."""
        cache = {
            "num_ssd_blocks": 0, "enable_remote": True,
            "remote_cache_path": f"file://{self._folder}/shared",
        }  # fmt: skip
        rules = {"prefetch_stop": "complete"}
        return self._run(
            called, connector="own", cache=cache, settings=rules, script=self.without["answers"],
            **plan,
        )  # fmt: skip

    def wrong(self, told: Told) -> int:
        """Return how many answers are not those of an engine without a connector."""
        return different(told["answers"], self.without["answers"])


@pytest.mark.parametrize("name", [case("gpt_oss"), case("nemotron_h")])
def test_an_engine_hits_what_another_has_stored(
    hybrids: Hybrids, tmp_path: Path, name: str
) -> None:
    """An engine without blocks hits each prompt of another up to its last boundary.

    Prompts are left out for which vLLM offered the first engine no state there. Answers are those
    of an engine that computes everything. They are others if what is loaded is changed.
    """
    pair = Pair(hybrids, name, tmp_path)
    first = pair.run("first", flush=True)
    check_sound(first)
    assert pair.wrong(first) == 0
    routes = first["server"]["statistics"]["routes"]
    assert routes["host→remote"]["failed_ops"] == 0
    second = pair.run("second", lists=True)
    check_sound(second)
    assert pair.wrong(second) == 0
    groups, prompts = HYBRIDS[name].groups, SIZES["conversations"]
    block_tokens = max(group.block_tokens for group in groups)
    boundary = (SIZES["first_tokens"] - 1) // block_tokens * block_tokens
    not_offered = 0
    if groups[0].kind == "Mamba":
        states = first["server"]["statistics"]["tiers"]["host"]["group_blocks"][1]
        not_offered = prompts * SIZES["turns"] - states
    hits = prompts - not_offered
    assert hits > 0
    assert set(second["cached"][0]) <= {0, boundary}
    assert second["cached"][0].count(boundary) >= hits
    assert sum(second["external"]) >= hits * boundary
    fetched = second["server"]["statistics"]["routes"]["remote→host"]
    assert (fetched["blocks"] > 0, fetched["failed_ops"]) == (True, 0)
    spoiled = pair.run("spoiled", lists=True, corrupt_loads=True, group=1)
    assert pair.wrong(spoiled) > 0
