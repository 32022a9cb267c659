"""The extension's hints: what is refused, what a run says, and what happens when there is no room.

`tests/property/test_hints.py` compares everything else with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from flexkv._ext import Hints

STORE, ONE, TWO, THREE = 0, 1, 2, 4095
ON_DISK = 4096
DOUBT_PERIOD = (1 << 18) - 1
RANDOM = np.random.default_rng(5)


def keys_of(count: int) -> bytes:
    """Return new random keys."""
    return RANDOM.bytes(16 * count)


def key(keys: bytes, position: int) -> bytes:
    """Return the key of a block of a prompt."""
    return keys[16 * (position + 1) : 16 * (position + 2)]


def ids(run: bytes) -> list[int]:
    """Return what a run says, as a list."""
    return np.frombuffer(run, np.int64).tolist()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Hints(0, 8), ValueError),
        (lambda: Hints((1 << 31) + 1, 8), ValueError),
        (lambda: Hints(8, 0), ValueError),
        (lambda: Hints(8, 1 << 31), ValueError),
        (lambda: Hints("8", 1), TypeError),
        (lambda: Hints(8), TypeError),
    ],
)
def test_sizes_that_are_refused(call: Callable[[], Hints], error: type[Exception]) -> None:
    """A table needs room for a pair, and spans need a block."""
    with pytest.raises(error):
        call()


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("note", (-1, 0, bytes(16)), ValueError),
        ("note", (4096, 0, bytes(16)), ValueError),
        ("note", (0, 2, bytes(16)), ValueError),
        ("note", (0, 0, bytes(15)), ValueError),
        ("note", (0, 0, bytes(24)), ValueError),
        ("note", (0, 0, bytes(16), 12), ValueError),
        ("note", (0, 0, bytes(16), 4), ValueError),
        ("note", (0, 0, None), TypeError),
        ("drop", (4096, bytes(16)), ValueError),
        ("drop", (0, bytes(12), 8), ValueError),
        ("doubt", (0, bytes(16), 0), ValueError),
        ("doubt", (0, bytes(16), 4096), ValueError),
        ("doubt", (0, bytes(8), 1), ValueError),
        ("known", (4096, bytes(16)), ValueError),
        ("known", (0, bytes(17)), ValueError),
        ("run", (b"", 0, 0), ValueError),
        ("run", (bytes(33), 0, 1), ValueError),
        ("run", (bytes(48), -1, 1), ValueError),
        ("run", (bytes(48), 2, 1), ValueError),
        ("run", (bytes(48), 0, 3), ValueError),
        ("run", (bytes(48), 0, 2, 4), ValueError),
        ("tick", (6,), ValueError),
        ("tick", (1 << 63,), ValueError),
        ("avoid", (4096, True), ValueError),
        ("retire", (4096,), ValueError),
        ("revive", (-1,), ValueError),
        ("revive", (0,), ValueError),
        ("begin_round", (4096,), ValueError),
        ("end_round", (0,), ValueError),
        ("scrub", (-1,), ValueError),
        ("pairs_of", (4096,), ValueError),
    ],
)
def test_what_is_refused_changes_nothing(name: str, arguments: Any, error: Any) -> None:
    """Holders, tiers, sizes, ranges and times out of bounds are refused by name."""
    hints = Hints(8, 1)
    hints.tick(7)
    hints.note(STORE, 0, bytes(16))
    with pytest.raises(error):
        getattr(hints, name)(*arguments)
    assert hints.counts()[:3] == (1, 0, 0)
    assert ids(hints.run(bytes(32), 0, 1)) == [STORE]


def test_a_run_has_whole_spans_only() -> None:
    """It begins within a span, ends at the first unknown one or is cut, and ends with the prompt.

    A span that the prompt does not have to its last block is unknown.
    """
    hints, prompt = Hints(100, 4), keys_of(1 + 18)
    for last in (3, 7, 11):
        assert hints.note(STORE, 0, key(prompt, last)) == 1
    assert [len(ids(hints.run(prompt, first, 18))) for first in (0, 3, 4, 11, 12, 18)] == [
        12, 9, 8, 1, 0, 0,
    ]  # fmt: skip
    assert [len(ids(hints.run(prompt, 5, last))) for last in (5, 6, 8, 11, 12, 13)] == [
        0, 1, 3, 6, 7, 7,
    ]  # fmt: skip
    hints.note(STORE, 0, key(prompt, 15))
    hints.note(STORE, 0, key(prompt, 17))  # of no span
    assert ids(hints.run(prompt, 1, 18)) == [STORE] * 15
    assert len(ids(hints.run(prompt[: 16 * 16], 1, 15))) == 11
    hints.drop(STORE, key(prompt, 3))
    assert ids(hints.run(prompt, 0, 18)) == []


def test_the_first_8_bytes_of_a_key_are_all_that_counts() -> None:
    """Pairs may be noted and dropped by the first 8 bytes of their keys."""
    hints, keys = Hints(100, 1), keys_of(40)
    tags = b"".join(keys[at : at + 8] for at in range(0, len(keys), 16))
    assert hints.note(ONE, 1, tags, 8) == 40
    assert hints.note(ONE, 1, keys, 16) == 0
    assert ids(hints.run(bytes(16) + keys, 0, 40)) == [ONE + ON_DISK] * 40
    assert hints.drop(ONE, tags[:80], size=8) == 10
    assert hints.known(ONE, keys) == bytes(10) + b"\1" * 30


def test_each_kind_of_holder_has_one_part_of_a_run() -> None:
    """Nodes come first where they have the first span; what would be a third part is cut off."""
    hints, keys = Hints(100, 1), keys_of(9)
    first, middle, last = keys[16:64], keys[64:112], keys[112:]
    hints.note(STORE, 0, middle)
    assert ids(hints.run(keys, 0, 8)) == []
    hints.note(ONE, 0, first)
    hints.note(ONE, 0, last)
    assert ids(hints.run(keys, 0, 8)) == [ONE] * 3 + [STORE] * 3
    assert ids(hints.run(keys, 3, 8)) == [STORE] * 3 + [ONE] * 2
    assert ids(hints.run(keys, 3, 8, 1)) == [STORE] * 3
    assert ids(hints.run(keys, 0, 8, 2)) == [ONE] * 3
    assert ids(hints.run(keys, 0, 8, 0)) == ids(hints.run(keys, 3, 8, 2)) == []
    hints.note(STORE, 0, first)
    assert ids(hints.run(keys, 0, 8)) == [ONE] * 3 + [STORE] * 3
    hints.note(TWO, 1, middle)
    assert ids(hints.run(keys, 0, 8)) == [ONE] * 3 + [TWO + ON_DISK] * 3 + [ONE] * 2


def test_nodes_change_as_seldom_as_they_can() -> None:
    """Of nodes that hold prefixes, the one that has most of a prompt is asked for all of that."""
    hints, keys = Hints(100, 1), keys_of(9)
    for node, spans in ((ONE, 2), (THREE, 8), (TWO, 5)):
        hints.note(node, 0, keys[16 : 16 * (1 + spans)])
    assert ids(hints.run(keys, 0, 8)) == [THREE] * 8
    hints.avoid(THREE, True)
    assert ids(hints.run(keys, 0, 8)) == [TWO] * 5
    hints.note(THREE, 0, keys[16:32])
    assert ids(hints.run(keys, 0, 1)) != [THREE]
    hints.avoid(THREE, False)
    assert ids(hints.run(keys, 0, 8)) == [THREE] * 8


def test_few_nodes_of_a_hot_span_are_remembered() -> None:
    """Four nodes of a span are known at a time, the last one noted among them, and the store."""
    hints, keys = Hints(1000, 1), keys_of(2)
    hints.note(STORE, 0, keys[16:])
    for node in range(1, 31):
        assert hints.note(node, 0, keys[16:]) == 1
        known = [other for other in range(1, 31) if hints.known(other, keys[16:]) == b"\1"]
        assert len(known) == min(node, 4)
        assert node in known
    assert hints.counts()[:3] == (5, 0, 26)
    assert hints.known(STORE, keys[16:]) == b"\1"
    hints.retire(known[0])
    hints.note(40, 0, keys[16:])
    assert hints.counts()[:3] == (5, 0, 26)
    assert hints.known(STORE, bytes(8) + keys[24:]) == b"\0"


def test_a_key_may_begin_with_zeros() -> None:
    """No key is taken for an empty place."""
    hints = Hints(100, 1)
    assert hints.known(STORE, bytes(16)) == b"\0"
    assert ids(hints.run(bytes(32), 0, 1)) == []
    assert hints.note(STORE, 0, bytes(16)) == 1
    assert ids(hints.run(bytes(32), 0, 1)) == [STORE]
    assert hints.drop(STORE, bytes(16)) == 1
    assert len(hints) == 0


def test_a_revived_holder_is_not_down() -> None:
    """A number that is used again has nothing of the earlier holder."""
    hints, keys = Hints(100, 1), keys_of(2)
    hints.note(ONE, 0, keys[16:])
    hints.avoid(ONE, True)
    hints.begin_round(ONE)
    hints.retire(ONE)
    with pytest.raises(ValueError, match="holder=1: scrub its pairs first"):
        hints.revive(ONE)
    assert hints.scrub(1 << 20) == 0
    hints.revive(ONE)
    hints.begin_round(ONE)
    assert hints.note(ONE, 0, keys[16:]) == 1
    assert ids(hints.run(keys, 0, 1)) == [ONE]


@pytest.mark.parametrize("looked", [False, True])
def test_a_doubt_comes_back_only_if_nobody_looked(looked: bool) -> None:
    """Ticks are remembered modulo 2**18 - 1; the first run after a doubt forgets it for good."""
    hints, keys = Hints(100, 1), keys_of(2)
    hints.note(STORE, 0, keys[16:])
    hints.tick(DOUBT_PERIOD - 2)
    assert hints.doubt(STORE, keys[16:], 5) == 1
    hints.tick(DOUBT_PERIOD + 2)
    assert ids(hints.run(keys, 0, 1)) == []
    hints.tick(DOUBT_PERIOD + 3)
    if looked:
        assert ids(hints.run(keys, 0, 1)) == [STORE]
    hints.tick(2 * DOUBT_PERIOD + 2)
    assert ids(hints.run(keys, 0, 1)) == ([STORE] if looked else [])
    hints.tick(2 * DOUBT_PERIOD + 3)
    assert ids(hints.run(keys, 0, 1)) == [STORE]


def test_room_is_used_before_pairs_are_lost() -> None:
    """A table that is full as planned has lost hardly any pair; one overfilled keeps its room."""
    hints, keys = Hints(50_000, 1), keys_of(50_000)
    assert hints.note(STORE, 0, keys) == 50_000
    pairs, dead, lost, memory_bytes = hints.counts()
    assert (pairs + lost, dead) == (50_000, 0)
    assert lost <= 5
    assert memory_bytes <= 9.6 * 50_000
    assert sum(hints.known(STORE, keys)) == len(hints) == pairs
    more = keys_of(20_000)
    hints.note(ONE, 1, more)
    pairs, dead, lost, memory_bytes = hints.counts()
    assert pairs + lost == 70_000
    assert 0.99 * memory_bytes / 8 <= pairs <= memory_bytes / 8
    left = sum(hints.known(STORE, keys)), sum(hints.known(ONE, more))
    assert left == (hints.pairs_of(STORE)[0], hints.pairs_of(ONE)[0])
    assert sum(left) == len(hints) == pairs


def test_nothing_is_named_for_keys_that_were_never_noted() -> None:
    """A full table knows none of 200,000 other keys: 32 bits of each are compared, and its line."""
    hints = Hints(50_000, 1)
    hints.note(STORE, 0, keys_of(50_000))
    assert sum(hints.known(STORE, keys_of(200_000))) == 0


def test_a_scrub_goes_on_where_the_last_one_stopped() -> None:
    """Each step looks at some lines; after all lines nothing that was dead is left."""
    hints, keys = Hints(5_000, 1), keys_of(4_000)
    hints.note(ONE, 0, keys[: 16 * 1_000])
    hints.note(TWO, 0, keys[16 * 1_000 :])
    hints.retire(ONE)
    hints.begin_round(TWO)
    hints.note(TWO, 0, keys[16 * 3_000 :])
    hints.end_round(TWO)
    lines, left = hints.counts()[3] // 64, [3_000]
    for _ in range(10):
        left.append(hints.scrub(-(-lines // 10)))
        assert hints.counts()[:2] == (1_000 + left[-1], left[-1])
    assert left[-1] == 0
    assert all(before - after > 200 for before, after in pairwise(left))
    assert hints.known(TWO, keys) == bytes(3_000) + b"\1" * 1_000


def test_a_cleared_table_is_like_a_new_one() -> None:
    """A clear removes all pairs, and all of them can be noted again."""
    hints, keys = Hints(5_000, 1), keys_of(5_000)
    for _ in range(2):
        assert hints.note(ONE, 0, keys) == 5_000
        hints.clear()
        assert hints.counts()[:2] == (0, 0)
        assert (len(hints), hints.pairs_of(ONE)) == (0, (0, 0, 0))
        assert hints.known(ONE, keys) == bytes(5_000)
