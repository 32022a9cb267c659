"""The rules of loads and puts of an engine with several KV groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from flexkv.common.request import LeafBlocks
from flexkv.common.terms import Positions
from flexkv.integration.common.kv_groups import KVGroups
from flexkv.integration.common.pending_matches import PendingMatches
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import PROTOCOL_VERSION, Done, Matched, Welcome
from tests.unit.group_spaces import STATE, WINDOW, spaces_of
from tests.unit.transfer_rig import HELD, Rig, request_with

GROUPS = KVGroups(spaces_of((WINDOW, 8), (STATE, 0)), 4)
"""Blocks of 4 tokens: a chain, a window of two blocks, a state."""
IDS = [[1, 2, 3], [0, 4, 5], [0, 0, 6]]
"""The device blocks of a request with three blocks of the chain."""


def leaf(group: int, first: int, *ids: int) -> LeafBlocks:
    """Return leaves of a group from a position on."""
    return LeafBlocks(group, Positions(first, len(ids)), np.array(ids, np.int64))


def rig_with(grace_s: float = 0.0) -> Rig:
    """Return the transfers of an engine with these groups."""
    return Rig(groups=GROUPS, grace_s=grace_s)


def put(rig: Rig, request: Any, blocks: int, *leaves: LeafBlocks) -> int:
    """Begin a put in a step, and return its number."""
    assert rig.transfers.may_put(request, blocks, leaves)
    rig.transfers.put(request, PromptPart(request.prompt, blocks), leaves)
    (number,) = rig.step().puts
    return number


@pytest.mark.parametrize("local", [0, 1, 2])
def test_a_load_writes_what_the_prefix_needs_of_each_group(local: int) -> None:
    """A load has the chain's blocks, the window's, and the state, but not what the device has."""
    rig, request = rig_with(), request_with()
    request.local_blocks = local
    rig.load_groups(request, IDS, 3)
    window = {at: IDS[1][at] for at in (1, 2) if at >= local}
    told = (1, window), (2, {2: 6})
    assert rig.client.begun == [("get", local, IDS[0][local:], HELD, False, *told)]
    step = rig.step(Done(1, "success", 3 - local))
    assert (step.received, step.failed, step.failed_blocks) == ({"a"}, set(), set())
    assert request.stored_blocks == (0 if local else 3)


def test_the_cost_of_a_load_is_that_of_the_blocks_of_all_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A load of a chain from host memory whose leaves are on SSD says what the SSD costs."""
    rig, request = rig_with(), request_with()
    learnt = []
    costs = rig.transfers._costs
    assert costs is not None
    monkeypatch.setattr(costs, "loaded", lambda by_tier, took_s: learnt.append((by_tier, took_s)))
    rig.load_groups(request, IDS, 3, leaves={"disk": 2, "host": 1})
    rig.step(Done(1, "success", 3, took_s=0.5))
    assert learnt == [({"host": 3 + 1, "disk": 2}, 0.5)]


@pytest.mark.parametrize(
    "end",
    [
        {"status": "failed", "moved": 0, "error": "no leaf"},
        {"status": "success", "moved": 2},
        {"status": "success", "moved": 0},
        {"status": "cancelled", "moved": 0},
        {"status": "notfound", "moved": 0},
        {"status": "timeout", "moved": 3},
    ],
    ids=["failed", "short", "nothing", "cancelled", "gone", "late"],
)
def test_a_load_that_is_not_whole_has_failed_whole(end: dict[str, Any]) -> None:
    """The request is reported as failed, its blocks are not, and it does not load again."""
    rig, request = rig_with(), request_with()
    rig.load_groups(request, IDS, 3)
    step = rig.step(Done(1, **end))
    assert (step.received, step.failed, step.failed_blocks) == ({"a"}, {"a"}, set())
    assert step.settle == [1]
    assert (request.may_load, request.stored_blocks, request.load) == (False, 0, None)
    assert rig.step().failed == set()


def test_what_is_computed_after_a_failed_load_counts_as_new() -> None:
    """After a load of which nothing counts, the blocks are computed in the present generation."""
    rig, request = rig_with(), request_with()
    rig.load_groups(request, IDS, 3)
    rig.step(Done(1, "failed", 0))
    request.begins_anew(9)
    assert request.generation == 9


