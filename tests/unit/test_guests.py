"""Blocks fetched from other nodes: which of them are evicted next, and for how long."""

from __future__ import annotations

from collections import deque
from random import Random

import numpy as np
import pytest

from flexkv.common.terms import Positions, Tier
from flexkv.index.claims import Claim, Holding
from flexkv.index.eviction import POLICIES, Eviction
from flexkv.index.residency import Residency
from tests.unit.leaves import prompt

HOST = Tier.HOST
PLACES = 32
SHARE = 1 / 8
"""Four of the latest guests are not spent."""


def keys_of(*numbers: int) -> bytes:
    """Return the keys of a prompt."""
    return prompt(0, *numbers)


def table(policy: str = "lru", share: float = SHARE) -> Residency:
    """Return an empty index that limits guests."""
    index = Residency({HOST: PLACES}, Eviction(policy))
    index.limit_guests(share)
    return index


def bring(
    index: Residency, *numbers: int, source: Tier = Tier.PEER, first: int = 0, failed: int = 0
) -> list[int]:
    """Fill host memory with the blocks of a prompt, all but the `failed` last ones."""
    positions = Positions(first, len(numbers) - first)
    ids = index.reserve(HOST, keys_of(*numbers), positions)
    assert len(ids) == len(numbers) - first
    index.claims.open(1, Claim(1, None, Holding(HOST, ids), source))
    index.claims.settle(1, not failed, len(ids) - failed)
    return ids[: len(ids) - failed].tolist()


def left(index: Residency, *numbers: int) -> list[int]:
    """Return which prompts of one block are resident."""
    return [number for number in numbers if index.find(keys_of(number)).last]


def ask(index: Residency, *numbers: int) -> int:
    """Ask for a prompt, and return how many of its blocks are there."""
    return index.find(keys_of(*numbers), use=True).last


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"mru", "filo"}))
def test_guests_beyond_the_budget_go_before_all_others(policy: str) -> None:
    """The earliest guests go next, but under policies by which newer blocks go first."""
    index = table(policy)
    for number in range(6):
        bring(index, number, source=Tier.DEVICE)
    for number in range(10, 16):
        bring(index, number)
    for number in range(20, 26):
        bring(index, number, source=Tier.REMOTE)
    assert index.evict(HOST, 2) == 2
    assert left(index, *range(6)) == [*range(6)]
    assert left(index, *range(10, 16)) == [12, 13, 14, 15]
    assert left(index, *range(20, 26)) == [*range(20, 26)]
    index.validate()


@pytest.mark.parametrize("policy", ["lru", "fifo", "slru", "lhd"])
def test_a_spent_guest_that_is_asked_for_stays_like_any_other(policy: str) -> None:
    """A use after that counts; one before it was for the request that fetched the block."""
    index = table(policy)
    bring(index, 1)
    bring(index, 2)
    ask(index, 1)
    for number in range(10, 14):
        bring(index, number)
    ask(index, 2)
    bring(index, 3, source=Tier.DEVICE)
    assert index.evict(HOST, 1) == 1
    assert left(index, 1, 2, 3, *range(10, 14)) == [2, 3, *range(10, 14)]
    index.validate()


def test_guests_that_are_stored_once_more_are_spent_all_the_same() -> None:
    """A put of the request for which they came, or of a longer prompt, asks for nothing."""
    index = table()
    bring(index, 1)
    bring(index, 2, source=Tier.DEVICE)
    for number in range(10, 14):
        bring(index, number)
    index.survey(keys_of(1, 5), 0, 2)
    index.survey(keys_of(2, 5), 0, 2)
    assert index.evict(HOST, 1) == 1
    assert left(index, 1, 2) == [2]
    assert index.evict(HOST, 4) == 4
    assert left(index, 2) == [2], "of others a put counts"


@pytest.mark.parametrize("policy", ["lru", "fifo", "slru", "lfu", "lhd"])
def test_a_spent_guest_that_was_pinned_in_its_turn_goes_after_that(policy: str) -> None:
    """While something reads it, others go in its place; then it is the next."""
    index = table(policy)
    places = bring(index, 1)
    bring(index, 2, source=Tier.DEVICE)
    for number in range(10, 15):
        bring(index, number)
    with index.holding([Holding(HOST, np.array(places))]):
        assert index.evict(HOST, 2) == 2
        assert left(index, 1, 10, 2) == [1]
    bring(index, 3, source=Tier.DEVICE)
    assert index.evict(HOST, 1) == 1
    assert left(index, 1, 3) == [3]
    index.validate()


