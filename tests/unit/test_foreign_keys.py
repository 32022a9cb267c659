"""Keys that another process made up are checked before they can break the index."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flexkv.common.errors import InvariantError
from flexkv.common.terms import Tier
from flexkv.index.residency import PREFIX, Residency

BLOCKS = 8


def key(number: int) -> bytes:
    """Return the key of a number."""
    return bytes([number]) * 16


def chain(*numbers: int) -> bytes:
    """Return the keys of a root and its blocks."""
    return b"".join(key(number) for number in numbers)


def stored(residency: Residency, keys: bytes) -> None:
    """Store the blocks that are absent, as a put would."""
    blocks = len(keys) // 16 - 1
    groups = residency.survey(keys, 0, blocks)
    for states, positions, _ in groups:
        if not states[0]:
            ids = residency.reserve(Tier.HOST, keys, positions, PREFIX)
            residency.commit(Tier.HOST, ids)


@pytest.mark.parametrize(
    ("keys", "agreeing"),
    [
        (chain(0, 1, 2, 3), 3),
        (chain(0, 1, 2, 9, 8), 4),
        (chain(0, 2), 1),  # at another position, block 2 is another entry
        (chain(0, 1, 9, 3), 2),
        (chain(7, 1), 0),
        (chain(0, 1, 2, 1), 2),
        (chain(0, 5, 5), 1),
        (chain(0, 5, 0), 1),
        (chain(8, 8), 0),
        (chain(0), 0),
    ],
)
def test_a_block_that_is_known_has_one_parent(keys: bytes, agreeing: int) -> None:
    """Keys agree with the index up to a known block with another parent, or a repeated block."""
    residency = Residency({Tier.HOST: BLOCKS})
    stored(residency, chain(0, 1, 2, 3))
    assert residency.agreeing(keys) == agreeing


@pytest.mark.parametrize("seed", range(20))
def test_chains_that_agree_keep_every_law(seed: int) -> None:
    """Random chains of few keys that agree keep every law of an index that evicts all the time."""
    chance, residency = random.Random(seed), Residency({Tier.HOST: BLOCKS, Tier.DISK: BLOCKS})
    taken = 0
    for _ in range(300):
        keys = chain(*chance.sample(range(12), chance.randrange(2, 8)))
        if residency.agreeing(keys) == len(keys) // 16 - 1:
            stored(residency, keys)
            taken += 1
        residency.validate()
    assert taken > 50


def test_chains_that_were_not_checked_break_the_index() -> None:
    """The same chains break the index without the check."""
    broken = 0
    for seed in range(20):
        chance, residency = random.Random(seed), Residency({Tier.HOST: BLOCKS})
        try:
            for _ in range(300):
                stored(residency, chain(*chance.sample(range(12), chance.randrange(2, 8))))
                residency.validate()
        except InvariantError:
            broken += 1
    assert broken


def test_keys_of_any_length_are_taken() -> None:
    """Keys of any number are checked; bytes that are not whole keys are refused."""
    residency = Residency({Tier.HOST: BLOCKS})
    assert residency.agreeing(np.random.default_rng(0).bytes(16 * 10_001)) == 10_000
    for keys in (b"", b"x" * 17):
        with pytest.raises(ValueError, match="keys has"):
            residency.agreeing(keys)