def test_a_failed_load_of_a_request_that_is_over_is_only_received() -> None:
    """Nobody has to recompute for a request that was aborted meanwhile."""
    rig, request = rig_with(), request_with()
    rig.load_groups(request, IDS, 3)
    assert rig.transfers.finish(request) is False
    step = rig.step(Done(1, "cancelled", 0))
    assert (step.received, step.failed, rig.over) == ({"a"}, set(), ["a"])


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2, 3], [0, 0, 5], [0, 0, 6]],
        [[1, 2, 3], [0, 4, 5], [0, 6, 0]],
        [[1, 2, 3], [0, 4, 5], [0, 0]],
        [[1, 2, 3], [0, 4, None], [0, 0, 6]],
        [[1, 0, 3], [0, 4, 5], [0, 0, 6]],
    ],
    ids=["window", "state", "short", "none", "chain"],
)
def test_a_load_into_a_null_block_fails_and_sends_nothing(ids: Any) -> None:
    """If the engine has a null block where the prefix needs a block, nothing is loaded at all."""
    rig, request = rig_with(), request_with()
    rig.load_groups(request, ids, 3)
    assert (rig.client.begun, rig.client.released) == ([], [HELD])
    step = rig.step()
    assert (step.received, step.failed, request.may_load) == ({"a"}, {"a"}, False)
    assert rig.counts == Counter(loads=1, failed_blocks=3)
    assert rig.over == []
    assert rig.transfers.finish(request) is False
    assert rig.over == ["a"]


def alone() -> Rig:
    """Return the transfers of an engine whose chain has a window of two blocks and one token."""
    return Rig(groups=KVGroups(spaces_of(chain=(WINDOW, 9)), 4))


@pytest.mark.parametrize("local", [0, 2, 4])
def test_a_load_of_a_window_alone_moves_no_null_block(local: int) -> None:
    """It moves the blocks of the last window; then no block of the prefix needs a put."""
    rig, request, first = alone(), request_with(), max(local, 3)
    request.local_blocks = local
    rig.load_groups(request, [[0, 0, 0, 4, 5]], 5)
    assert rig.client.begun == [("get", first, [0, 0, 0, 4, 5][first:], HELD, False)]
    assert rig.step(Done(1, "success", 5 - first)).failed == set()
    assert request.stored_blocks == (0 if local else 5)


def test_a_load_of_a_window_alone_that_comes_short_has_failed_whole() -> None:
    """A shorter prefix would need another window, which is not loaded, so nothing can be used."""
    rig, request = alone(), request_with()
    rig.load_groups(request, [[0, 0, 0, 4, 5]], 5)
    step = rig.step(Done(1, "success", 1))
    assert (step.failed, step.failed_blocks) == ({"a"}, set())


def test_a_put_of_a_window_alone_reads_no_null_block() -> None:
    """It begins behind the blocks that are gone; if it stores nothing, it is not tried again."""
    rig, request = alone(), request_with(0, 0, 3, 4)
    number = rig.put(request, 3)
    assert rig.client.begun == [("put", 2, [3], 3, 5)]
    rig.step(Done(number, "success", 0))
    assert not rig.transfers.may_put(request, 3)
    request.block_ids[2] = 0
    assert rig.transfers.may_put(request, 4)
    request.block_ids[3] = 0
    assert not rig.transfers.may_put(request, 4)


def test_a_load_never_goes_by_layer() -> None:
    """Layers of several groups are not loaded in the step."""
    request = request_with()
    request.found = Matched(HELD, 3, {"host": 3})
    rig = Rig(by_layer=True, groups=GROUPS)
    assert not rig.transfers.suits_layers(request)
    assert Rig(by_layer=True).transfers.suits_layers(request)


def test_a_put_stores_leaves_with_the_chain_and_after_it() -> None:
    """Leaves go with new blocks of the chain, or alone; null blocks are left out."""
    rig, request = rig_with(), request_with(1, 2, 3)
    first = put(rig, request, 2, leaf(1, 0, -1, 4), leaf(2, 1, 6))
    assert not rig.transfers.may_put(request, 2)
    second = put(rig, request, 2, leaf(1, 1, 4))
    third = put(rig, request, 3, leaf(1, 2, -1))
    assert rig.client.begun == [
        ("put", 0, [1, 2], 2, 5, (1, {1: 4}), (2, {1: 6})),
        ("put", 2, [], 2, 5, (1, {1: 4})),
        ("put", 2, [3], 3, 5),
    ]
    ends = [Done(second, "success", 0), Done(third, "success", 1), Done(first, "success", 2)]
    rig.step(*ends)
    assert (request.stored_blocks, request.puts) == (3, {})
    assert not rig.transfers.blocks.any_read


@pytest.mark.parametrize("status", ["failed", "success", "cancelled"])
def test_the_end_of_a_put_of_leaves_changes_nothing_of_the_chain(status: str) -> None:
    """A put of leaves alone that failed or stored nothing does not have the chain put again."""
    rig, request = rig_with(), request_with(1, 2, 3)
    rig.step(Done(put(rig, request, 3), "success", 3))
    rig.step(Done(put(rig, request, 2, leaf(1, 1, 4)), status, 0))
    assert request.stored_blocks == 3
    rig.step(Done(put(rig, request, 3, leaf(1, 1, 4)), "failed", 0, is_stale=True))
    assert request.is_stale
    assert not rig.transfers.may_put(request, 3, [leaf(1, 1, 4)])


