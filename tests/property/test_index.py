"""The index against the model of dicts and sets, under every policy and any interleaving."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexkv.common.errors import InvariantError
from flexkv.common.space import GroupRule
from flexkv.common.terms import Positions, Tier
from flexkv.index.claims import Claim, Holding
from flexkv.index.eviction import POLICIES, Eviction
from flexkv.index.found import Limits
from flexkv.index.recorder import Change
from flexkv.index.residency import READY, Residency
from tests.property.index_model import Driver
from tests.property.index_names import (
    DEPTH,
    NAMESPACES,
    PATHS,
    RULES,
    TIERS,
    key_of,
    keys_of,
)

OPERATIONS = int(os.environ.get("INDEX_OPERATIONS", "4000"))
OPERATIONS_A_SEED = 200
EVICTIONS = [Eviction(name) for name in POLICIES] + [
    Eviction("lru", hit_reward_seconds=3.0),
    Eviction("lru", evict_ratio=0.4),
]


NUMBERS = st.integers(0, 1 << 10)
"""Numbers of blocks, modulo how many the driver has names for."""


class IndexMachine(RuleBasedStateMachine):
    """A state machine in which hypothesis chooses the operations and shrinks failures."""

    @initialize(eviction=st.sampled_from(EVICTIONS), rules=st.sampled_from(RULES))
    def open(self, eviction: Eviction, rules: tuple[GroupRule, ...]) -> None:
        """Start with an empty index."""
        self.driver = Driver(eviction, 7, 9, rules)

    def name(self, number: int) -> tuple[int, ...]:
        """Return the name of a block of the chain or of a leaf."""
        return self.driver.names[number % len(self.driver.names)]

    @rule(
        tier=st.sampled_from(TIERS),
        path=st.sampled_from(PATHS),
        begin=st.integers(0, DEPTH),
        atomic=st.booleans(),
        group=st.integers(0, 3),
    )
    def reserve(
        self, tier: Tier, path: tuple[int, ...], begin: int, atomic: bool, group: int
    ) -> None:
        """Reserve places for the blocks, or the leaves, that a prompt lacks."""
        self.driver.reserve(tier, path, begin, atomic, group % len(self.driver.groups))

    @rule(source=st.sampled_from(TIERS), numbers=st.lists(NUMBERS, min_size=1, max_size=6))
    def reserve_copies(self, source: Tier, numbers: list[int]) -> None:
        """Reserve places in one tier for blocks of the other."""
        self.driver.reserve_copies(source, [self.name(number) for number in numbers])

    @rule(number=st.integers(0, 9), filled=st.booleans())
    def settle(self, number: int, filled: bool) -> None:
        """Commit or abort a lease."""
        self.driver.settle(number, filled)

    @rule(tier=st.sampled_from(TIERS), number=NUMBERS)
    def pin(self, tier: Tier, number: int) -> None:
        """Pin a block."""
        self.driver.pin(tier, self.name(number))

    @rule(number=st.integers(0, 9))
    def unpin(self, number: int) -> None:
        """Unpin a block."""
        self.driver.unpin(number)

    @rule(path=st.sampled_from(PATHS), first=st.integers(0, 2), drop=st.integers(0, 2))
    def use(self, path: tuple[int, ...], first: int, drop: int) -> None:
        """Find a prompt as a use."""
        self.driver.use(path, first, drop)

    @rule(path=st.sampled_from(PATHS), first=st.integers(0, 2), random=st.randoms())
    def use_some(self, path: tuple[int, ...], first: int, random: Random) -> None:
        """Find a prompt as a use, where some tiers and leaves must not be used."""
        self.driver.use(path, first, 0, random_limits(self.driver, random))

    @rule(
        tier=st.sampled_from(TIERS),
        space=st.integers(0, NAMESPACES - 1),
        count=st.integers(0, 8),
    )
    def make_room(self, tier: Tier, space: int, count: int) -> None:
        """Make room for blocks, or evict nothing."""
        self.driver.make_room(tier, space, count)

    @rule(tier=st.sampled_from(TIERS), blocks=st.integers(0, 8))
    def evict(self, tier: Tier, blocks: int) -> None:
        """Evict blocks ahead of need."""
        self.driver.evict(tier, blocks)

    @rule(tier=st.sampled_from(TIERS), number=NUMBERS)
    def forget(self, tier: Tier, number: int) -> None:
        """Forget one block, as if its bytes were bad."""
        self.driver.forget(tier, self.name(number))

    @rule(tier=st.sampled_from(TIERS), numbers=st.lists(NUMBERS, max_size=6))
    def spend(self, tier: Tier, numbers: list[int]) -> None:
        """Make some blocks the next to be evicted."""
        spend(self.driver, tier, [self.name(number) for number in numbers])

    @rule()
    def restart(self) -> None:
        """Begin anew with what the lower tier holds."""
        self.driver.restart()

    @rule(tier=st.sampled_from((*TIERS, None)))
    def clear(self, tier: Tier | None) -> None:
        """Clear a tier, or everything."""
        self.driver.clear(tier, None)

    @rule(space=st.integers(0, NAMESPACES - 1))
    def clear_namespace(self, space: int) -> None:
        """Clear a namespace."""
        self.driver.clear(None, space)

    @rule(tier=st.sampled_from(TIERS), capacity=st.integers(1, 8))
    def resize(self, tier: Tier, capacity: int) -> None:
        """Change a tier's capacity."""
        self.driver.resize(tier, capacity)

    @rule(
        tier=st.sampled_from(TIERS),
        space=st.integers(0, NAMESPACES - 1),
        blocks=st.none() | st.integers(0, 6),
    )
    def set_quota(self, tier: Tier, space: int, blocks: int | None) -> None:
        """Set or lift a namespace's quota."""
        self.driver.set_quota(tier, space, blocks)

    @invariant()
    def agrees(self) -> None:
        """The index and the model agree in everything that can be observed."""
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        """Nothing is reserved, pinned or draining once every lease and pin has ended."""
        if hasattr(self, "driver"):
            self.driver.finish()


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(
    max_examples=80, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_random_operations_agree_with_the_model(
    eviction: Eviction, rules: tuple[GroupRule, ...]
) -> None:
    """The index agrees with the model over INDEX_OPERATIONS seeded operations of each policy."""
    share = OPERATIONS // len(RULES)
    for seed in range(share // OPERATIONS_A_SEED):
        random = Random(seed)
        driver = Driver(eviction, random.randint(1, 12), random.randint(1, 16), rules)
        try:
            for _ in range(OPERATIONS_A_SEED):
                random_step(driver, random)
                driver.check()
            driver.finish()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def random_step(driver: Driver, random: Random) -> None:
    """Perform one random operation; those that fill and find are likelier than those that drop."""
    tier, path, name = random.choice(TIERS), random.choice(PATHS), random.choice(driver.names)
    few, space = random.randint(0, 6), random.randrange(NAMESPACES)
    begin, group = random.choice([0, 0, 0, 1, 2]), random.choice(driver.groups)
    several = random.choices(driver.names, k=1 + few)
    steps: list[tuple[int, Callable[[], None]]] = [
        (350, lambda: driver.reserve(tier, path, begin, few < 3, group)),
        (220, lambda: driver.settle(random.randrange(9), random.random() < 0.8)),
        (100, lambda: driver.use(path, begin, random.choice([0, 0, 1, 2]))),
        (80, lambda: driver.use(path, begin, few // 4, random_limits(driver, random))),
        (50, lambda: driver.reserve_copies(tier, several)),
        (60, lambda: driver.pin(tier, name)),
        (60, lambda: driver.unpin(random.randrange(9))),
        (40, lambda: driver.evict(tier, few)),
        (20, lambda: driver.make_room(tier, space, few)),
        (25, lambda: driver.forget(tier, name)),
        (25, lambda: spend(driver, tier, several)),
        (10, lambda: driver.set_quota(tier, space, random.choice([None, few]))),
        (15, lambda: driver.resize(tier, random.randint(1, 16))),
        (5, lambda: driver.clear(random.choice([tier, None]), None)),
        (5, lambda: driver.clear(None, space)),
        (10, driver.restart),
    ]
    weights, operations = zip(*steps, strict=True)
    (operation,) = random.choices(operations, weights)
    operation()


def spend(driver: Driver, tier: Tier, names: list[tuple[int, ...]]) -> None:
    """Make blocks the next to be evicted; exactly those that are READY become so."""
    placed = [(name, driver.blocks.get(name, {}).get(tier)) for name in names]
    there = [(name, place) for name, place in placed if place is not None]
    ids = np.array([place.block_id for _, place in there], np.int64)
    keys = b"".join(key_of(name) for name, _ in there)
    spent = driver.index._table.spend(driver.index._number[tier], ids, keys)
    assert spent == sum(place.state == READY for _, place in there)


def random_limits(driver: Driver, random: Random) -> Limits:
    """Return tiers, ops and leaves that a search must not use; most leaves may be used."""
    tiers = frozenset(tier for tier in TIERS if random.random() < 0.3)
    last = driver.fillers
    some = frozenset(op for op in range(last - 5, last + 1) if random.random() < 0.3)
    fillers = random.choice([None, frozenset(), some])
    if random.random() < 0.3:
        return Limits(tiers, fillers)
    shape = len(driver.rules), random.randint(0, DEPTH)
    often = random.choice([0.5, 0.9, 1.0])
    has = [random.random() < often for _ in range(shape[0] * shape[1])]
    return Limits(tiers, fillers, np.array(has, np.bool_).reshape(shape))


# -- the order of evictions ----------------------------------------------------------------------


def filled(policy: str, *prompts: tuple[int, ...], **changes: int) -> Residency:
    """Return an index of one tier of six blocks, in which these prompts were put in order."""
    index = Residency({Tier.HOST: 6}, Eviction(policy, **changes))
    for prompt in prompts:
        keys = keys_of(prompt)
        found = index.find(keys)
        ids = index.reserve(Tier.HOST, keys, Positions(found.last, len(prompt) - 1 - found.last))
        index.commit(Tier.HOST, ids)
    return index


def lengths(index: Residency, *prompts: tuple[int, ...]) -> list[int]:
    """Return how many leading blocks of each prompt are resident."""
    return [index.find(keys_of(prompt)).last for prompt in prompts]


A, B, C = (0, 0, 0), (0, 1, 0), (0, 2, 0)


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("lru", [2, 0, 1]),  # B was used longest ago, then the leaf of C
        ("mru", [0, 2, 1]),  # A was used last
        ("fifo", [0, 1, 2]),  # A came first, used or not
        ("filo", [2, 1, 0]),  # C came last
        ("lfu", [2, 0, 1]),  # A was used most, then C
        ("slru", [2, 0, 1]),  # A and C are protected, B is not
    ],
)
def test_each_policy_takes_its_victims_leaf_first(policy: str, left: list[int]) -> None:
    """Each policy evicts the prompt that it should, and then the leaf of the next one."""
    index = filled(policy, A, B, C)
    for prompt in (C, C, A, A, A):
        index.find(keys_of(prompt), use=True)
    assert index.evict(Tier.HOST, 3) == 3
    assert lengths(index, A, B, C) == left
    index.validate()


def test_a_reward_keeps_what_was_hit() -> None:
    """Under hit_reward_seconds a use counts as if it had come later than it did."""
    index = Residency({Tier.HOST: 6}, Eviction("lru", hit_reward_seconds=10.0))
    for now, prompt in enumerate((A, B)):
        index.tick(now * 20)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, keys_of(prompt), Positions(0, 2)))
        for _ in range(4 * (prompt == A)):
            index.find(keys_of(prompt), use=True)
    index.evict(Tier.HOST, 2)
    assert lengths(index, A, B) == [2, 0]
    index.tick(1000)
    index.commit(Tier.HOST, index.reserve(Tier.HOST, keys_of(C), Positions(0, 2)))
    index.evict(Tier.HOST, 2)
    assert lengths(index, A, C) == [0, 2]


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.4])
def test_the_smallest_reward_is_a_second(seconds: float) -> None:
    """A reward is a whole number of seconds, and at least one."""
    index = Residency({Tier.HOST: 6}, Eviction("lru", hit_reward_seconds=seconds))
    for now, prompt in ((0, A), (6, B)):
        index.tick(now)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, keys_of(prompt), Positions(0, 2)))
        for _ in range(4 * (prompt == A)):
            index.find(keys_of(prompt), use=True)
    index.evict(Tier.HOST, 2)
    assert lengths(index, A, B) == [0, 2]


