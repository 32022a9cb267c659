"""How long blocks stay that are being stored: after `test_remote_decode_lifecycle`."""

from __future__ import annotations

import threading

import pytest
from vllm.v1.request import FinishReason, Request, RequestStatus

from .conftest import Make
from .stand import PER_BLOCK, Stand

TOKENS = 2 * PER_BLOCK + PER_BLOCK // 2


def finish(stand: Stand, tokens: int = TOKENS) -> Request:
    """Give a request that has ended while its put is held, if it has one."""
    stand.copies.holds_puts = True
    request = stand.add(1, tokens)
    step = stand.step()
    assert step.given.outputs[0].finish_reason is FinishReason.LENGTH
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    return request


def test_blocks_stay_after_the_end_until_they_are_stored(stand: Stand) -> None:
    """And vLLM goes on stepping until then."""
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
    """Steps without a forward follow, which vLLM reports in another order."""
    stand = make(drafts=True)
    stand.copies.lasts_s = lambda: 0.01
    stand.add(1, 3 * PER_BLOCK + 1 - steps, max_tokens=steps)
    stand.run()
    stand.check_empty()
    assert stand.scheduler.reset_prefix_cache()
    again = stand.add(1, 3 * PER_BLOCK + 1 - steps, name="again")
    stand.step()
    assert again.num_computed_tokens == 2 * PER_BLOCK  # of a whole prompt the last is computed
    stand.run()
    assert stand.statistics()["routes"]["device→host"]["blocks"] == 3
    stand.check_empty()


def test_a_prompt_of_less_than_a_block_is_not_waited_for(stand: Stand) -> None:
    """There is nothing to store."""
    request = finish(stand, PER_BLOCK // 2)
    assert request.request_id not in stand.scheduler.requests
    stand.step()
    stand.check_empty()


def test_what_the_device_had_already_is_stored_all_the_same(stand: Stand) -> None:
    """A prompt whose first blocks came from the device's own cache."""
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
    """A put reads its blocks."""
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
    """With puts of several chunks under way."""
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
    """Give an engine whose two requests have no blocks any more, but puts that read them."""
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
    """Check that both prompts can be loaded: the forward looks whether their bytes are right."""
    stand.check_empty()
    assert stand.scheduler.reset_prefix_cache()
    loads = len(stand.copies.device_blocks)
    for number in (1, 2):
        stand.add(number, TOKENS, name=f"again-{number}")
    stand.run()
    assert len(stand.copies.device_blocks) == loads + 2
    stand.check_empty()


def test_blocks_of_a_put_are_not_computed_anew_before_it_is_over(pushed_back: Stand) -> None:
    """Both run again, each in blocks that a put of the other reads."""
    stand = pushed_back
    threading.Timer(0.1, stand.copies.release).start()
    stand.run()
    check_stored(stand)


def test_blocks_of_a_put_are_not_loaded_into_before_it_is_over(pushed_back: Stand) -> None:
    """Another prompt gets them, when both are given up."""
    stand = pushed_back
    stand.scheduler.finish_requests(["id-1", "id-2"], RequestStatus.FINISHED_ABORTED)
    loaded = stand.add(3, 6 * PER_BLOCK + 1)
    for _ in range(10):
        stand.step()
        stand.statistics()  # meanwhile the server would have asked for the copies
    assert loaded.num_computed_tokens == 6 * PER_BLOCK
    assert set.union(*stand.copies.held_blocks()) & set(stand.blocks_of(loaded))
    assert not stand.copies.device_blocks
    stand.copies.release()
    stand.run()
    assert stand.copies.device_blocks
    check_stored(stand)
