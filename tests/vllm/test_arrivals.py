"""Tests of prompts that are asked for when they arrive, until they are scheduled."""

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
    """The answer to the question at a prompt's arrival is used when the prompt is scheduled."""
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
    """Blocks that the device has are not offered; a new question asks for the others only."""
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
    found = rig.side._states["b"].transfers.found
    assert found is not None
    assert found.by_tier == {"host": 2}
    eventually(lambda: holds(rig) == 1)  # what the first question held was released


def test_a_device_that_has_all_of_it_asks_no_more(rig: Rig) -> None:
    """If the device has all of a prompt, the hold of the early answer is released."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.get_num_new_matched_tokens(request, 3 * PER_BLOCK) == (0, False)
    rig.side.build_connector_meta(output())
    eventually(lambda: holds(rig) == 0)


def test_a_prompt_that_never_runs_leaves_nothing(rig: Rig) -> None:
    """A prompt aborted before it ran leaves no hold, and the server keeps none of its keys."""
    stored(rig)
    kept, known = dict(rig.side.client._prompts._known), set(rig.side._states)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.client._prompts._known != kept
    assert rig.side.request_finished(request) is False
    rig.side.build_connector_meta(output())
    eventually(lambda: holds(rig) == 0)
    assert rig.side.client._prompts._known == kept
    assert set(rig.side._states) == known


def test_an_answer_that_has_grown_old_is_asked_anew(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An early hold ends after a while, since vLLM may queue prompts for minutes."""
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
    """After a reset between arrival and schedule nothing is offered."""
    stored(rig)
    request = Request("b")
    rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == 1)
    assert rig.side.reset_cache()
    assert answered(rig, request) == (0, False)


def test_many_that_arrive_at_once_are_asked_for_later(rig: Rig) -> None:
    """Only some of many arriving prompts are asked for at once; others when they are scheduled."""
    stored(rig)
    requests = [Request(f"{n}") for n in range(2 * questions.ASKED_MAX)]
    for request in requests:
        rig.side.on_new_request(request)
    eventually(lambda: holds(rig) == questions.EARLY_MAX)
    for request in requests[: questions.ASKED_MAX]:
        rig.side.request_finished(request)
    assert answered(rig, requests[-1]) == (3 * PER_BLOCK, True)
