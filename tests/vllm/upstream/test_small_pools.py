"""Prompts that load while the device is short of blocks: vLLM must never stand still.

vLLM takes no blocks back from a prompt that loads or has loaded. If such prompts need each other's
blocks and nothing runs, its scheduler spins for ever.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from flexkv.integration.vllm import room

from .hybrid_stand import CHUNK, MODELS, WINDOW, HybridStand, _full, _group
from .stand import PER_BLOCK, WAITING
from .test_hybrids import Make, make, prompt

__all__ = ["make"]

IDLE_STEPS = 200
"""After this many steps in which nothing happens or is under way, vLLM stands still."""
STEP_TOKENS = 128
FOUND, WHOLE = 20, 28
"""Blocks of the prompts that load: those that are found, and all. One step needs the rest."""
LENGTH = WHOLE * PER_BLOCK
LONGEST = (WHOLE + 1) * PER_BLOCK
BLOCKS = {"plain": 41, "windows": 65, "chunks": 53, "states_and_windows": 61}
"""Blocks of the device: enough for any one prompt, and for the blocks that two of them load."""
KINDS = {
    "plain": ["full"], "windows": ["window", "window", "full"], "chunks": ["chunk", "full"],
    "states_and_windows": ["state", "window", "full"],
}  # fmt: skip
MOST: dict[str, Callable[[int], int]] = {
    "full": lambda steps: LONGEST // PER_BLOCK,
    "window": lambda steps: -(-(WINDOW - 1 + steps) // PER_BLOCK) + 1,
    "chunk": lambda steps: -(-(CHUNK + steps) // PER_BLOCK),
    "state": lambda steps: 2,
}
"""The most blocks that a request holds, by kind, given the tokens of all steps under way."""
RECYCLING = ["windows", "chunks", "states_and_windows"]
"""Models with groups that give blocks back while a prompt is computed."""
ANY_ORDER = {"policy": "priority", "scheduler_reserve_full_isl": False}
"""With this, vLLM admits prompts that do not fit, and may try later ones first."""
ROUNDS = 3
SEEDS = range(8 if os.environ.get("ALL_SCENARIOS") else 1)


class StuckError(AssertionError):
    """vLLM stands still."""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a model with one KV group, of full attention."""
    monkeypatch.setitem(MODELS, "plain", [_group(_full(), "f0", "f1")])


def start(make: Make, model: str, **more: Any) -> HybridStand:
    """Start an engine with few blocks."""
    sizes: dict[str, Any] = {
        "num_blocks": BLOCKS[model], "max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 16,
        "max_model_len": LONGEST, "cache": {"num_cpu_blocks": 2048},
    }  # fmt: skip
    return make(model, **{**sizes, **more})


def store(stand: HybridStand, number: int, blocks: int = FOUND) -> list[int]:
    """Store a prompt of this many blocks, and return a longer one that finds them."""
    stand.answer(f"first {number}", prompt(blocks * PER_BLOCK + 1, number))
    stand.counts()
    return [*prompt(blocks * PER_BLOCK + 1, number), *prompt(LENGTH, -number)][:LENGTH]


def load_two(stand: HybridStand, found: int = FOUND, first: int = LENGTH) -> list[Any]:
    """Ask two long prompts, hold the loads that begin, and return the requests.

    Args:
        stand: the engine.
        found: how many blocks are found of each.
        first: the tokens of the first one.
    """
    talks = [store(stand, number, found) for number in range(2)]
    stand.copies.holds_loads = True
    requests = []
    for number, talk in enumerate(talks):
        requests.append(stand.ask(f"{number}", talk[:first] if not number else talk, max_tokens=4))
        requests[-1].priority = -number  # the later, the more urgent, if that counts
        stand.step()
    return requests


def load_in_any_order(make: Make) -> HybridStand:
    """Start an engine for a plain model, with a load that is overtaken by another one."""
    return start(make, "plain", scheduling=ANY_ORDER, num_blocks=35, max_num_batched_tokens=LENGTH)


def is_under_way(stand: HybridStand) -> bool:
    """Return whether a step, a match, a load or a put is under way."""
    side = stand.side
    numbers = side.transfers._of_number or side.transfers._waiting or side._pending_matches._asked
    return bool(numbers or stand._under_way)


