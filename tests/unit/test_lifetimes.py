"""Lifetimes: what is learnt from when blocks are asked for again, and what it is good for."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from flexkv import _ext
from flexkv.common.errors import InvariantError
from flexkv.common.terms import Tier
from flexkv.index.eviction import Eviction
from flexkv.index.lifetimes import AGE_BINS, CLASSES, EDGES_S, Observed, lifetimes, observed
from flexkv.index.residency import WORTHY, Positions, Residency
from flexkv.trace.hits import prompts_of, replay
from flexkv.trace.mooncake import TraceLine


def seen(hits_at: dict[int, int], touched: dict[int, float]) -> Observed:
    """Give counts: class -> bin in which all its hits came; class -> blocks touched in all."""
    hits, ended = np.zeros((CLASSES, AGE_BINS)), np.zeros((CLASSES, 2, AGE_BINS))
    living, uses = np.zeros((CLASSES, 2, AGE_BINS)), np.zeros(CLASSES)
    for number, blocks in touched.items():
        at = hits_at.get(number)
        back = blocks / 2 if at is not None else 0.0
        uses[number] = blocks
        living[number, :, -1] = blocks - back, (blocks - back) * EDGES_S[-1]
        if at is not None:
            hits[number, at] = back
            ended[number, :, at] = back, back * (EDGES_S[at] + EDGES_S[at + 1]) / 2
    return Observed(uses, hits, ended, living)


def test_a_class_that_comes_back_outlives_one_that_does_not() -> None:
    """With room for few, only the class that returns gets a lifetime: until it has returned."""
    found = lifetimes(seen({4: 10}, {0: 1e5, 4: 1e5}), capacity_blocks=3000, span_s=1000)
    assert found[4] > EDGES_S[10]
    assert found[0] < 1


def test_with_room_for_all_everything_is_kept() -> None:
    """The price of a place falls to nothing."""
    found = lifetimes(seen({0: 6, 4: 10}, {0: 1e3, 4: 1e3}), capacity_blocks=10**7, span_s=1000)
    assert min(found[0], found[4]) > EDGES_S[9]


def test_nothing_seen_is_no_error() -> None:
    """A new table gives some lifetimes, none of them negative or not a number."""
    found = lifetimes(seen({}, {}), 100, 0.0)
    assert len(found) == CLASSES
    assert all(0 <= lifetime < float("inf") for lifetime in found)


def test_the_table_counts_uses_and_ages() -> None:
    """A block stored at 0 s and asked for at 5 s is one hit in the bin of 5 s."""
    index = Residency({Tier.HOST: 8}, Eviction("lifetime"))
    keys = bytes(16) + _ext.hash128(b"block")
    index.tick(0)
    index.find(keys, use=True)
    index.commit(Tier.HOST, index.reserve(Tier.HOST, keys, Positions(0, 1), WORTHY))
    index.tick(5)
    assert index.find(keys, use=True).last == 1
    counts = observed(index._table.observed())
    (where,) = np.argwhere(counts.hits).tolist()
    assert EDGES_S[where[1]] <= 5 < EDGES_S[where[1] + 1]
    assert counts.uses.sum() == 2
    assert counts.ended[:, 1].sum() == 5
    assert counts.living[:, 0].sum() == 1
    index.validate()


def test_only_a_learning_table_can_tell_what_it_saw() -> None:
    """Under another policy nothing is remembered."""
    with pytest.raises(InvariantError):
        Residency({Tier.HOST: 8})._table.observed()
    with pytest.raises(ValueError, match="list of"):
        Residency({Tier.HOST: 8}, Eviction("lifetime"))._table.set_lifetimes(0, [1.0])


def chats(seed: int, loyal: float) -> list[TraceLine]:
    """Give conversations: most have one turn, those that have a second have many more."""
    random = Random(seed)
    live: list[tuple[float, list[int], int]] = []
    lines, fresh = [], 1000
    for second in range(3000):
        now = float(second)
        due = [chat for chat in live if chat[0] <= now]
        live = [chat for chat in live if chat[0] > now]
        fresh += 40
        due.append((now, [1, *range(fresh, fresh + 8)], 0))
        for _, walk, turn in due:
            lines.append(TraceLine(now * 1000, 1, 1, walk))
            if random.random() < (loyal if turn else 0.15):
                fresh += 40
                again = now + random.uniform(20, 60)
                live.append((again, [*walk, *range(fresh, fresh + 2)], turn + 1))
    return lines


@pytest.mark.parametrize("seed", range(3))
def test_lifetimes_beat_recency_where_history_tells(seed: int) -> None:
    """Loyal conversations are kept over one-shot prompts, in a tier far too small for all."""
    prompts = prompts_of(chats(seed, loyal=0.9))
    lru = replay(prompts, 600, Eviction("lru")).rate
    assert replay(prompts, 600, Eviction("lifetime")).rate > 1.1 * lru


@pytest.mark.parametrize("seed", range(3))
def test_lifetimes_are_no_worse_where_nothing_tells(seed: int) -> None:
    """Uniformly random prompts: no class is better than another, and little is lost."""
    random = Random(seed)
    walks = [[n, n + 10_000] for n in range(400)]
    prompts = prompts_of(
        TraceLine(1000.0 * second, 1, 1, random.choice(walks)) for second in range(6000)
    )
    lru = replay(prompts, 400, Eviction("lru")).rate
    assert replay(prompts, 400, Eviction("lifetime")).rate > lru - 0.03
