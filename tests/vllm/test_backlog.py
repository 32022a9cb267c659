"""Tests of more prompts than are served: none waits in the queue without bound."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from flexkv.server.wire import Matched
from tests.system.conftest import MODEL, PER_BLOCK
from tests.system.serving import settings_in

pytest.importorskip("vllm")

from flexkv.integration.common import pending_matches as questions
from flexkv.integration.common.pending_matches import ASKED_MAX, EARLY_MAX
from flexkv.integration.vllm import scheduler
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import Setup
from flexkv.server.client import Client

from .test_scheduler_side import Request, output


class Server(Client):
    """A client whose questions are answered only when the test says so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_ready, self.asked, self.told = True, list[int](), set[int]()

    def ask(
        self, keys: Any, first: int = 0, hold: bool = False, tell: bool = False, drop: int = 0,
        **far: bool,
    ) -> int:  # fmt: skip
        """Record the question, and return its number."""
        number = self.number()
        self.asked.append(number)
        return number

    def answer(self, number: int, wait_s: float = 0.0) -> Matched | None:
        """Return three blocks, if the test has released the answer."""
        if number not in self.told:
            return None
        self.asked.remove(number)
        return Matched(number, 3, {"host": 3})

    def release(self, numbers: Iterable[int]) -> None:
        """Forget questions."""
        self.asked = [number for number in self.asked if number not in set(numbers)]

    def poll(self) -> list[Any]:
        """Return nothing: no request is under way."""
        return []


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SchedulerSide:
    """Return a scheduler's side with such a client."""
    monkeypatch.setattr(scheduler, "Client", Server)
    return SchedulerSide(Setup(MODEL, settings_in(tmp_path), 0, launches=False, tells_events=False))


def server_of(side: SchedulerSide) -> Server:
    """Return the scheduler's side's client."""
    assert isinstance(side.client, Server)
    return side.client


def test_prompts_that_arrive_do_not_keep_older_ones_waiting(
    side: SchedulerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Younger prompts, to which vLLM goes on when one is put off, overtake older ones by little."""
    now = [1e6]
    monkeypatch.setattr(questions.time, "monotonic", lambda: now[0])
    server, waiting, overtaken = server_of(side), list[Request](), 0
    for step in range(600):
        now[0] += 0.05
        for number in range(5):
            waiting.append(Request(f"{step} {number}"))
            side.on_new_request(waiting[-1])
        for place, request in enumerate(waiting):
            tokens, _ = side.get_num_new_matched_tokens(request, 0)
            if tokens is not None:  # it is served, and no other one in this step
                overtaken = max(overtaken, place)
                side.request_finished(waiting.pop(place))
                break
        side.build_connector_meta(output())
        server.told |= set(server.asked)  # in time for the next step
    served = 3000 - len(waiting)
    assert served >= 590
    assert overtaken <= ASKED_MAX
    oldest = int(waiting[0].request_id.split()[0])
    assert oldest >= served // 5 - ASKED_MAX


def test_arrivals_leave_half_of_the_questions(side: SchedulerSide) -> None:
    """Early questions take half of the room, and the youngest make room for scheduled prompts."""
    early = [Request(f"early {n}") for n in range(2 * ASKED_MAX)]
    for request in early:
        side.on_new_request(request)
    server = server_of(side)
    numbers = list(server.asked)
    assert len(numbers) == EARLY_MAX
    for number in range(ASKED_MAX - EARLY_MAX):
        assert side.get_num_new_matched_tokens(Request(f"late {number}"), 0) == (None, False)
    assert server.asked[:EARLY_MAX] == numbers
    assert side.get_num_new_matched_tokens(early[0], 0) == (None, False)  # its question is kept
    for given_up in range(1, EARLY_MAX):
        assert side.get_num_new_matched_tokens(Request(f"more {given_up}"), 0) == (None, False)
        assert server.asked[: EARLY_MAX - given_up] == numbers[:-given_up]
        assert len(server.asked) == ASKED_MAX
    assert numbers[0] in server.asked


def test_a_prompt_is_put_off_once_for_lack_of_a_question(side: SchedulerSide) -> None:
    """A prompt without a question is put off once, then computed; one with a question waits on."""
    requests = [Request(f"{n}") for n in range(2 * ASKED_MAX)]
    for expected in (None, 0, 0):
        told = [side.get_num_new_matched_tokens(request, 0) for request in requests]
        assert told == [(None, False)] * ASKED_MAX + [(expected, False)] * ASKED_MAX
    server = server_of(side)
    server.told |= set(server.asked)
    told = [side.get_num_new_matched_tokens(request, 0) for request in requests]
    assert told[:ASKED_MAX] == [(3 * PER_BLOCK, True)] * ASKED_MAX