def test_a_place_that_holds_another_block_by_now_is_not_spent() -> None:
    """Guests are known by place and key: what has taken a guest's place stays."""
    index = table()
    (place,) = bring(index, 1)
    index.forget(HOST, np.array([place]))
    assert bring(index, 2, source=Tier.DEVICE) == [place]
    bring(index, 3, source=Tier.DEVICE)
    index.find(keys_of(2), use=True)
    for number in range(10, 14):
        bring(index, number)
    assert index.evict(HOST, 1) == 1
    assert left(index, 2, 3) == [2]


def test_guests_stay_as_long_as_blocks_of_ours_continue_them() -> None:
    """What this node has computed behind guests keeps them; they go right after it."""
    index = table()
    bring(index, 1, 2, 3)
    bring(index, 1, 2, 3, 4, source=Tier.DEVICE, first=3)
    bring(index, 10, 11, 12, 13)
    bring(index, 5, source=Tier.DEVICE)
    assert ask(index, 1, 2, 3, 4) == 4
    bring(index, 20, 21, 22, 23)
    assert index.evict(HOST, 5) == 5
    assert ask(index, 1, 2, 3, 4) == 4
    assert left(index, 5, 10) == []


def test_only_blocks_that_have_arrived_count() -> None:
    """Of a fetch that ends early the leading blocks are guests, and none if there are none."""
    index = table()
    bring(index, 9, source=Tier.DEVICE)
    bring(index, 1, 2, 3, failed=1)
    bring(index, 4, failed=1)
    for number in (5, 6):
        bring(index, number)
    assert index.evict(HOST, 1) == 1
    assert left(index, 9) == [], "no guest is spent yet"
    assert ask(index, 1, 2) == 2
    bring(index, 7)
    assert index.evict(HOST, 1) == 1
    assert left(index, 5, 6, 7) == [6, 7], "the guest 2 is not spent, and so keeps 1"
    assert ask(index, 1, 2, 3) == 2


class Model:
    """Host memory as a list under lru, for prompts of one block each; the next victim is first."""

    def __init__(self, latest_max: int) -> None:
        self.order: list[int] = []
        self.spent: set[int] = set()
        self.place: dict[int, int] = {}
        self.latest = deque[tuple[int, int]]()
        self.latest_max = latest_max

    def arrive(self, number: int, place: int, is_guest: bool) -> None:
        """Add a block."""
        self.order.append(number)
        self.place[number] = place
        if not is_guest:
            return
        self.latest.append((number, place))
        if len(self.latest) > self.latest_max:
            earliest, place = self.latest.popleft()
            if self.place.get(earliest) == place:
                self.spent.add(earliest)
                self._move(earliest, 0)

    def ask(self, number: int, is_stored: bool) -> None:
        """Use a block, if it is there."""
        if number in self.place and not (is_stored and number in self.spent):
            self.spent.discard(number)
            self._move(number, len(self.order))

    def _move(self, number: int, to: int) -> None:
        self.order.remove(number)
        self.order.insert(to, number)

    def evict(self, count: int) -> None:
        """Evict some blocks."""
        for number in self.order[:count]:
            del self.place[number]
            self.spent.discard(number)
        del self.order[:count]


@pytest.mark.parametrize("seed", range(20))
def test_victims_are_those_of_a_plain_model(seed: int) -> None:
    """Whatever arrives, is asked for, stored and evicted, a list and a queue say what is left."""
    chance, numbers = Random(seed), range(1, 60)
    index, model = table(share=chance.choice([0.0, 1 / 16, 1 / 4])), None
    assert index.claims.guests is not None
    model = Model(index.claims.guests.blocks_max)
    for _ in range(600):
        number = chance.choice(numbers)
        if number in model.place:
            if is_stored := chance.random() < 0.3:
                index.survey(keys_of(number), 0, 1)
            else:
                ask(index, number)
            model.ask(number, is_stored)
        elif len(model.order) < PLACES:
            is_guest = chance.random() < 0.6
            (place,) = bring(index, number, source=Tier.PEER if is_guest else Tier.DEVICE)
            model.arrive(number, place, is_guest)
        else:
            count = chance.randint(1, 6)
            assert index.evict(HOST, count) == count
            model.evict(count)
        assert left(index, *numbers) == sorted(model.order)
    index.validate()
