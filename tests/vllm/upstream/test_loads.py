"""Scenarios of loads in vLLM's scheduler: after `test_remote_prefill_lifecycle`."""

from __future__ import annotations

from vllm.v1.metrics.stats import KV_FETCH_STAGES
from vllm.v1.request import FinishReason, Request, RequestStatus

from .conftest import Make
from .stand import PER_BLOCK, WAITING, Stand

TOKENS = 2 * PER_BLOCK + PER_BLOCK // 2


def fetching(stand: Stand) -> tuple[int, ...]:
    """Return how many requests wait for a load's start, for its end, and for their run."""
    return tuple(stand.scheduler._kv_fetch_counts[stage] for stage in KV_FETCH_STAGES)


def receive(stand: Stand) -> set[str]:
    """Release the held copies, step until loads end, and return their requests."""
    stand.copies.release()
    received: set[str] = stand.until(lambda: stand.step().told.finished_recving)
    return received


def begin(stand: Stand, tokens: int = TOKENS) -> Request:
    """Start a request whose load of stored blocks is held, and return it."""
    stand.store(1, tokens)
    stand.copies.holds_loads = True
    request = stand.add(1, tokens)
    stand.step()
    assert request.status is WAITING
    return request


def test_a_prompt_is_loaded_then_run(stand: Stand) -> None:
    """A prompt's blocks are private until its load is over, then shared, and at last free."""
    stand.store(1, TOKENS)
    free = stand.free_blocks
    stand.copies.holds_loads = True
    request = stand.add(1, TOKENS)
    first = stand.step()
    assert request.status is WAITING
    assert request in stand.scheduler.kv_holding_waiting
    assert request.num_computed_tokens == 2 * PER_BLOCK
    assert not first.output.num_scheduled_tokens
    assert not first.given.outputs
    blocks = stand.blocks_of(request)
    assert len(blocks) == free - stand.free_blocks == 2
    assert not any(map(stand.is_hashed, blocks))
    assert not stand.step().told.finished_recving
    assert receive(stand) == {request.request_id}
    assert request.request_id in stand.scheduler.finished_recving_kv_req_ids
    last = stand.step()
    assert last.output.num_scheduled_tokens == {request.request_id: PER_BLOCK // 2}
    assert all(map(stand.is_hashed, blocks))
    assert last.given.outputs[0].finish_reason is FinishReason.LENGTH
    stand.run()
    stand.check_empty()


def test_others_run_while_one_is_loaded(stand: Stand) -> None:
    """Requests before and behind a prompt that is being loaded run meanwhile."""
    stand.store(1, TOKENS)
    stand.copies.holds_loads = True
    before = stand.add(2, TOKENS, max_tokens=8)
    stand.step()
    behind, loaded = stand.add(3, TOKENS, max_tokens=8), stand.add(1, TOKENS)
    assert set(stand.step().output.num_scheduled_tokens) == {before.request_id, behind.request_id}
    assert set(stand.step().output.num_scheduled_tokens) == {before.request_id, behind.request_id}
    assert loaded.status is WAITING
    receive(stand)
    assert loaded.request_id in stand.step().output.num_scheduled_tokens
    stand.run()
    stand.check_empty()


def test_the_same_prompt_never_hits_blocks_that_are_being_loaded(stand: Stand) -> None:
    """A second request for a prompt under load has a load of its own, into its own blocks."""
    request = begin(stand)
    other = stand.add(1, TOKENS, name="other")
    stand.step()
    assert other.status is WAITING
    blocks = stand.blocks_of(request) + stand.blocks_of(other)
    assert len(set(blocks)) == 4
    assert not any(map(stand.is_hashed, blocks))
    stand.copies.release()
    assert {each.request_id for each in stand.run()} == {request.request_id, "other"}
    stand.check_empty()


def test_of_a_prompt_of_whole_blocks_the_last_is_computed(stand: Stand) -> None:
    """A prompt of whole blocks has its last one computed, since vLLM must compute a token."""
    request = begin(stand, 2 * PER_BLOCK)
    assert request.num_computed_tokens == PER_BLOCK
    receive(stand)
    assert stand.step().output.num_scheduled_tokens == {request.request_id: PER_BLOCK}
    stand.run()
    stand.check_empty()


def test_a_loaded_prompt_that_finds_no_room_to_go_on_comes_back(make: Make) -> None:
    """A loaded prompt that has no room for its next token is preempted and comes back."""
    stand = make(num_blocks=6)
    stand.store(2, 2 * PER_BLOCK)
    running = stand.add(1, 2 * PER_BLOCK, max_tokens=12)
    stand.step()
    loaded = stand.add(2, 2 * PER_BLOCK, max_tokens=4)
    given = stand.run()
    assert loaded.num_preemptions >= 1
    assert running.num_preemptions == 0
    assert [e.request_id for e in given if e.finish_reason] == [
        running.request_id, loaded.request_id,
    ]  # fmt: skip
    stand.check_empty()


def test_a_prompt_for_which_there_is_no_room_waits_without_loading(make: Make) -> None:
    """A prompt without room waits without loading, and loads when there is room."""
    stand = make(num_blocks=6)
    stand.store(2, TOKENS)
    running = stand.add(1, 2 * PER_BLOCK, max_tokens=4)
    stand.step()
    waiting = stand.add(2, TOKENS)
    while not running.is_finished():
        stand.step()
        assert waiting.status is RequestStatus.WAITING
    assert not stand.copies.device_blocks
    stand.until(lambda: waiting.status is WAITING, step=True)
    stand.run()
    assert len(stand.copies.device_blocks) == 1
    stand.check_empty()


def test_loads_leave_the_room_that_others_need_to_go_on(make: Make) -> None:
    """A load does not take the blocks that another request will need to go on."""
    stand = make(num_blocks=8)
    stand.store(1, PER_BLOCK + 1)
    stand.store(2, 4 * PER_BLOCK + 1)
    stand.copies.holds_loads = True
    one, other = stand.add(1, 4 * PER_BLOCK), stand.add(2, 5 * PER_BLOCK)
    stand.step()
    assert (one.status, other.status) == (WAITING, RequestStatus.WAITING)
    assert not stand.scheduler.kv_cache_manager.get_block_ids(other.request_id)[0]
    stand.copies.release()
    stand.run()
    stand.check_empty()


def test_several_loads_are_under_way_at_once(stand: Stand) -> None:
    """Several loads are under way at once if there is room for all."""
    for number in (1, 2):
        stand.store(number, PER_BLOCK + 1)
    stand.copies.holds_loads = True
    requests = [stand.add(number, 5 * PER_BLOCK) for number in (1, 2)]
    stand.step()
    assert [request.status for request in requests] == [WAITING] * 2
    stand.copies.release()
    stand.run()
    stand.check_empty()


def test_stages_of_a_load_are_told(stand: Stand) -> None:
    """The counts of a load's stages are right, and zero once its request was aborted."""
    request = begin(stand)
    assert fetching(stand) == (0, 1, 0)
    receive(stand)
    assert fetching(stand) == (0, 0, 1)
    stand.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert fetching(stand) == (0, 0, 0)
    assert request.request_id not in stand.scheduler.requests
    stand.run()
    stand.check_empty()


def test_blocks_of_a_request_given_up_stay_until_its_load_is_over(stand: Stand) -> None:
    """The blocks of an aborted request stay until its load is over, since a copy writes to them."""
    stand.store(1, TOKENS)
    free = stand.free_blocks
    stand.copies.holds_loads = True
    request = stand.add(1, TOKENS)
    stand.step()
    stand.until(lambda: stand.copies.held)
    stand.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        assert not stand.step().told.finished_recving
    assert request.request_id in stand.scheduler.requests
    assert free - stand.free_blocks == 2
    receive(stand)
    assert request.request_id not in stand.scheduler.requests
    assert stand.free_blocks == free
    stand.run()
    stand.check_empty()
