"""Scenarios of loads that fail: the copies are really not made, and the bytes really missing.

After `test_kv_load_failure_recovery`, `test_invalid_blocks_correctness`,
`test_cache_pollution_prevention` and `test_error_propagation`.
"""

from __future__ import annotations

import os
import signal

import pytest
from vllm.v1.request import FinishReason, Request, RequestStatus

from flexkv.server.operator import command

from .conftest import Make
from .stand import PER_BLOCK, WAITING, Stand

BLOCKS = 9
TOKENS = BLOCKS * PER_BLOCK + 1


@pytest.fixture
def recomputing(make: Make) -> Stand:
    """Return an engine that computes what could not be loaded."""
    return make(kv_load_failure_policy="recompute")


@pytest.fixture
def failing(make: Make) -> Stand:
    """Return an engine whose requests fail with their loads."""
    return make(kv_load_failure_policy="fail")


def begin(stand: Stand, *numbers: int) -> list[Request]:
    """Start requests whose loads are held, and return them."""
    stand.copies.holds_loads = True
    requests = [stand.add(number, TOKENS) for number in numbers]
    stand.step()
    assert [request.status for request in requests] == [WAITING] * len(numbers)
    assert {request.num_computed_tokens for request in requests} == {BLOCKS * PER_BLOCK}
    stand.until(lambda: sum(map(len, stand.copies.held_blocks())) == BLOCKS * len(numbers))
    return requests


def fail(stand: Stand, blocks: set[int]) -> set[int]:
    """Do the held copies except those of some blocks; return the failed blocks reported."""
    stand.copies.loads_fail = lambda of_copy: bool(of_copy & blocks)
    stand.copies.release()
    told: set[int] = stand.until(lambda: stand.step().told.invalid_block_ids)
    return told


def test_what_was_not_loaded_is_computed(recomputing: Stand) -> None:
    """A request whose load failed is computed; others keep what they loaded."""
    stand = recomputing
    for number in (1, 2, 3):
        stand.store(number, TOKENS)
    one, failed, other = begin(stand, 1, 2, 3)
    blocks = stand.blocks_of(failed)
    assert fail(stand, set(blocks)) == set(blocks[:BLOCKS])
    assert stand.scheduler.failed_recving_kv_req_ids == {failed.request_id}
    assert failed.num_computed_tokens == 0
    assert min(one.num_computed_tokens, other.num_computed_tokens) >= BLOCKS * PER_BLOCK
    stand.run()
    # The first load to end may be over before the other is reported.
    ends = {request.status for request in (one, failed, other)}
    assert ends == {RequestStatus.FINISHED_LENGTH_CAPPED}
    assert len(stand.copies.device_blocks) == 3
    stand.check_empty()


def test_nothing_is_claimed_again_for_a_request_whose_load_failed(recomputing: Stand) -> None:
    """A request whose load failed is offered nothing again, which could repeat for ever."""
    stand = recomputing
    stand.store(1, TOKENS)
    (failed,) = begin(stand, 1)
    fail(stand, set(stand.blocks_of(failed)))
    given = stand.run()
    assert [e.finish_reason for e in given] == [FinishReason.LENGTH]
    assert len(stand.copies.device_blocks) == 1
    stand.check_empty()


@pytest.fixture
def split(make: Make) -> Stand:
    """Return an engine with a prompt that is partly in host memory, and as a whole on SSD."""
    stand = make(kv_load_failure_policy="recompute", cache={"num_cpu_blocks": 14})
    stand.store(1, TOKENS)
    command(stand.address, "flush")  # what is nowhere else would be lost
    stand.store(2, 8 * PER_BLOCK + 1)
    return stand


def test_what_was_loaded_before_a_failure_is_kept(split: Stand) -> None:
    """If the later of a load's two copies fails, the blocks of the first are kept."""
    stand = split
    (failed,) = begin(stand, 1)
    blocks = stand.blocks_of(failed)
    first = max(min(map(blocks.index, of_copy)) for of_copy in stand.copies.held_blocks())
    assert first > 0, "the load is one copy"
    assert fail(stand, {blocks[first]}) == set(blocks[first:BLOCKS])
    assert failed.num_computed_tokens == first * PER_BLOCK
    stand.run()
    stand.check_empty()