def test_leaves_behind_the_prompts_blocks_or_of_before_a_reset_are_not_put() -> None:
    """Leaves are put only on blocks that the request has, and that are newer than a reset."""
    rig, request = rig_with(), request_with(1, 2, 3)
    assert not rig.transfers.may_put(request, 4, [leaf(1, 3, 9)])
    assert not rig.transfers.may_put(request, 0, [leaf(1, 0, 9)])
    rig.transfers.blocks.reset()
    assert not rig.transfers.may_put(request, 3, [leaf(1, 2, 9)])


def test_a_window_block_that_is_given_to_another_group_is_read_first() -> None:
    """A step waits for a put that reads as one group's block what it writes as another's.

    The request may be the same: the engine frees the blocks behind the window at once.
    """
    rig, request = rig_with(), request_with(1, 2)
    number = put(rig, request, 2, leaf(1, 0, 4, 5))
    request.block_ids.append(4)  # freed by the window, now a block of the chain
    rig.transfers.written(request, 2, [8, None, 0])
    step = rig.step()
    assert (rig.client.cancelled, rig.client.given_up, step.settle) == ([number], 1, [number])
    other = put(rig, request, 3, leaf(1, 2, 9))
    rig.transfers.written(request, 3, [0, 9])
    rig.step()
    assert rig.client.cancelled == [number, other]


def test_a_step_waits_a_while_before_it_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that ends within the grace is not cancelled; one that goes on is, and then ends."""
    rig, request = rig_with(grace_s=3600.0), request_with(1, 2)
    number = put(rig, request, 2, leaf(1, 0, 4, 5))
    polls: list[int] = []
    poll = rig.client.poll

    def end_later() -> list[Done]:
        polls.append(1)
        if len(polls) == 5:
            rig.client.ends.append(Done(number, "success", 2))
        return poll()

    monkeypatch.setattr(rig.client, "poll", end_later)
    rig.transfers.written(request, 2, [4])
    assert rig.transfers.make_step().settle == []
    assert (rig.client.cancelled, len(polls)) == ([], 5)


def test_a_load_waits_for_puts_that_read_its_leaves() -> None:
    """A load begins once no put reads a block that it writes, of whatever group."""
    rig, one, other = rig_with(), request_with(11, 12), request_with(name="b")
    number = put(rig, one, 2, leaf(1, 1, 6))
    rig.load_groups(other, IDS, 3)
    rig.step()
    assert len(rig.client.begun) == 1
    rig.step(Done(number, "success", 2))
    assert rig.client.begun[1][:3] == ("get", 0, [1, 2, 3])


class Asks:
    """A client whose matches are answered at once."""

    welcome = Welcome(PROTOCOL_VERSION, 1)

    def __init__(self, *answers: Matched) -> None:
        self.answers, self.asked = list(answers), list[tuple[int, int, int]]()
        self.released: list[int] = []

    def ask(
        self, part: PromptPart, first: int, hold: bool, tell: bool, drop: int, apart: bool
    ) -> int:
        """Record a match."""
        assert (hold, apart) == (True, False), "the server has no far tier"
        self.asked.append((part.blocks, first, drop))
        return len(self.asked)

    def answer(self, number: int, wait_s: float) -> Matched:
        """Return the next answer."""
        return self.answers.pop(0)

    def release(self, numbers: list[int]) -> None:
        """Record the numbers."""
        self.released += numbers


def matches_of(client: Asks, drop: int = 0) -> PendingMatches:
    """Return the pending matches of an engine."""
    return PendingMatches(client, 0.0, tells=False, drop=drop)  # type: ignore[arg-type]


def test_a_shorter_hit_than_the_chain_is_remembered_as_a_junction() -> None:
    """The request learns where its prompt leaves a chain whose leaves are missing there."""
    request = request_with()
    client = Asks(Matched(1, 2, {}, chain=5), Matched(2, 5, {}, chain=5))
    matches = matches_of(client, drop=1)
    part_of = lambda blocks: PromptPart(request.prompt, blocks)  # noqa: E731
    assert matches.found(request, 7, part_of) is not None
    assert (request.junction_blocks, client.asked) == (5, [(7, 0, 1)])
    assert GROUPS.boundaries(30, request.junction_blocks) == (5, 7)
    matches.found(request, 7, part_of)
    assert request.junction_blocks == 0


@pytest.mark.parametrize(
    ("early", "asked"),
    [
        (Matched(1, 0, {}, chain=5), [0, 3]),
        (Matched(1, 4, {}, chain=5), [0, 3]),
        (Matched(1, 2, {}, chain=3), [0]),
    ],
    ids=["leaves before are missing", "longer", "no longer chain"],
)
def test_a_match_is_made_again_for_what_the_device_has(early: Matched, asked: list[int]) -> None:
    """Leaves on blocks that the device has need not be there, so the hit may be longer."""
    request = request_with()
    client = Asks(early, Matched(2, 5, {}, chain=5))
    matches = matches_of(client)
    matches.ask(request, PromptPart(request.prompt, 7), 0, is_early=True)
    request.local_blocks = 3
    matches.found(request, 7, lambda blocks: PromptPart(request.prompt, blocks))
    assert [first for _, first, _ in client.asked] == asked
