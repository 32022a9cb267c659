"""Hints against a model of dicts, with keys that compete for the same few places."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexkv._ext import Hints

HOLDERS = (0, 1, 2, 3, 70, 4000, 4095)
COPIES_MAX, PLACES = 4, 16
OTHER = 1 << 26
"""Tags that differ by less have the same two lines, if their keys have one line in common."""

NAMES = [
    *(("low", tag) for tag in range(1, 13)),
    *(("low", OTHER * offset + 9) for offset in (2, 3, 4)),
    ("high", 1),
    ("high", 7),
]
"""Where a key has its first line, and its tag: most compete for the 16 places of one home."""


def key_of(name: tuple[str, int], rest: int = 0) -> bytes:
    """Return a key of a name; its last 8 bytes do not matter."""
    where, tag = name
    word = tag | (0 if where == "low" else 0xFFFFFFFF) << 32
    return word.to_bytes(8, "little") + rest.to_bytes(8, "little")


class Pair(NamedTuple):
    """What the model knows of a pair."""

    tier: int
    round: int
    doubted_until: int = 0


class HintsMachine(RuleBasedStateMachine):
    """The table must agree with the model in all but dead pairs, and in what it says is lost."""

    @initialize(blocks=st.integers(1, 3))
    def open(self, blocks: int) -> None:
        """Start with an empty table."""
        self.hints, self.blocks, self.now = Hints(1, blocks), blocks, 0
        self.pairs: dict[tuple[tuple[str, int], int], Pair] = {}
        self.retired: set[int] = set()
        self.down: set[int] = set()
        self.round = dict.fromkeys(HOLDERS, 0)
        self.in_round: set[int] = set()
        self.lost = 0

    def is_dead(self, name: tuple[str, int], holder: int) -> bool:
        """Return whether a pair of the model is retired, or was not noted in an ended round."""
        unseen = self.pairs[name, holder].round != self.round[holder]
        return holder in self.retired or (unseen and holder not in self.in_round)

    def live(self) -> set[tuple[tuple[str, int], int]]:
        """Return the pairs of the model that are not dead."""
        return {pair for pair in self.pairs if not self.is_dead(*pair)}

    def forget(self, gone: Callable[[tuple[str, int], int], bool]) -> None:
        """Remove the pairs that are scrubbed, as a count of the table has shown."""
        for pair in [pair for pair in self.pairs if gone(*pair)]:
            del self.pairs[pair]

    def usable(self, name: tuple[str, int], store: bool) -> dict[int, int]:
        """Return the holders of a span that a run may name, and their tiers."""
        return {
            holder: self.pairs[name, holder].tier
            for other, holder in self.live()
            if other == name and (holder == 0) == store and holder not in self.down
            and self.pairs[name, holder].doubted_until <= self.now
        }  # fmt: skip

    @rule(
        name=st.sampled_from(NAMES),
        holder=st.sampled_from(HOLDERS),
        tier=st.integers(0, 1),
        rest=st.integers(0, 3),
    )
    def note(self, name: tuple[str, int], holder: int, tier: int, rest: int) -> None:
        """Note a pair; what it displaces is one pair, and of the same span if that has many."""
        before = self.live()
        added = self.hints.note(holder, tier, key_of(name, rest))
        if holder in self.retired:
            assert added == 0
            return
        assert added == ((name, holder) not in before)
        self.pairs[name, holder] = Pair(tier, self.round[holder])
        gone = {
            (other, node)
            for other, node in self.live()
            if self.hints.known(node, key_of(other)) == b"\0"
        }
        assert (name, holder) not in gone
        assert len(gone) == self.hints.counts()[2] - self.lost <= added
        copies = {pair for pair in before if pair[0] == name and pair[1]}
        if added and holder and len(copies) == COPIES_MAX:
            assert len(gone) == 1
            assert gone < copies
        elif gone:
            assert len(before) >= PLACES
        self.lost += len(gone)
        for pair in gone:
            del self.pairs[pair]

    @rule(holder=st.sampled_from(HOLDERS), names=st.lists(st.sampled_from(NAMES), max_size=5))
    def drop(self, holder: int, names: list[tuple[str, int]]) -> None:
        """Drop pairs of a holder."""
        dropped = len({(name, holder) for name in names} & self.live())
        assert self.hints.drop(holder, b"".join(map(key_of, names))) == dropped
        for name in names:
            self.pairs.pop((name, holder), None)

    @rule(
        holder=st.sampled_from(HOLDERS),
        names=st.lists(st.sampled_from(NAMES), max_size=5, unique=True),
        ticks=st.integers(1, 4095),
    )
    def doubt(self, holder: int, names: list[tuple[str, int]], ticks: int) -> None:
        """Doubt pairs of a holder."""
        doubted = {(name, holder) for name in names} & self.live()
        assert self.hints.doubt(holder, b"".join(map(key_of, names)), ticks) == len(doubted)
        for pair in doubted:
            self.pairs[pair] = self.pairs[pair]._replace(doubted_until=self.now + ticks)

    @rule(ticks=st.integers(0, 3000))
    def wait(self, ticks: int) -> None:
        """Let time pass."""
        self.now += ticks
        self.hints.tick(self.now)

    @rule(holder=st.sampled_from(HOLDERS), is_down=st.booleans())
    def avoid(self, holder: int, is_down: bool) -> None:
        """Take a holder down, or up again."""
        self.hints.avoid(holder, is_down)
        (self.down.add if is_down else self.down.discard)(holder)

    @rule(holder=st.sampled_from(HOLDERS))
    def retire(self, holder: int) -> None:
        """Retire a holder."""
        self.hints.retire(holder)
        self.retired.add(holder)

    @rule(holder=st.sampled_from(HOLDERS))
    def revive(self, holder: int) -> None:
        """Use the number of a retired holder again, unless it has pairs."""
        retired = holder in self.retired
        if not retired or self.hints.pairs_of(holder)[0]:
            with pytest.raises(ValueError, match="scrub" if retired else "not retired"):
                self.hints.revive(holder)
            return
        self.hints.revive(holder)
        self.forget(lambda _, of: of == holder)
        self.retired.discard(holder)
        self.down.discard(holder)
        self.in_round.discard(holder)

    @rule(holder=st.sampled_from(HOLDERS))
    def begin_round(self, holder: int) -> None:
        """Begin a round, if no other is under way or has left anything."""
        if holder in self.in_round or self.hints.pairs_of(holder)[1]:
            with pytest.raises(ValueError, match="end its round" if holder in self.in_round
                               else "scrub what"):  # fmt: skip
                self.hints.begin_round(holder)
            return
        self.hints.begin_round(holder)
        self.forget(lambda name, of: of == holder and self.pairs[name, of].round != self.round[of])
        self.in_round.add(holder)
        self.round[holder] += 1

    @rule(holder=st.sampled_from(HOLDERS))
    def end_round(self, holder: int) -> None:
        """End a round, if one is under way."""
        if holder not in self.in_round:
            with pytest.raises(ValueError, match="in no round"):
                self.hints.end_round(holder)
            return
        self.hints.end_round(holder)
        self.in_round.discard(holder)

    @rule(lines=st.integers(0, 70))
    def scrub(self, lines: int) -> None:
        """Remove dead pairs, of all lines if they are so many."""
        left = self.hints.scrub(lines)
        assert left == self.hints.counts()[1]
        if lines >= 64:
            assert left == 0
            self.pairs = {pair: self.pairs[pair] for pair in self.live()}

    @rule()
    def clear(self) -> None:
        """Remove all pairs."""
        self.hints.clear()
        self.pairs.clear()

    @rule(
        names=st.lists(st.sampled_from(NAMES), max_size=8),
        first=st.integers(0, 24),
        count=st.integers(0, 24),
        rest=st.integers(0, 2),
        use=st.integers(0, 3),
    )
    def run(
        self, names: list[tuple[str, int]], first: int, count: int, rest: int, use: int
    ) -> None:
        """Ask who has the blocks of a prompt of these spans, and of `rest` more blocks."""
        filler, step = bytes(16), self.blocks
        spans = [filler * (step - 1) + key_of(name) for name in names]
        keys = filler + b"".join(spans) + filler * min(rest, step - 1)
        blocks = len(keys) // 16 - 1
        first, last = min(first, blocks), min(first + count, blocks)
        said = np.frombuffer(self.hints.run(keys, first, last, use), np.int64).tolist()
        begin = first // step
        expected = self.expected(names[begin : -(-last // step)], use) if first < last else []
        assert len(said) == max(0, min((begin + len(expected)) * step, last) - first)
        for at, one in enumerate(said, first):
            assert one == said[max(at // step * step, first) - first], "one holder for a span"
            assert expected[at // step - begin][one % 4096] == one // 4096
        for at, (one, after) in enumerate(pairwise(said), first):
            if one % 4096 and after % 4096 and one % 4096 != after % 4096:
                assert after % 4096 not in expected[at // step - begin]

    def expected(self, names: list[tuple[str, int]], use: int) -> list[dict[int, int]]:
        """Return for each span of the run who may be named for it."""
        run: list[dict[int, int]] = []
        kinds = [(bit, bit == 1) for bit in (2, 1) if use & bit]
        if names and len(kinds) == 2 and not self.usable(names[0], False):
            kinds.reverse()
        for _, store in kinds:
            while len(run) < len(names) and (found := self.usable(names[len(run)], store)):
                run.append(found)
            if not run:
                return run
        return run

    @invariant()
    def agrees(self) -> None:
        """Every pair that is not dead is known, no other is, and the counts say so."""
        if not hasattr(self, "hints"):
            return
        live = self.live()
        for holder in HOLDERS:
            known = self.hints.known(holder, b"".join(map(key_of, NAMES)))
            assert known == bytes((name, holder) in live for name in NAMES)
            mine = [pair for pair in self.pairs if pair[1] == holder]
            pairs, unseen, dead = self.hints.pairs_of(holder)
            assert sum(pair[1] == holder for pair in live) == pairs - dead
            assert pairs <= len(mine)
            if holder in self.in_round and holder not in self.retired:
                old = [pair for pair in mine if self.pairs[pair].round != self.round[holder]]
                assert unseen == len(old)
        pairs, dead, lost, _ = self.hints.counts()
        assert (pairs - dead, lost, len(self.hints)) == (len(live), self.lost, len(live))
        assert pairs == sum(self.hints.pairs_of(holder)[0] for holder in HOLDERS)


TestHints = HintsMachine.TestCase
TestHints.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