def run(stand: HybridStand) -> None:
    """Step until nothing is left to do.

    Raises:
        StuckError: vLLM stands still.
    """
    idle = 0
    while not stand.is_idle:
        done = stand.step()
        told = done.told.finished_recving or done.told.finished_sending
        moves = done.output.total_num_scheduled_tokens or told or done.given.outputs
        idle = 0 if moves or is_under_way(stand) else idle + 1
        if idle > IDLE_STEPS:
            waiting = [*stand.scheduler.kv_holding_waiting, *stand.scheduler.waiting]
            facts = [(each.status.name, each.num_computed_tokens) for each in waiting]
            raise StuckError(f"free blocks: {stand.free_blocks}, waiting: {facts}")


@pytest.mark.parametrize("model", RECYCLING)
def test_loads_leave_each_other_the_blocks_that_they_need(make: Make, model: str) -> None:
    """The second load waits for the first prompt; both are loaded, and both end."""
    stand = start(make, model)
    first, second = load_two(stand)
    stand.step()
    assert (first.status is WAITING, second.status is WAITING) == (True, False)
    stand.copies.release()
    run(stand)
    counts = stand.counts()
    assert (counts["loaded_blocks"], counts["crowded_out_blocks"]) == (2 * FOUND, 0)
    assert counts["late_loads"] > 0
    stand.check_empty()
    assert len(stand.side._room) == 0


@pytest.mark.parametrize("model", [*RECYCLING, "plain"])
def test_vllm_by_itself_stands_still(make: Make, model: str) -> None:
    """The negative control: if no load waits for another, vLLM takes both and stops for ever."""
    stand = load_in_any_order(make) if model == "plain" else start(make, model)
    assert stand.side._room is not None
    stand.side._room = None
    requests = load_two(stand, *((10, 14 * PER_BLOCK) if model == "plain" else ()))
    assert all(request.status is WAITING for request in requests)
    stand.copies.release()
    transfers = stand.side.transfers  # both loads end before the next step
    stand.until(lambda: (transfers.poll(), not transfers._of_number)[1])
    with pytest.raises(StuckError):
        run(stand)
    for request in requests:
        stand.abort(request)
    stand.run()
    stand.check_empty()


def test_any_order_of_loads_is_safe(make: Make) -> None:
    """With priorities, a plain model's later load waits, too, if vLLM admits what does not fit."""
    stand = load_in_any_order(make)
    load_two(stand, 10, 14 * PER_BLOCK)
    stand.copies.release()
    run(stand)
    assert stand.counts()["loaded_blocks"] == 2 * 10
    stand.check_empty()


@pytest.mark.parametrize("scheduling", [{}, {"policy": "priority"}], ids=["fcfs", "priority"])
def test_vllm_itself_keeps_a_plain_model_going(make: Make, scheduling: dict[str, Any]) -> None:
    """FlexKV leaves plain models to vLLM, which counts correctly for them."""
    stand = start(make, "plain", scheduling=scheduling, num_blocks=BLOCKS["plain"] + 8)
    assert stand.side._room is None
    load_two(stand)
    stand.copies.release()
    run(stand)
    assert stand.counts()["loaded_blocks"] >= 2 * FOUND
    stand.check_empty()


@pytest.mark.parametrize("model", RECYCLING)
def test_loads_do_not_wait_if_there_are_enough_blocks(make: Make, model: str) -> None:
    """With enough blocks for all prompts, their loads run at the same time."""
    stand = start(make, model, num_blocks=3 * BLOCKS[model])
    requests = load_two(stand)
    assert all(request.status is WAITING for request in requests)
    stand.copies.release()
    run(stand)
    counts = stand.counts()
    assert (counts["loaded_blocks"], counts["late_loads"]) == (2 * FOUND, 0)
    stand.check_empty()


