"""Odd moments of requests of models with several KV groups: between a load and the next step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec

from .hybrid_stand import MODELS, PAGE, HybridStand, _full, _group
from .stand import WAITING
from .test_hybrids import LONG, Make, make, prompt

__all__ = ["make"]

FINE = "states_of_two_blocks"


def preempt(stand: HybridStand, request: Any) -> None:
    """Preempt a request."""
    stand.scheduler.running.remove(request)
    stand.scheduler._preempt_request(request, time.monotonic())


def displace(stand: HybridStand, request: Any) -> None:
    """Preempt a request, and forget what the device has of it."""
    preempt(stand, request)
    assert stand.scheduler.reset_prefix_cache()


def begun(stand: HybridStand) -> Any:
    """Return a request that has stored its prompt, and computes its answer."""
    talk = stand.answer("first", prompt(LONG))
    request = stand.ask("preempted", talk, max_tokens=50)
    stand.until(lambda: len(request.output_token_ids) > 3, step=True)
    return request


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("model", ["windows", "states", "states_and_windows"])
def test_an_abort_in_the_step_that_hears_of_the_load(make: Make, model: str, fails: bool) -> None:
    """A preempted request that ends before its load is used stores nothing and leaves nothing."""
    stand = make(model)
    request = begun(stand)
    displace(stand, request)
    stand.copies.holds_loads = True
    stand.copies.loads_fail = lambda blocks: fails
    stand.until(lambda: (stand.step(), request.status is WAITING)[1])
    stand.counts()
    stand.copies.release()
    scheduler = stand.scheduler

    def received() -> Any:
        output = scheduler.schedule()
        if request.request_id in output.kv_connector_metadata.received:
            return output
        scheduler.update_from_output(output, stand._execute(output, []))
        return None

    output = stand.until(received)
    result = stand._execute(output, [])
    stand.abort(request)
    scheduler.update_from_output(output, result)
    assert not any(each.transfers.puts for each in stand.side._states.values())
    stand.copies.loads_fail = lambda blocks: False
    stand.answer("after", prompt(LONG))
    stand.check_empty()


@pytest.mark.parametrize("model", ["windows", "states", "states_and_windows"])
def test_a_preempted_request_fails_with_its_load(make: Make, model: str) -> None:
    """With the policy "fail" it ends there; what was not loaded is not stored, nothing is left."""
    stand = make(model, kv_load_failure_policy="fail")
    request = begun(stand)
    displace(stand, request)
    stand.copies.loads_fail = lambda blocks: True
    stand.until(lambda: (stand.step(), request.is_finished())[1])
    assert not any(each.transfers.puts for each in stand.side._states.values())
    stand.copies.loads_fail = lambda blocks: False
    stand.answer("after", prompt(LONG))
    stand.check_empty()


def test_a_copied_block_is_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that copies a shared block first waits for the puts that read the copy's place."""
    state = MambaSpec(
        block_size=32, shapes=((4,), (3, 4)), dtypes=(torch.float16, torch.float16),
        page_size_padded=2 * PAGE, mamba_cache_mode="align",
    )  # fmt: skip
    monkeypatch.setitem(MODELS, FINE, [_group(state, "s0"), _group(_full(num_kv_heads=4), "f0")])
    stand = make(FINE, num_blocks=24, max_num_batched_tokens=32)
    monkeypatch.setattr(HybridStand, "_forward", lambda self, row: None)
    side, fenced, copied = stand.side, set[int](), set[int]()
    written = side.transfers.make_step

    def make_step() -> Any:
        fenced.update(side.transfers._written)
        return written()

    build = side.build_connector_meta

    def built(output: Any) -> Any:
        fenced.clear()
        step = build(output)
        targets = {int(each.dst_block_id) for each in output.kv_cache_block_copies or ()}
        copied.update(targets)
        assert targets <= fenced
        return step

    monkeypatch.setattr(side.transfers, "make_step", make_step)
    monkeypatch.setattr(side, "build_connector_meta", built)
    for number in range(8):
        request = stand.ask(f"{number}", prompt(80 + 16 * (number % 2), number), max_tokens=40)
        for _ in range(6):
            stand.step()
        if request in stand.scheduler.running:
            preempt(stand, request)
        for _ in range(4):
            stand.step()
    assert copied
