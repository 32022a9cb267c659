"""Scenarios of FlexKV as one of several connectors: after `test_multi_connector`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.metrics.stats import SchedulerStats

from .conftest import Make
from .stand import CONNECTORS, PER_BLOCK, WAITING, Stand

TOKENS = 3 * PER_BLOCK + 1
ROLE = {"kv_role": "kv_both"}


def other(folder: Path) -> dict[str, Any]:
    """Return another connector: vLLM's example, which has no blocks, and counts its calls."""
    extra = {"name": "other", "shared_storage_path": str(folder / "example")}
    return {"kv_connector": "TestExampleConnector", "kv_connector_extra_config": extra, **ROLE}


@pytest.fixture(params=["first", "second"])
def several(request: pytest.FixtureRequest, make: Make, connector: str, tmp_path: Path) -> Stand:
    """Return an engine with two connectors."""
    children = [{**CONNECTORS[connector], **ROLE}, other(tmp_path)]
    if request.param == "second":
        children.reverse()
    return make(
        over={"kv_connector": "MultiConnector"},
        kv_connector_extra_config={"connectors": children},
        kv_load_failure_policy="recompute",
        disable_hybrid_kv_cache_manager=True,
    )


def test_loads_and_puts_go_on_beside_another(several: Stand) -> None:
    """A prompt is stored and loaded beside another connector, and everything is free again."""
    stand = several
    stand.store(1, TOKENS)
    stand.copies.holds_loads = True
    request = stand.add(1, TOKENS, max_tokens=3)
    stand.step()
    assert request.status is WAITING
    stand.copies.release()
    stand.run()
    assert len(stand.copies.device_blocks) == 1
    stand.check_empty()


def test_failures_are_told_beside_another(several: Stand) -> None:
    """Failed loads are reported beside another connector, and what failed is computed."""
    stand = several
    stand.store(1, TOKENS)
    stand.copies.loads_fail = lambda blocks: True
    stand.add(1, TOKENS)
    assert stand.until(lambda: stand.step().told.invalid_block_ids)
    stand.run()
    stand.check_empty()


class Sync:
    """A fake, in place of the other connector, that loads within a step, and whose loads fail."""

    def __init__(self, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
        self._stand, self._found, self._wanted = stand, 3 * PER_BLOCK, True
        (scheduler,) = _others(stand.scheduler.connector)
        (worker,) = _others(stand.worker)
        monkeypatch.setattr(scheduler, "get_num_new_matched_tokens", self.match)
        monkeypatch.setattr(scheduler, "update_state_after_alloc", lambda *_: None)
        monkeypatch.setattr(worker, "start_load_kv", lambda *_, **__: None)
        monkeypatch.setattr(worker, "get_block_ids_with_load_errors", self.failed)
        self._blocks: set[int] = set()

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        """Claim three blocks, once."""
        found = self._found if self._wanted else 0
        self._wanted, self._request = False, request
        return found, False

    def failed(self) -> set[int]:
        """Return, at the end of the step, all three blocks as failed."""
        if self._found:
            self._found = 0
            time.sleep(0.2)  # puts that were reported as ready are stored by now
            return set(self._stand.blocks_of(self._request)[:3])
        return set()


def _others(connectors: Any) -> list[Any]:
    return [c._connector for c in connectors.sub_connectors if hasattr(c, "call_record")]


def test_what_another_failed_to_load_is_not_stored(
    several: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that another connector failed to load are not stored, not even those of that step."""
    stand = several
    Sync(stand, monkeypatch)
    stand.unchecked = True
    stand.add(1, TOKENS)
    assert stand.step().told.invalid_block_ids
    stand.unchecked = False
    stand.run()
    assert stand.scheduler.reset_prefix_cache()
    stand.add(1, TOKENS, name="again")  # the forward checks what is loaded
    stand.run()
    assert len(stand.copies.device_blocks) == 1
    stand.check_empty()


def test_preemptions_are_told_to_all(several: Stand) -> None:
    """The runner reports preemptions to every connector before each step."""
    (counting,) = [c for c in several.worker.sub_connectors if hasattr(c, "call_record")]
    several.step()
    assert counting.call_record["handle_preemptions"] == 1
    assert counting.call_record["get_finished"] == 0
    assert counting.call_record["wait_for_save"] == 1


def test_a_match_that_another_wins_is_let_go(several: Stand) -> None:
    """If another connector's match is chosen, the hold of ours is released."""
    stand = several
    stand.store(1, TOKENS)
    request = stand.add(1, TOKENS)
    side = stand.side
    assert side.get_num_new_matched_tokens(request, 0) == (3 * PER_BLOCK, True)
    side.client.flush()
    stand.until(lambda: stand.statistics()["claims"] > 0)
    side.update_state_after_alloc(request, None, 0)
    side.client.flush()
    stand.until(lambda: stand.statistics()["claims"] == 0)
    stand.run()
    stand.check_empty()


def told(stand: Stand) -> list[dict[str, Any]]:
    """Store and load a prompt; return the statistics of each step, as vLLM sends them."""
    given = []
    for _ in range(2):
        stand.add(1, TOKENS)
        while stand.scheduler.has_requests():
            given.append(stand.step().given.scheduler_stats)
        assert stand.scheduler.reset_prefix_cache()
    assert all(isinstance(stats, SchedulerStats) for stats in given)
    return [stats.kv_connector_stats for stats in given if stats.kv_connector_stats]


@pytest.mark.parametrize("connector", ["own"], indirect=True)
def test_statistics_are_logged_beside_another(several: Stand) -> None:
    """Statistics are logged under the connector's name, as sums of plain numbers."""
    logging = KVConnectorLogging(several.config.kv_transfer_config)
    for data in told(several):
        assert set(data) == {"FlexKVConnector"}
        logging.observe(data)
    said: list[str] = []
    logging.log(lambda line, *args: said.append(line % args))
    assert "'loaded_blocks': 3" in said[0]
    assert "'stored_blocks': 3" in said[0]


@pytest.mark.parametrize("connector", ["own"], indirect=True)
def test_statistics_are_exported_beside_another(several: Stand) -> None:
    """Statistics are exported under FlexKV's own names, as without another connector."""
    metrics = KVConnectorProm(several.config, ["engine"], {0: ["0"]})
    try:
        for data in told(several):
            metrics.observe(data)
        value = REGISTRY.get_sample_value("flexkv_connector_loaded_blocks_total", {"engine": "0"})
        assert value == 3
    finally:
        for collector in list(REGISTRY._collector_to_names):
            if any(n.startswith("flexkv_") for n in REGISTRY._collector_to_names[collector]):
                REGISTRY.unregister(collector)


@pytest.mark.parametrize("connector", ["shim"], indirect=True)
def test_the_shim_tells_no_statistics_beside_another(several: Stand) -> None:
    """The shim reports no statistics beside another connector: vLLM could not read them."""
    assert told(several) == []
