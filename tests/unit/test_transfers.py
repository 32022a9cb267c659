"""The rules of an engine's loads and puts, over a client that the test speaks for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from flexkv.integration.common import request_transfers
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Done, Matched
from tests.unit.transfer_rig import HELD, Rig, request_with


@pytest.mark.parametrize(
    ("end", "first", "stored", "failed"),
    [
        ({"status": "success", "moved": 2}, 2, 4, 0),
        ({"status": "failed", "moved": 0}, 2, 2, 1),
        ({"status": "cancelled", "moved": 0}, 2, 2, 1),
        ({"status": "success", "moved": 1, "error": "the disk is full"}, 2, 2, 0),
        ({"status": "success", "moved": 0}, 2, 0, 0),
        ({"status": "success", "moved": 0}, 0, 4, 0),
        ({"status": "failed", "moved": 0, "is_stale": True}, 2, 4, 0),
    ],
    ids=["whole", "failed", "cancelled", "short", "no_parents", "had_all", "stale"],
)
def test_the_next_put_begins_where_an_end_has_left_a_gap(
    end: dict[str, Any], first: int, stored: int, failed: int
) -> None:
    """After a put that left a gap, the next one stores the blocks that later ones need."""
    rig, request = Rig(), request_with(1, 2, 3, 4, 5)
    request.stored_blocks = first
    number = rig.put(request, 4)
    step = rig.step(Done(number, **end))
    assert (request.stored_blocks, request.puts) == (stored, {})
    assert step.settle == ([number] if end["status"] != "success" else [])
    assert rig.counts["failed_puts"] == failed
    assert rig.transfers.may_put(request, 5) is not end.get("is_stale", False)
    assert not rig.transfers.blocks.any_read


def test_what_is_computed_anew_after_a_clear_is_stored() -> None:
    """A request stores again once all its blocks are newer than the clear; loaded ones are not."""
    request = request_with(1)
    request.is_stale = request.has_loaded = True
    request.begins_anew(6)
    assert (request.generation, request.is_stale) == (5, True)
    request.begins_anew(6)
    assert (request.generation, request.is_stale) == (6, False)


def test_an_end_of_older_blocks_does_not_make_newer_ones_stale() -> None:
    """If a request began anew while a stale put was under way, its blocks may be stored."""
    rig, request = Rig(), request_with(1, 2)
    number = rig.put(request, 1)
    request.begins_anew(6)
    rig.step(Done(number, "failed", 0, is_stale=True))
    assert rig.transfers.may_put(request, 2)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_what_a_load_lacks_is_reported(first: int, moved: int) -> None:
    """A load that came short reports its other blocks and is the last; a whole one is not put."""
    rig, request = Rig(), request_with()
    request.local_blocks, ids = first, [5, 6, 7][1 - first :]
    rig.load(request, ids)
    assert rig.client.begun == [("get", first, [6, 7], HELD, False)]
    step = rig.step(Done(1, "success", moved))
    assert step.received == {"a"}
    assert step.failed_blocks == set([6, 7][moved:])
    assert step.settle == ([1] if moved < 2 else [])
    assert request.may_load is (moved == 2)
    assert request.stored_blocks == (2 if moved == 2 and not first else 0)
    assert (request.load, rig.over) == (None, [])
    assert rig.counts == Counter(loads=1, loaded_blocks=moved, failed_blocks=2 - moved)


def test_a_load_without_room_is_retried_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load for which there is no room begins again after a pause, until it has waited long."""
    now_s = 100.0
    monkeypatch.setattr(request_transfers.time, "monotonic", lambda: now_s)
    rig, request = Rig(), request_with()
    rig.load(request, [5, 6])
    assert rig.step(Done(1, "unready", 0)).received == set()
    rig.step()
    assert len(rig.client.begun) == 1
    now_s += request_transfers.AGAIN_S
    rig.step()
    assert len(rig.client.begun) == 2
    now_s += request_transfers.ROOM_S
    assert rig.step(Done(2, "unready", 0)).failed_blocks == {5, 6}


def test_a_load_without_room_is_not_retried_for_a_request_that_is_over() -> None:
    """The load of a request that is over is cancelled, and however it ends it is the last."""
    rig, request = Rig(), request_with()
    rig.load(request, [5, 6])
    assert rig.transfers.finish(request) is False
    assert rig.client.cancelled == [1]
    assert rig.step(Done(1, "unready", 0)).received == {"a"}
    assert rig.over == ["a"]


def test_a_load_waits_for_puts_of_its_request_and_puts_that_read_its_blocks() -> None:
    """A load begins once its request has no put, and no put reads the blocks that it writes."""
    rig, one, other = Rig(gates_loads=True), request_with(1, 2), request_with(5, name="b")
    numbers = rig.put(one, 2), rig.put(other, 1)
    rig.load(one, [5, 6])
    assert rig.step(Done(numbers[0], "success", 2)).loads == []
    assert rig.step(Done(numbers[1], "success", 1)).loads == [3]
    assert rig.client.begun[2][0] == "get"