def test_slru_bounds_what_it_protects() -> None:
    """When nearly all blocks are protected, the least recently used one goes back on probation."""
    index = filled("slru", A, B, C, slru_protected_threshold=1)
    for prompt in (A, B, C):
        index.find(keys_of(prompt), use=True)
    index.evict(Tier.HOST, 2)
    assert lengths(index, A, B, C) == [0, 2, 2]


def test_an_eviction_frees_at_least_the_configured_part() -> None:
    """An eviction frees evict_ratio of the tier at once, however few blocks are wanted."""
    index = Residency({Tier.HOST: 10}, Eviction("lru", evict_ratio=0.3))
    for number in range(5):
        prompt = (0, number, 0)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, keys_of(prompt), Positions(0, 2)))
    index.reserve(Tier.HOST, keys_of((1, 0)), Positions(0, 1))
    assert index.counts(Tier.HOST).evicted == 3
    assert index.counts(Tier.HOST).free == 2


# -- our own mistakes ----------------------------------------------------------------------------


def test_breaking_a_law_is_an_invariant_error() -> None:
    """A call that breaks a law of the index raises InvariantError at once."""
    index = Residency({Tier.HOST: 4})
    keys = keys_of((0, 0, 0))
    with pytest.raises(InvariantError, match="parent is not in the index"):
        index.reserve(Tier.HOST, keys, Positions(1, 1))
    ids = index.reserve(Tier.HOST, keys, Positions(0, 1))
    with pytest.raises(InvariantError, match="has a place already"):
        index.reserve(Tier.HOST, keys, Positions(0, 1))
    with pytest.raises(InvariantError, match="unpin"):
        index._table.unpin(0, ids)
    with pytest.raises(InvariantError, match="pin of a FREE"):
        index._table.pin(0, ids + 1)
    index.commit(Tier.HOST, ids)
    for call in (index.commit, index.abort):
        with pytest.raises(InvariantError, match="not RESERVED"):
            call(Tier.HOST, ids)
    with pytest.raises(InvariantError, match="lease"):
        index._table.lease(0, ids, 1)
    with pytest.raises(InvariantError, match="filler"):
        index._table.fillers(0, ids)
    with pytest.raises(InvariantError, match="key of a place"):
        index.keys_of(Tier.HOST, np.array([3]))
    with pytest.raises(InvariantError, match="holds no block"):
        index.forget(Tier.HOST, np.array([-1]))


