"""Scenarios of clears while requests run: nothing computed before is stored, so none is found.

The model's weights change with each clear, as in vLLM's weight-exchange flows: the forward checks
that what it loads was computed with the new ones.
"""

from __future__ import annotations

import pytest

from flexkv.server.operator import command

from .conftest import Make
from .stand import PER_BLOCK, WAITING, Stand

TOKENS = 3 * PER_BLOCK + 1
OWN = pytest.mark.parametrize("connector", ["own"], indirect=True)
"""The shim passes no reset on."""


def exchange(stand: Stand, **more: bool) -> bool:
    """Exchange the weights, and reset every cache; return whether vLLM says that it worked."""
    done: bool = stand.scheduler.reset_prefix_cache(reset_connector=True, **more)
    stand.weights += 1
    return done


def stored_blocks(stand: Stand) -> int:
    """Return how many blocks the server has in host memory."""
    blocks: int = stand.statistics()["tiers"]["host"]["ready_blocks"]
    return blocks


def check_stored(stand: Stand, prompt: int) -> None:
    """Check that a request for a prompt now stores it, and that the next one loads it."""
    stand.store(prompt, TOKENS)
    loads = len(stand.copies.device_blocks)
    stand.add(prompt, TOKENS, name=f"again-{prompt}")
    stand.run()
    assert len(stand.copies.device_blocks) == loads + 1
    stand.check_empty()


@OWN
def test_a_request_that_runs_on_over_a_reset_stores_nothing_more(stand: Stand) -> None:
    """A request that runs through a reset stores nothing more; nor do sharers of its blocks."""
    request = stand.add(1, TOKENS, max_tokens=4 * PER_BLOCK)
    for _ in range(PER_BLOCK + 2):
        stand.step()
    stand.until(lambda: stored_blocks(stand) > 0)
    assert not exchange(stand)  # the device's own cache is in use
    assert stored_blocks(stand) == 0
    stand.unchecked = True
    same = stand.add(1, TOKENS + PER_BLOCK, name="same")
    stand.step()
    assert same.num_computed_tokens == TOKENS + PER_BLOCK
    stand.run()
    assert request.is_finished()
    assert stored_blocks(stand) == 0
    stand.unchecked = False
    assert stand.scheduler.reset_prefix_cache()
    check_stored(stand, 1)


@OWN
def test_what_is_being_stored_at_a_reset_is_not(stand: Stand) -> None:
    """Puts whose copies are under way at a reset store nothing."""
    stand.copies.holds_puts = True
    stand.add(1, TOKENS)
    stand.step()
    stand.until(lambda: stand.copies.held)
    assert not exchange(stand)
    stand.copies.release()
    stand.run()
    assert stored_blocks(stand) == 0
    assert stand.scheduler.reset_prefix_cache()
    check_stored(stand, 1)


@OWN
def test_requests_that_are_computed_anew_after_a_reset_are_stored(stand: Stand) -> None:
    """Requests that are computed anew, or only begin, after a reset are stored."""
    running = stand.add(1, TOKENS, max_tokens=PER_BLOCK)
    for _ in range(3):
        stand.step()
    stand.until(lambda: stored_blocks(stand) == 3)
    waiting = stand.add(2, TOKENS)
    assert stand.side.get_num_new_matched_tokens(waiting, 0)[0] == 0
    assert exchange(stand, reset_running_requests=True)
    stand.run()
    assert running.is_finished()
    for number in (1, 2):
        assert stand.scheduler.reset_prefix_cache()
        loads = len(stand.copies.device_blocks)
        stand.add(number, TOKENS, name=f"again-{number}")
        stand.run()
        assert len(stand.copies.device_blocks) == loads + 1
    stand.check_empty()


@OWN
def test_what_was_being_loaded_at_a_reset_is_not_stored_again(stand: Stand) -> None:
    """Blocks of a load that began before a reset, and those behind them, are not stored again."""
    stand.store(1, TOKENS)
    stand.copies.holds_loads = True
    loading = stand.add(1, TOKENS + PER_BLOCK, max_tokens=2)
    stand.step()
    assert loading.status is WAITING
    assert not exchange(stand)
    stand.unchecked = True
    stand.copies.release()
    stand.run()
    assert loading.is_finished()
    assert stored_blocks(stand) == 0
    stand.unchecked = False
    assert stand.scheduler.reset_prefix_cache()
    check_stored(stand, 1)


def test_a_request_that_runs_on_over_anothers_clear_stores_nothing_more(stand: Stand) -> None:
    """A request that runs through another's clear stores nothing more, after a few refused puts."""
    request = stand.add(1, TOKENS, max_tokens=6 * PER_BLOCK)
    for _ in range(3):
        stand.step()
    stand.until(lambda: stored_blocks(stand) == 3)
    asked: list[int] = []
    client = stand.side.client
    put = client.put
    client.put = lambda *args, **more: asked.append(put(*args, **more)) or asked[-1]
    command(stand.address, "clear")
    stand.run()
    assert request.is_finished()
    assert stored_blocks(stand) == 0
    assert len(asked) <= 3  # one is refused, and two may be on their way by then
    assert stand.scheduler.reset_prefix_cache()
    check_stored(stand, 1)


def test_a_request_that_is_new_after_anothers_clear_is_stored(make: Make) -> None:
    """A request that begins after another's clear is stored, though others run through it."""
    stand = make(num_blocks=128)
    stand.add(1, TOKENS, max_tokens=6 * PER_BLOCK)
    stand.step()
    before = stand.side.client.generation
    command(stand.address, "clear")
    stand.until(lambda: (stand.step(), stand.side.client.generation > before)[1])
    stand.add(2, TOKENS)
    stand.run()
    assert stored_blocks(stand) == 3
    stand.check_empty()


@OWN
def test_a_reset_that_the_server_does_not_hear_of_is_told(stand: Stand) -> None:
    """A reset that does not reach the server returns False, and nothing from before is stored."""
    stand.add(1, TOKENS, max_tokens=2 * PER_BLOCK)
    stand.step()
    stand.side._launched.close()
    assert not stand.side.reset_cache()
    stand.run()
    stand.check_freed()