@pytest.mark.parametrize("ends", ["fails", "is_aborted", "is_aborted_later"])
@pytest.mark.parametrize("model", ["windows", "states_and_windows"])
def test_a_load_that_ends_badly_leaves_its_room(make: Make, model: str, ends: str) -> None:
    """The load that waited goes on when the one before it fails or is aborted."""
    stand = start(make, model)
    first, second = load_two(stand)
    stand.copies.loads_fail = lambda blocks: ends == "fails" and not stand.counts()["loads"]
    if ends == "is_aborted":
        stand.abort(first)
        stand.step()
    stand.copies.release()
    if ends == "is_aborted_later":
        stand.until(lambda: stand.step().told.finished_recving)
        stand.abort(first)
    run(stand)
    assert second.num_output_tokens == 4
    assert second.prefill_stats is None or second.num_computed_tokens >= LENGTH
    stand.check_empty()
    assert len(stand.side._room) == 0


def test_an_aborted_load_that_waited_lets_its_blocks_go(make: Make) -> None:
    """A request that is aborted while its load waits keeps no hold and no room."""
    stand = start(make, "windows")
    _, second = load_two(stand)
    stand.step()
    stand.abort(second)
    stand.copies.release()
    run(stand)
    stand.check_empty()


def test_a_load_that_waits_too_long_is_computed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load does not wait for ever for others: its prompt is computed then."""
    monkeypatch.setattr(room, "WAIT_S", 0.0)
    stand = start(make, "windows", num_blocks=90)
    load_two(stand)
    stand.copies.release()
    run(stand)
    counts = stand.counts()
    assert (counts["loaded_blocks"], counts["late_loads"]) == (FOUND, 0)
    assert counts["crowded_out_blocks"] >= FOUND
    stand.check_empty()


def test_a_reset_while_a_load_waits(make: Make) -> None:
    """After a reset nothing that was found before is loaded."""
    stand = start(make, "windows")
    _, second = load_two(stand)
    stand.step()
    stand.side.reset_cache()
    stand.copies.release()
    run(stand)
    assert second.num_output_tokens == 4
    assert stand.counts()["loaded_blocks"] <= FOUND
    stand.check_empty()


@pytest.mark.parametrize("model", ["windows", "states_and_windows"])
def test_a_reset_behind_a_load_leaves_no_room_taken(make: Make, model: str) -> None:
    """A prompt that has loaded and does not run yet when the cache is reset gives its room back."""
    stand = start(make, model)
    first, _ = load_two(stand)
    stand.copies.release()
    stand.until(lambda: stand.step().told.finished_recving)
    assert first.request_id in stand.side._room
    stand.side.reset_cache()
    run(stand)
    stand.check_empty()
    assert len(stand.side._room) == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheduling", [{}, ANY_ORDER], ids=["fcfs", "any order"])
@pytest.mark.parametrize("model", BLOCKS)
def test_any_requests_on_any_small_device(
    make: Make, model: str, scheduling: dict[str, Any], seed: int
) -> None:
    """Whatever is asked, loaded, failed and aborted on few blocks, every request ends."""
    chance = random.Random(f"{model} {scheduling} {seed}")
    behind = chance.choice([0, 1])
    least = sum(MOST[each](STEP_TOKENS * (1 + behind)) for each in KINDS[model])
    blocks = 1 + int(least * chance.uniform(1.0, 1.9))
    stand = start(make, model, num_blocks=blocks, scheduling=scheduling, behind=behind)
    stand.copies.lasts_s = lambda: chance.choice([0.0, 0.0, 0.002, 0.01])
    failing = chance.choice([0.0, 0.0, 0.2])
    talks = [store(stand, number, chance.randrange(4, WHOLE - 1)) for number in range(6)]
    for turn in range(ROUNDS):
        stand.copies.loads_fail = lambda blocks: chance.random() < failing
        asked = []
        for number, talk in enumerate(talks):
            tokens = chance.randrange(LENGTH // 2, LENGTH)
            name, answer = f"{turn} {number}", chance.randrange(1, LONGEST - LENGTH)
            asked.append(stand.ask(name, talk[:tokens], max_tokens=answer))
            asked[-1].priority = chance.randrange(3)
            for _ in range(chance.randrange(3)):
                stand.step()
        if chance.random() < 0.3:
            stand.abort(chance.choice(asked))
        run(stand)
        stand.until(stand.scheduler.reset_prefix_cache, step=True)
    stand.check_empty()
    assert stand.side._room is None or len(stand.side._room) == 0
