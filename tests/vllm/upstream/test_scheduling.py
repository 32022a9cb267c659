"""Scenarios of hits, room, preemption and statistics: after the tests of `core/test_scheduler`."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from .conftest import Make
from .stand import PER_BLOCK, WAITING, Stand


def until_run(stand: Stand) -> Any:
    """Step until a step computes something, and return that step."""
    return stand.until(lambda: (s := stand.step()).output.num_scheduled_tokens and s)


def ended(given: list[Any]) -> list[str]:
    """Return the ids of the requests that have ended, in order."""
    return [each.request_id for each in given if each.finish_reason]


def test_only_what_nobody_has_is_computed(stand: Stand) -> None:
    """Only what neither the device's own cache nor FlexKV has is computed."""
    free = stand.free_blocks
    for number in (1, 2):
        stand.store(number, 6 * PER_BLOCK + 1)
    stand.copies.holds_loads = True
    requests = [stand.add(number, 3 * PER_BLOCK, max_tokens=3) for number in (1, 2)]
    stand.step()
    assert [request.status for request in requests] == [WAITING] * 2
    stand.copies.release()
    stand.until(lambda: len(stand.scheduler.finished_recving_kv_req_ids) == 2 or stand.step())
    stand.run()
    assert stand.free_blocks == free
    longer = stand.add(1, 8 * PER_BLOCK, name="longer", max_tokens=3)
    stand.step()
    assert longer.status is WAITING
    assert longer.num_computed_tokens == 6 * PER_BLOCK
    loaded = set(stand.blocks_of(longer)[3:])
    assert until_run(stand).output.num_scheduled_tokens == {"longer": 2 * PER_BLOCK}
    assert stand.copies.device_blocks[-1] == loaded
    stand.run()
    stand.check_empty()


def test_wrong_bytes_are_noticed(stand: Stand) -> None:
    """One wrong element of a loaded block is noticed: the negative control of all scenarios."""
    stand.store(1, 3 * PER_BLOCK)
    stand.copies.holds_loads = True
    request = stand.add(1, 3 * PER_BLOCK)
    stand.step()
    stand.copies.release()
    stand.until(lambda: stand.step().told.finished_recving)
    stand.kv_caches["layer.1"][stand.blocks_of(request)[1], 1, 5, 3] += 1
    with pytest.raises(AssertionError, match="id-1: tokens"):
        stand.step()


def test_a_prompt_waits_for_the_room_that_another_has(make: Make) -> None:
    """A prompt waits, without preemption, for the room that another has."""
    stand = make(num_blocks=10)
    for number in (1, 2):
        stand.store(number, 2 * PER_BLOCK + 1)
    free = stand.free_blocks
    requests = [stand.add(number, 6 * PER_BLOCK, max_tokens=2) for number in (1, 2)]
    assert until_run(stand).output.num_scheduled_tokens == {"id-1": 4 * PER_BLOCK}
    assert stand.scheduler.running == requests[:1]
    assert ended(stand.run()) == ["id-1", "id-2"]
    assert [request.num_preemptions for request in requests] == [0, 0]
    assert stand.free_blocks == free
    stand.check_empty()


@pytest.mark.parametrize("holds_puts", [False, True], ids=["", "puts_under_way"])
def test_preempted_requests_come_back(make: Make, holds_puts: bool) -> None:
    """Preempted requests come back, and blocks that their puts read are not written before."""
    stand = make(num_blocks=7)
    for number in (1, 2):
        stand.store(number, 2 * PER_BLOCK + 1)
    requests = [stand.add(number, 2 * PER_BLOCK + 1, max_tokens=PER_BLOCK + 4) for number in (1, 2)]
    stand.until(lambda: len(stand.scheduler.running) == 2, step=True)
    stand.copies.holds_puts = holds_puts
    # If one request is ahead, its last block is whole, and a step waits for that block's put.
    threading.Timer(0.5, stand.copies.release).start()
    given = []
    while not any(request.num_preemptions for request in requests):
        given += stand.step().given.outputs
    stand.copies.release()
    given += stand.run()
    assert sorted(ended(given)) == ["id-1", "id-2"]
    assert [request.num_output_tokens for request in requests] == [PER_BLOCK + 4] * 2
    stand.check_empty()


@pytest.mark.parametrize("local", [0, 2])
def test_external_hits_are_counted_once(stand: Stand, local: int) -> None:
    """Queries count the tokens that the device lacked, and hits those of them that FlexKV had."""
    stand.store(1, 4 * PER_BLOCK + 1)
    if local:
        stand.add(1, local * PER_BLOCK + 1, name="primes")
        stand.run()
    request = stand.add(1, 6 * PER_BLOCK)
    told = []
    while not request.is_finished():
        told.append(stand.step().given.scheduler_stats.connector_prefix_cache_stats)
    assert sum(stats.requests for stats in told) == 1
    assert sum(stats.queries for stats in told) == (6 - local) * PER_BLOCK
    assert sum(stats.hits for stats in told) == (4 - local) * PER_BLOCK
    assert sum(stats.preempted_requests for stats in told) == 0
    stand.run()
    stand.check_empty()


def test_a_request_that_wants_every_token_computed_hits_nothing(stand: Stand) -> None:
    """A request that wants every token computed loads nothing, though FlexKV has its blocks."""
    stand.store(1, 4 * PER_BLOCK)
    request = stand.add(1, 4 * PER_BLOCK)
    request.skip_reading_prefix_cache = True
    assert stand.step().output.num_scheduled_tokens == {request.request_id: 4 * PER_BLOCK}
    stand.run()
    stand.check_empty()


@pytest.mark.parametrize("connector", ["own"], indirect=True)
def test_statistics_reach_the_scheduler(stand: Stand) -> None:
    """The statistics of all steps have the right sums; the shim cannot pass them on."""
    stand.add(1, 4 * PER_BLOCK + 1, name="first-1")
    told: list[dict[str, int]] = []
    for _ in range(2):
        while stand.scheduler.has_requests():
            told.append(stand.step().given.scheduler_stats.kv_connector_stats or {})
        assert stand.scheduler.reset_prefix_cache()
        stand.add(1, 4 * PER_BLOCK + 1)
    sums = {name: sum(stats.get(name, 0) for stats in told) for stats in told for name in stats}
    assert sums == {
        "matches": 2, "hits": 1, "offered_blocks": 4, "loads": 1, "loaded_blocks": 4,
        "puts": 1, "stored_blocks": 4,
    }  # fmt: skip
    stand.run()


@pytest.mark.parametrize("connector", ["own"], indirect=True)
def test_a_reset_of_the_connectors_cache_forgets_every_block(stand: Stand) -> None:
    """A reset of the connector's cache drops every block; the shim does not pass it on."""
    stand.store(1, 4 * PER_BLOCK)
    assert stand.scheduler.reset_prefix_cache(reset_connector=True)
    stand.add(1, 4 * PER_BLOCK)
    assert stand.step().output.num_scheduled_tokens == {"id-1": 4 * PER_BLOCK}
    stand.run()
    stand.check_empty()


def test_a_prompt_in_chunks_is_stored_as_it_is_computed(make: Make) -> None:
    """Chunks of a prompt are stored before the whole prompt is computed."""
    stand = make(max_num_batched_tokens=2 * PER_BLOCK, max_num_seqs=2)
    request = stand.add(1, 8 * PER_BLOCK, max_tokens=2)
    stand.step()
    stand.until(lambda: stand.statistics()["routes"].get("device→host", {}).get("blocks") == 2)
    assert request.num_computed_tokens == 2 * PER_BLOCK
    stand.run()
    stand.check_empty()
