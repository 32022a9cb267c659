"""A prompt is asked for when it arrives: what comes of it until it is scheduled."""

from __future__ import annotations

from typing import Any

import pytest

from tests.system.conftest import PER_BLOCK
from tests.system.serving import eventually

pytest.importorskip("vllm")

from flexkv.integration.common import pending_matches as questions

from .test_scheduler_side import Request, Rig, answered, output, rig, stored

__all__ = ["rig"]

pytestmark = pytest.mark.parametrize("rig", [0.0], indirect=True)  # no step waits at all


def holds(rig: Rig) -> int:
    """Return how many claims there are."""
    claims: int = rig.status()["claims"]
    return claims


def test_the_answer_is_there_when_the_prompt_is_scheduled(rig: Rig) -> None:
    """Nothing is asked a second time, and nothing is late."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.get_num_new_matched_tokens(request, 0) == (3 * PER_BLOCK, True)
    counts = rig.side.take_stats().reduce()
    assert (counts["matches"], counts["hits"], counts["offered_blocks"]) == (1, 1, 3)
    assert (counts["hit_rate"], counts.get("late_matches", 0)) == (1.0, 0)
    assert holds(rig) == 1


def test_blocks_that_the_device_has_are_not_offered(rig: Rig) -> None:
    """They were not known when the prompt arrived; the tiers are told of the others only."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    told: tuple[Any, bool] = None, False

    def asked() -> bool:
        nonlocal told
        told = rig.side.get_num_new_matched_tokens(request, PER_BLOCK)
        return told[0] is not None

    eventually(asked)
    assert told == (2 * PER_BLOCK, True)
    found = rig.side._tracked["b"].found
    assert found is not None
    assert found.by_tier == {"host": 2}
    eventually(lambda: holds(rig) == 1)  # what the first question held was released


def test_a_device_that_has_all_of_it_asks_no_more(rig: Rig) -> None:
    """And what the early answer holds is let go."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.get_num_new_matched_tokens(request, 3 * PER_BLOCK) == (0, False)
    rig.side.build_connector_meta(output())
    eventually(lambda: holds(rig) == 0)


def test_a_prompt_that_never_runs_leaves_nothing(rig: Rig) -> None:
    """It is aborted while it waits: no hold is left, and the server keeps no keys of it."""
    stored(rig)
    kept, known = dict(rig.side.client._prompts._known), set(rig.side._tracked)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.client._prompts._known != kept
    assert rig.side.request_finished(request) is False
    rig.side.build_connector_meta(output())
    eventually(lambda: holds(rig) == 0)
    assert rig.side.client._prompts._known == kept
    assert set(rig.side._tracked) == known


def test_an_answer_that_has_grown_old_is_asked_anew(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt may wait in vLLM's queue for minutes: it holds nothing for so long."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    monkeypatch.setattr(questions, "KEPT_S", 0.0)
    rig.side.build_connector_meta(output())
    eventually(lambda: holds(rig) == 0)
    monkeypatch.undo()
    assert answered(rig, request) == (3 * PER_BLOCK, True)


def test_a_reset_between_arrival_and_schedule_is_heard(rig: Rig) -> None:
    """Nothing is offered that is gone by then."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.reset_cache()
    assert answered(rig, request) == (0, False)


def test_many_that_arrive_at_once_are_asked_for_later(rig: Rig) -> None:
    """Few questions are under way at once; the others are asked when they are scheduled."""
    stored(rig)
    requests = [Request(f"{n}") for n in range(2 * questions.ASKED_MAX)]
    for request in requests:
        rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == questions.EARLY_MAX)
    for request in requests[: questions.ASKED_MAX]:
        rig.side.request_finished(request)
    assert answered(rig, requests[-1]) == (3 * PER_BLOCK, True)