def test_a_load_that_waits_ends_once_with_its_request() -> None:
    """If a request is over while its load waits for its puts, it is `received`, never `sent`."""
    rig, request = Rig(), request_with(1, 2)
    number = rig.put(request, 2)
    rig.load(request, [5, 6])
    assert rig.transfers.finish(request) is False
    assert (rig.client.released, rig.over) == ([HELD], [])
    assert rig.step().received == set()
    step = rig.step(Done(number, "success", 2))
    assert (step.received, step.sent, rig.over) == ({"a"}, set(), ["a"])
    assert len(rig.client.begun) == 1


def test_the_blocks_of_a_request_stay_until_its_puts_are_done() -> None:
    """A request that is over is `sent` with the end of its last put; without puts it is over."""
    rig, request = Rig(), request_with(1, 2)
    numbers = rig.put(request, 1), rig.put(request, 2)
    assert rig.transfers.finish(request) is True
    assert rig.step(Done(numbers[0], "success", 1)).sent == set()
    assert rig.over == []
    assert rig.step(Done(numbers[1], "failed", 0)).sent == {"a"}
    assert rig.transfers.finish(request_with(3, name="b")) is False
    assert rig.over == ["a", "b"]


def test_a_step_waits_for_earlier_puts_that_read_what_it_writes() -> None:
    """Earlier puts of blocks that a step writes are cancelled and end; its own put is not."""
    rig, one, other = Rig(), request_with(1, 2), request_with(3, name="b")
    numbers = rig.put(one, 2), rig.put(other, 1)
    new = request_with(2, 9, name="c")
    rig.transfers.written(new, 0)
    rig.transfers.put(new, PromptPart(new.prompt, 1))
    step = rig.transfers.make_step()
    assert (step.puts, step.settle) == ([3], [numbers[0]])
    assert (rig.client.cancelled, rig.client.given_up) == ([numbers[0]], 1)
    assert (one.puts, list(other.puts), list(new.puts)) == ({}, [2], [3])


def test_puts_of_blocks_that_were_not_loaded_are_dropped() -> None:
    """All puts of a request with a block that lacks its content are dropped, and made again."""
    rig, one, other = Rig(), request_with(1, 2, 3), request_with(4, name="b")
    numbers = [rig.put(one, 1), rig.put(other, 1), rig.put(one, 2)]
    rig.transfers.drop_puts_of({3, 50})
    assert rig.client.cancelled == [numbers[0], numbers[2]]
    assert rig.transfers.make_step().dropped == {numbers[0], numbers[2]}
    assert (one.stored_blocks, other.stored_blocks) == (0, 1)


def test_blocks_of_before_a_reset_are_not_put() -> None:
    """A request with an old block stores nothing behind it, and one with new blocks does."""
    rig, request = Rig(), request_with(1, 2)
    rig.step()
    rig.transfers.blocks.reset()
    assert not rig.transfers.may_put(request, 1)
    rig.transfers.written(request, 0)
    assert rig.transfers.may_put(request, 2)
    rig.client.is_ready = False
    assert not rig.transfers.may_put(request, 2)


def test_only_what_is_in_host_memory_is_loaded_by_layer() -> None:
    """A step loads by layer only blocks of host memory, for a request without puts."""
    request = request_with(1)
    request.found, request.local_blocks = Matched(HELD, 3, {"host": 2, "ssd": 0}), 1
    assert not Rig().transfers.suits_layers(request)
    rig = Rig(by_layer=True)
    assert rig.transfers.suits_layers(request)
    request.found = Matched(HELD, 3, {"host": 1, "ssd": 1})
    assert not rig.transfers.suits_layers(request)
    request.found = Matched(HELD, 3, {"host": 2})
    rig.put(request, 1)
    assert not rig.transfers.suits_layers(request)


@pytest.mark.parametrize(("moved", "stored"), [(2, 3), (1, 0)])
def test_a_request_runs_while_its_layers_are_loaded(moved: int, stored: int) -> None:
    """A load by layer counts as stored at once; the workers report what it lacks, which is put."""
    rig, request = Rig(by_layer=True), request_with()
    rig.load(request, [5, 6], by_layer=True)
    assert rig.client.begun == [("get by layer", 0, [5, 6], HELD, False)]
    assert (request.load, request.stored_blocks) == (None, 2)
    assert rig.step().layer_loads == {1: [5, 6]}
    request.block_ids = [5, 6, 7]
    rig.put(request, 3)
    step = rig.step(Done(1, "success", moved))
    assert (step.received, step.failed_blocks, step.settle) == (set(), set(), [])
    assert (request.stored_blocks, request.may_load) == (stored, moved == 2)
    assert rig.counts["failed_blocks"] == 2 - moved
