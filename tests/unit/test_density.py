"""The lhd policy: what it learns from when blocks are asked for again, and what that gains."""

from __future__ import annotations

from random import Random

import pytest

from flexkv.common.terms import Positions, Tier
from flexkv.index.eviction import Eviction
from flexkv.index.residency import WORTHY, Residency
from flexkv.trace.hits import Prompt, prompts_of, replay
from flexkv.trace.mooncake import TraceLine


def prompts(walks: list[list[int]]) -> list[Prompt]:
    """Return prompts of numbered blocks."""
    return prompts_of(TraceLine(0.0, 1, 1, walk) for walk in walks)


def ask(index: Residency, prompt: Prompt) -> int:
    """Find a prompt, store what it lacks as far as that is worth it, and return its hits."""
    found, blocks = index.find(prompt.keys, use=True), len(prompt.ids)
    with index.holding(found.holdings):
        rest = Positions(found.last, blocks - found.last)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, prompt.keys, rest, WORTHY))
    return found.last


def chats(seed: int, loyal: float) -> list[Prompt]:
    """Return conversations: most have one turn, and those with a second turn have many more."""
    random = Random(seed)
    live: list[tuple[float, list[int], int]] = []
    walks, fresh = [], 1000
    for now in range(3000):
        due = [chat for chat in live if chat[0] <= now]
        live = [chat for chat in live if chat[0] > now]
        fresh += 40
        due.append((now, [1, *range(fresh, fresh + 8)], 0))
        for _, walk, turn in due:
            walks.append(walk)
            if random.random() < (loyal if turn else 0.15):
                fresh += 40
                again = now + random.uniform(20, 60)
                live.append((again, [*walk, *range(fresh, fresh + 2)], turn + 1))
    return prompts(walks)


@pytest.mark.parametrize("seed", range(3))
def test_history_beats_recency_where_it_tells(seed: int) -> None:
    """In a tier far too small for all, lhd keeps loyal conversations over one-shot prompts."""
    asked = chats(seed, loyal=0.9)
    assert replay(asked, 600, Eviction("lhd")).rate > 1.1 * replay(asked, 600, Eviction()).rate


@pytest.mark.parametrize("seed", range(3))
def test_it_is_no_worse_where_nothing_tells(seed: int) -> None:
    """On uniformly random prompts, where all classes are alike, lhd loses little to LRU."""
    random = Random(seed)
    asked = prompts([[n, n + 10_000] for n in (random.randrange(400) for _ in range(6000))])
    assert replay(asked, 400, Eviction("lhd")).rate > replay(asked, 400, Eviction()).rate - 0.03


def test_what_is_asked_for_in_a_circle_is_kept_in_part() -> None:
    """On a loop larger than the tier, LRU has no hits and lhd has some, as it keeps a part."""
    asked = prompts([[n, n + 10_000] for _ in range(20) for n in range(400)])
    assert replay(asked, 400, Eviction()).rate == 0
    assert replay(asked, 400, Eviction("lhd")).rate > 0.3


def test_the_same_prompts_again_and_again_are_uses() -> None:
    """On a few documents asked for all the time, lhd is about as good as LRU."""
    random = Random(5)
    walks = [[n * 1000 + block for block in range(100)] for n in range(60)]
    asked = prompts([walks[int(random.paretovariate(0.7)) % 60] for _ in range(2500)])
    lru = replay(asked, 1000, Eviction()).rate
    assert replay(asked, 1000, Eviction("lhd")).rate > lru - 0.03


def hot_and_cold(random: Random, count: int) -> list[list[int]]:
    """Return prompts of which most continue one of a few, and the rest are asked for once."""
    walks = []
    for n in range(count):
        hot = random.randrange(80)
        shared = [hot * 100 + block for block in range(10)] if random.random() < 0.9 else []
        walks.append([*shared, *range(10**6 + n * 20, 10**6 + n * 20 + 11 - len(shared))])
    return walks


def soon_again(random: Random, count: int) -> list[list[int]]:
    """Return prompts that are continued a few times soon after they came, and never again."""
    recent: list[list[int]] = []
    walks = []
    for n in range(count):
        if not recent or random.random() > 0.66:
            recent = [*recent[-59:], list(range(10**8 + n * 20, 10**8 + n * 20 + 10))]
            walk = recent[-1]
        else:
            walk = random.choice(recent)
        walks.append([*walk, 2 * 10**8 + n])
    return walks


def test_a_workload_that_changed_is_learnt() -> None:
    """When hot prompts give way to recent ones, lhd unlearns the old workload in time."""
    random = Random(6)
    early, late = hot_and_cold(random, 30_000), soon_again(random, 5000)
    rates = []
    for eviction in (Eviction(), Eviction("lhd")):
        whole, before = (replay(prompts(walks), 1000, eviction) for walks in (early + late, early))
        hits = whole.hit_blocks - before.hit_blocks
        rates.append(hits / (whole.asked_blocks - before.asked_blocks))
    assert rates[1] > rates[0] - 0.04


def test_a_second_look_is_not_a_use() -> None:
    """A second match of a prompt teaches nothing: an index without it has equally many hits."""
    once, twice = (Residency({Tier.HOST: 300}, Eviction("lhd")) for _ in range(2))
    hits = [0, 0]
    for prompt in chats(1, loyal=0.9)[:1500]:
        twice.find(prompt.keys, use=True)
        hits[0] += ask(once, prompt)
        hits[1] += ask(twice, prompt)
    assert hits[0] == hits[1] > 0


def test_a_tier_of_any_size_learns_and_stays_whole() -> None:
    """Tiny tiers, which turn many epochs per prompt, have hits and can evict all blocks."""
    for capacity in (1, 2, 7, 40, 400):
        index = Residency({Tier.HOST: capacity}, Eviction("lhd"))
        ends = [ask(index, prompt) for prompt in chats(2, loyal=0.9)[:700]]
        index.validate()
        assert max(ends) > 0
        ready = index.counts(Tier.HOST).ready
        assert index.evict(Tier.HOST, capacity) == ready
        index.validate()


def test_old_blocks_stay_in_order_behind_the_horizon() -> None:
    """Blocks unused for hundreds of epochs stay in the eviction order, and can be evicted."""
    index = Residency({Tier.HOST: 64}, Eviction("lhd"))
    old, hot = prompts([[1, 2, 3], [5, 6]])
    ask(index, old)
    for _ in range(300):
        for prompt in (hot, *prompts([[n] for n in range(100, 170)])):
            ask(index, prompt)
        index.validate()
    assert ask(index, hot) == 2
    assert index.evict(Tier.HOST, 64) == 64
