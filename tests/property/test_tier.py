"""One tier against a model of dicts and sets, under every interleaving of its operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from flexkv.common.errors import CapacityError, InvariantError
from flexkv.common.terms import Tier
from flexkv.index.eviction import LeastRecentlyUsed
from flexkv.index.tier import BlockState, TierIndex

CAPACITY = 6


def key(number: int) -> bytes:
    """Give a block key by number."""
    return number.to_bytes(16, "little")


class TierMachine(RuleBasedStateMachine):
    """Drives a tier and a model: who is ready, in what order of use; who is pinned or reserved."""

    reserved = Bundle("reserved")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.tier = TierIndex(Tier.HOST, CAPACITY, LeastRecentlyUsed())
        self.ready: dict[int, int] = {}  # key number -> id, least recently used first
        self.being_filled: dict[int, int] = {}
        self.pinned: dict[int, int] = {}

    def evictable(self) -> list[int]:
        """Give the key numbers that may be evicted, in order."""
        return [n for n, block in self.ready.items() if not self.pinned.get(block)]

    @rule(target=reserved, numbers=st.lists(st.integers(0, 9), unique=True, max_size=4))
    def reserve(self, numbers: list[int]) -> object:
        """Reserve the keys that have no place; all of them, or none."""
        numbers = [n for n in numbers if self.tier.find(key(n)) is None]
        evictable = self.evictable()
        free = self.tier.free_blocks
        if len(numbers) > free + len(evictable):
            with pytest.raises(CapacityError):
                self.tier.reserve([key(n) for n in numbers])
            return multiple()
        ids = self.tier.reserve([key(n) for n in numbers])
        assert len(set(ids)) == len(numbers)
        for victim in evictable[: max(0, len(numbers) - free)]:
            del self.ready[victim]
        for number, block in zip(numbers, ids, strict=True):
            assert block not in self.ready.values()
            self.being_filled[number] = block
        return multiple(*zip(numbers, ids, strict=True))

    @rule(block=consumes(reserved), filled=st.booleans())
    def settle(self, block: tuple[int, int], filled: bool) -> None:
        """Commit makes visible what is still wanted; abort makes it go."""
        number, place = block
        wanted = self.being_filled.get(number) == place
        if wanted:
            del self.being_filled[number]
        if filled:
            self.tier.commit([place])
            if wanted:
                self.ready[number] = place
        else:
            self.tier.abort([place])

    @rule(target=pins, number=st.integers(0, 9))
    def pin(self, number: int) -> object:
        """Pin what has a place."""
        place = self.tier.find(key(number))
        if place is None:
            return multiple()
        self.tier.pin([place])
        self.pinned[place] = self.pinned.get(place, 0) + 1
        return place

    @rule(place=consumes(pins))
    def unpin(self, place: int) -> None:
        """The last unpin counts as a use."""
        self.tier.unpin([place])
        self.pinned[place] -= 1
        self._used(place)

    def _used(self, place: int) -> None:
        for number, block in list(self.ready.items()):
            if block == place and not self.pinned.get(block):
                self.ready[number] = self.ready.pop(number)

    @rule(number=st.integers(0, 9))
    def touch(self, number: int) -> None:
        """A touch makes a block the most recently used."""
        place = self.ready.get(number)
        if place is not None:
            self.tier.touch([place])
            if not self.pinned.get(place):
                self._used(place)

    @rule()
    @precondition(lambda self: self.ready or self.being_filled)
    def clear(self) -> None:
        """Clear forgets every key at once."""
        assert self.tier.clear() == len(self.ready) + len(self.being_filled)
        self.ready.clear()
        self.being_filled.clear()

    @invariant()
    def agrees(self) -> None:
        """Keys, states and counters are those of the model."""
        self.tier.validate()
        for number in range(10):
            place = self.ready.get(number, self.being_filled.get(number))
            assert self.tier.find(key(number)) == place
            if place is not None:
                assert self.tier.is_ready(place) == (number in self.ready)
        assert self.tier.evictable_blocks == len(self.evictable())


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=150, stateful_step_count=40)


def test_lru_evicts_the_leaf_before_its_parents() -> None:
    """A prefix handed over from root to leaf loses its leaf first."""
    tier = TierIndex(Tier.HOST, 4, LeastRecentlyUsed())
    ids = tier.reserve([key(n) for n in range(4)])
    tier.commit(ids)
    tier.reserve([key(9)])
    assert tier.find(key(3)) is None
    assert [tier.find(key(n)) for n in range(3)] == ids[:3]


def test_an_eviction_frees_at_least_the_configured_part() -> None:
    """evict_ratio of the tier goes at once, however few blocks are wanted."""
    tier = TierIndex(Tier.HOST, 10, LeastRecentlyUsed(), evict_ratio=0.3)
    tier.commit(tier.reserve([key(n) for n in range(10)]))
    tier.reserve([key(20)])
    assert (tier.evicted_blocks, tier.free_blocks) == (3, 2)


def test_breaking_the_order_of_states_is_an_invariant_error() -> None:
    """Our own mistakes are caught where they are made."""
    tier = TierIndex(Tier.HOST, 2, LeastRecentlyUsed())
    (place,) = tier.reserve([key(0)])
    with pytest.raises(InvariantError):
        tier.unpin([place])
    with pytest.raises(InvariantError):
        tier.reserve([key(0)])
    with pytest.raises(InvariantError):
        tier.pin([1 - place])
    tier.commit([place])
    with pytest.raises(InvariantError):
        tier.commit([place])
    assert tier.count(BlockState.READY) == 1
