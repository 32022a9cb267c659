"""Scenarios of prompts in vLLM's scheduler that wait for far blocks."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from flexkv.integration.vllm import scheduler
from flexkv.server.operator import command
from flexkv.testing.far_server import FarServer

from .conftest import Make
from .stand import PER_BLOCK, WAITING, Stand

TOKENS = 2 * PER_BLOCK + PER_BLOCK // 2
LONG_MS = 60_000.0
"""No prompt of these tests runs because it has waited so long."""


class ServerHere:
    """A server in this process, in place of the one that the engine would launch."""

    last: ServerHere
    pid = os.getpid()

    def __init__(self, model: Any, settings: Any) -> None:
        self.served = FarServer(model, settings)
        ServerHere.last = self

    def look(self) -> None:
        """Do nothing: it is there."""

    def close(self) -> None:
        """Close it, which checks that nothing is left."""
        self.served.close()


Far = Callable[..., tuple[Stand, FarServer]]


@pytest.fixture
def far(make: Make, monkeypatch: pytest.MonkeyPatch) -> Far:
    """Return a function that makes an engine, and the server of its far tier."""
    monkeypatch.setattr(scheduler, "OwnServer", ServerHere)

    def begin(**cache: Any) -> tuple[Stand, FarServer]:
        stand = make(cache={"num_ssd_blocks": 0, "prefetch_timeout_ms": LONG_MS, **cache})
        return stand, ServerHere.last.served

    return begin


def send_away(stand: Stand, served: FarServer, request_id: int, tokens: int = TOKENS) -> None:
    """Compute a prompt, so that others hold its blocks, and forget it here."""
    stand.store(request_id, tokens)
    assert served.keep_copies() >= tokens // PER_BLOCK
    command(stand.address, "clear", tier="host")
    stand.until(lambda: stand.side.client.poll() or not served.engine.residency.counts(1).ready)


def test_a_prompt_waits_in_the_queue_and_others_pass(far: Far) -> None:
    """A prompt with far blocks holds nothing while it waits, and then loads what has arrived."""
    stand, served = far()
    send_away(stand, served, 1)
    served.pass_transfers(0)
    free = stand.free_blocks
    request = stand.add(1, TOKENS)
    other = stand.add(2, PER_BLOCK // 2)
    first = stand.step()
    assert set(first.output.num_scheduled_tokens) == {other.request_id}
    assert (request.status, stand.free_blocks) == (RequestStatus.WAITING, free)
    for _ in range(3):
        assert not stand.step().output.num_scheduled_tokens
    served.pass_transfers(None)
    stand.until(lambda: request.status is WAITING, step=True)
    assert request.num_computed_tokens == 2 * PER_BLOCK
    stand.run()
    stand.check_empty()


def test_a_prompt_that_has_waited_too_long_is_computed(far: Far) -> None:
    """The prompt runs without its far blocks; these arrive for the next one."""
    stand, served = far(prefetch_timeout_ms=1)
    send_away(stand, served, 1)
    served.pass_transfers(0)
    request = stand.add(1, TOKENS, max_tokens=100)
    stand.until(lambda: request.num_output_tokens, step=True)
    served.pass_transfers(None)
    stand.until(lambda: not stand.side._fetches.blocks_under_way, step=True)
    stand.run()
    stand.check_empty()


def test_a_prompt_that_waits_can_be_aborted(far: Far) -> None:
    """An aborted prompt leaves neither queue, and its fetch is given up."""
    stand, served = far()
    send_away(stand, served, 1)
    served.pass_transfers(0)
    request = stand.add(1, TOKENS)
    stand.step()
    stand.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    served.pass_transfers(None)
    stand.run()
    stand.check_empty()


@pytest.mark.parametrize("stop", ["best_effort", "complete", "timeout"])
def test_whatever_arrives_what_is_computed_is_right(far: Far, stop: str) -> None:
    """Others lose blocks and transfers are slow; each forward checks the KV before its tokens."""
    chance = Random(stop)
    stand, served = far(prefetch_stop=stop)
    names = 0
    for request_id in (1, 2, 3):
        stand.store(request_id, TOKENS)
    served.keep_copies()
    command(stand.address, "clear", tier="host")
    for _ in range(40):
        what = chance.random()
        if what < 0.15:
            command(stand.address, "clear", tier="host")
            stand.scheduler.reset_prefix_cache()
            served.call(lambda: served.far.hinted.update(served.far.ever_held))
        elif what < 0.3:
            keys = sorted(served.far.ever_held)
            lost = chance.sample(keys, chance.randint(0, 2))
            served.call(lambda lost=lost: served.far.held.difference_update(lost))
        elif what < 0.4:
            served.call(lambda: served.far.held.update(served.far.ever_held))
        elif what < 0.6:
            served.pass_transfers(chance.choice([0, 1, None]))
        elif what < 0.8:
            names += 1
            stand.add(chance.randint(1, 3), TOKENS, name=f"{names}")
        elif stand.scheduler.requests and what < 0.85:
            name = chance.choice(list(stand.scheduler.requests))
            stand.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        stand.step()
    served.pass_transfers(None)
    stand.run()
    stand.until(lambda: not stand.side._fetches.blocks_under_way, step=True)
    stand.check_empty()
    assert served.port.fetched or stop == "best_effort"