def test_what_comes_behind_a_failure_is_not_believed(split: Stand) -> None:
    """If the earlier of a load's two copies fails, the blocks of the later one do not count."""
    stand = split
    (failed,) = begin(stand, 1)
    blocks = stand.blocks_of(failed)
    assert fail(stand, {blocks[0]}) == set(blocks[:BLOCKS])
    assert failed.num_computed_tokens == 0
    stand.run()
    stand.check_empty()


def test_blocks_that_failed_are_given_to_nobody(recomputing: Stand) -> None:
    """Blocks that failed to load are not shared before they have been computed."""
    stand = recomputing
    stand.store(1, TOKENS)
    (failed,) = begin(stand, 1)
    blocks = stand.blocks_of(failed)
    fail(stand, set(blocks))
    assert not any(map(stand.is_hashed, blocks))
    stand.until(lambda: stand.step().output.num_scheduled_tokens)
    assert all(stand.is_hashed(block) for block in blocks[:BLOCKS])
    again = stand.add(1, TOKENS, name="again")
    assert stand.step().output.num_scheduled_tokens == {again.request_id: 1}
    stand.run()
    stand.check_empty()


def test_one_of_two_loads_of_the_same_prompt_fails(recomputing: Stand) -> None:
    """If one of two loads of the same prompt fails, the other request keeps its blocks."""
    stand = recomputing
    stand.store(1, TOKENS)
    stand.copies.holds_loads = True
    failed, other = stand.add(1, TOKENS), stand.add(1, TOKENS, name="other")
    stand.step()
    fail(stand, set(stand.blocks_of(failed)))
    assert failed.num_computed_tokens == 0
    assert other.num_computed_tokens >= BLOCKS * PER_BLOCK
    assert len([each for each in stand.run() if each.finish_reason]) == 2
    stand.check_empty()


def test_a_request_fails_with_its_load(failing: Stand) -> None:
    """With the policy "fail" a request ends with its load; its blocks are free and not cached."""
    stand = failing
    for number in (1, 2):
        stand.store(number, TOKENS)
    free = stand.free_blocks
    failed, other = begin(stand, 1, 2)
    blocks = stand.blocks_of(failed)
    stand.copies.loads_fail = lambda of_copy: bool(of_copy & set(blocks))
    stand.copies.release()
    ends = {each.request_id: each.finish_reason for each in stand.run() if each.finish_reason}
    assert ends == {failed.request_id: FinishReason.ERROR, other.request_id: FinishReason.LENGTH}
    assert failed.status is RequestStatus.FINISHED_ERROR
    assert not any(map(stand.is_hashed, blocks))
    assert stand.free_blocks == free
    stand.check_empty()
    stand.copies.loads_fail = lambda of_copy: False
    stand.add(1, TOKENS, name="again")
    assert [each.finish_reason for each in stand.run()] == [FinishReason.LENGTH]
    stand.check_empty()


def test_a_load_that_fails_after_its_request_was_given_up(recomputing: Stand) -> None:
    """The blocks of a load that fails after its request was aborted become free."""
    stand = recomputing
    stand.store(1, TOKENS)
    (failed,) = begin(stand, 1)
    blocks = set(stand.blocks_of(failed))
    stand.scheduler.finish_requests(failed.request_id, RequestStatus.FINISHED_ABORTED)
    stand.step()
    stand.copies.loads_fail = lambda of_copy: bool(of_copy & blocks)
    stand.copies.release()
    stand.run()
    stand.check_empty()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_loads_of_a_server_that_is_killed_fail(make: Make, policy: str) -> None:
    """If the server is killed, loads fail after their copies, and the engine goes on without it."""
    stand = make(kv_load_failure_policy=policy)
    stand.store(1, TOKENS)
    (failed,) = begin(stand, 1)
    os.kill(stand.side._launched.pid, signal.SIGKILL)
    stand.copies.release()
    (end,) = stand.run()
    assert end.finish_reason is (FinishReason.ERROR if policy == "fail" else FinishReason.LENGTH)
    assert failed.is_finished()
    stand.add(2, TOKENS)
    assert [each.finish_reason for each in stand.run()] == [FinishReason.LENGTH]
    stand.check_freed()