def test_a_refused_reserve_gives_back_what_it_took() -> None:
    """A batch refused for one bad position leaves no place reserved or counted."""
    index = Residency({Tier.HOST: 4})
    keys = keys_of((0, 0, 0))
    with pytest.raises(InvariantError, match="has a place already"):
        index.reserve(Tier.HOST, keys, Positions(0, 2, np.array([0, 0])))
    assert index.counts(Tier.HOST) == (4, 4, 0, 0, 0, 0, 0)
    index.validate()


def test_a_claim_that_breaks_a_law_is_not_open() -> None:
    """A claim that pins a FREE block raises, and leaves nothing to settle."""
    index = Residency({Tier.HOST: 4})
    claim = Claim(1, Holding(Tier.HOST, np.array([0])), None)
    with pytest.raises(InvariantError, match="pin of a FREE"):
        index.claims.open(5, claim)
    assert not index.claims
    assert not index.claims.of_owner(1)


def test_changes_beyond_the_limit_are_told_as_lost() -> None:
    """Changes beyond the limit are reported as lost; later changes are reported again."""
    index = Residency({Tier.HOST: 4}, Eviction())
    keys = keys_of((0, 1, 1))
    index.recorder.watch(1)
    index.commit(Tier.HOST, index.reserve(Tier.HOST, keys, Positions(0, 2)))
    assert index.recorder.take() is None
    assert changes_of(index) == []
    index.evict(Tier.HOST, 1)
    gone = Change(key_of((0, 1, 1)), Tier.HOST, False, 0, 2, frozenset())
    assert changes_of(index) == [gone]
    index.recorder.watch(0)
    index.evict(Tier.HOST, 1)
    assert changes_of(index) == []


def changes_of(index: Residency) -> list[Change]:
    """Return the changes that an index has recorded."""
    records = index.recorder.take()
    assert records is not None
    return index.recorder.decoded(records)


@pytest.mark.parametrize(("policy", "left"), [("lfu", [2, 1, 0]), ("slru", [1, 2, 0])])
def test_uses_are_counted_by_one_policy_and_ordered_by_another(
    policy: str, left: list[int]
) -> None:
    """Of blocks used several times lfu evicts the least used, and slru the least recently used."""
    index = filled(policy, A, B, C)
    for prompt in (A, A, A, A, B, B):
        index.find(keys_of(prompt), use=True)
    assert index.evict(Tier.HOST, 3) == 3
    assert lengths(index, A, B, C) == left
