"""Scenarios of blocks that are being stored: after `test_remote_decode_lifecycle`."""

from __future__ import annotations

import threading

import pytest
from vllm.v1.request import FinishReason, Request, RequestStatus

from .conftest import Make
from .stand import PER_BLOCK, Stand

TOKENS = 2 * PER_BLOCK + PER_BLOCK // 2


def finish(stand: Stand, tokens: int = TOKENS) -> Request:
    """Return a request that has ended while its put, if it has one, is held."""
    stand.copies.holds_puts = True
    request = stand.add(1, tokens)
    step = stand.step()
    assert step.given.outputs[0].finish_reason is FinishReason.LENGTH
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    return request


def test_blocks_stay_after_the_end_until_they_are_stored(stand: Stand) -> None:
    """Blocks of an ended request stay until they are stored, and vLLM steps until then."""
    free = stand.free_blocks
    request = finish(stand)
    for _ in range(3):
        assert not stand.step().told.finished_sending
        assert request.request_id in stand.scheduler.requests
        assert free - stand.free_blocks == 3
        assert stand.scheduler.has_finished_requests()
        assert stand.scheduler.has_requests()
    stand.copies.release()
    stand.until(lambda: stand.step().told.finished_sending == {request.request_id})
    assert stand.free_blocks == free
    assert not stand.scheduler.has_requests()
    stand.check_empty()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_block_of_the_last_step_before_idle_is_stored_where_drafts_are_made(
    make: Make, steps: int
) -> None:
    """With drafts, a block of the last step before idle is stored, though vLLM reports it late."""
    stand = make(drafts=True)
    stand.copies.lasts_s = lambda: 0.01
    stand.add(1, 3 * PER_BLOCK + 1 - steps, max_tokens=steps)
    stand.run()
    stand.check_empty()
    assert stand.scheduler.reset_prefix_cache()
    again = stand.add(1, 3 * PER_BLOCK + 1 - steps, name="again")
    stand.step()
    assert again.num_computed_tokens == 2 * PER_BLOCK  # the last block is computed
    stand.run()
    assert stand.statistics()["routes"]["device→host"]["blocks"] == 3
    stand.check_empty()


def test_a_prompt_of_less_than_a_block_is_not_waited_for(stand: Stand) -> None:
    """A prompt of less than a block has nothing to store, and is not waited for."""
    request = finish(stand, PER_BLOCK // 2)
    assert request.request_id not in stand.scheduler.requests
    stand.step()
    stand.check_empty()


def test_what_the_device_had_already_is_stored_all_the_same(stand: Stand) -> None:
    """A prompt whose first blocks came from the device's own cache is stored completely."""
    stand.copies.holds_puts = True
    stand.add(1, TOKENS + PER_BLOCK, name="primes")
    stand.step()
    request = stand.add(1, TOKENS)
    assert stand.step().output.num_scheduled_tokens == {request.request_id: PER_BLOCK // 2}
    stand.copies.release()
    stand.run()
    stand.check_empty()
    assert stand.scheduler.reset_prefix_cache()
    again = stand.add(1, TOKENS, name="again")
    stand.step()
    assert again.num_computed_tokens == 2 * PER_BLOCK
    stand.run()
    stand.check_empty()


def test_giving_up_a_request_that_has_ended_frees_nothing(stand: Stand) -> None:
    """Aborting an ended request frees no block that a put still reads."""
    request = finish(stand)
    stand.step()
    stand.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
    stand.step()
    assert request.request_id in stand.scheduler.requests
    assert not stand.scheduler.reset_prefix_cache()
    stand.copies.release()
    stand.run()
    stand.check_empty()


def test_a_request_given_up_while_it_runs_is_stored_and_freed(stand: Stand) -> None:
    """A request that is aborted while it runs, with several puts under way, is stored and freed."""
    stand.copies.holds_puts = True
    request = stand.add(1, TOKENS, max_tokens=PER_BLOCK + 2)
    for _ in range(PER_BLOCK):
        stand.step()
    stand.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
    stand.step()
    assert request.request_id in stand.scheduler.requests
    stand.copies.release()
    stand.run()
    stand.check_empty()


@pytest.fixture
def pushed_back(make: Make) -> Stand:
    """Return an engine whose two requests were preempted, while puts still read their blocks."""
    stand = make(num_blocks=9)
    stand.store(3, 6 * PER_BLOCK + 1)
    stand.copies.holds_puts = True
    for number in (1, 2):
        stand.add(number, TOKENS, max_tokens=3)
    stand.step()
    stand.until(lambda: len(stand.copies.held) == 2)
    stand.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert stand.free_blocks == 8
    return stand


def check_stored(stand: Stand) -> None:
    """Check that both prompts can be loaded; the forward checks their bytes."""
    stand.check_empty()
    assert stand.scheduler.reset_prefix_cache()
    loads = len(stand.copies.device_blocks)
    for number in (1, 2):
        stand.add(number, TOKENS, name=f"again-{number}")
    stand.run()
    assert len(stand.copies.device_blocks) == loads + 2
    stand.check_empty()


def test_blocks_of_a_put_are_not_computed_anew_before_it_is_over(pushed_back: Stand) -> None:
    """Blocks that a put reads are not computed anew, for another request, before it is over."""
    stand = pushed_back
    threading.Timer(0.1, stand.copies.release).start()
    stand.run()
    check_stored(stand)


def test_blocks_of_a_put_are_not_loaded_into_before_it_is_over(pushed_back: Stand) -> None:
    """Blocks that a put reads are not loaded into, for another prompt, before it is over."""
    stand = pushed_back
    stand.scheduler.finish_requests(["id-1", "id-2"], RequestStatus.FINISHED_ABORTED)
    loaded = stand.add(3, 6 * PER_BLOCK + 1)
    for _ in range(10):
        stand.step()
        stand.statistics()  # the server would have asked for the copies meanwhile
    assert loaded.num_computed_tokens == 6 * PER_BLOCK
    assert set.union(*stand.copies.held_blocks()) & set(stand.blocks_of(loaded))
    assert not stand.copies.device_blocks
    stand.copies.release()
    stand.run()
    assert stand.copies.device_blocks
    check_stored(stand)
