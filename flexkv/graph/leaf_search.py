"""Chooses the leaves for which a store is asked that cannot be listed.

    the chain        ────────────────────────────────────┤ is there
    round 1          · · · · · · · · · · ? ? ? ? ? ? ? ? ?       ? asked for  ■ there  □ missing
    round 2          · · ? ? ? ? ? ? ? ? ■ ■ □ ■ ■ ■ □ □ □
                                                 ▲ the longest prefix that may be whole

Prefixes are tried from the longest one down. A round asks for what the longest prefix needs that
may still be whole, and for leaves of shorter prefixes: for a few at first, and for twice as many in
each later round. So one round is enough if the longest prefix is whole, a load knows shorter ones
if a leaf turns out to be gone, and states that lie far apart are found in a few rounds. A leaf of a
long window is asked for once, not once for each prefix that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey
from flexkv.graph.ends import Needed, needed_by
from flexkv.index.catalogue import Sought
from flexkv.index.keys import leaf_keys_at

SHORTER = 64
"""How many leaves of shorter prefixes the first round asks for."""
ROUNDS_MAX = 8
"""The most rounds; what is unknown then stays so."""
ENDS_MAX = 4096
"""How many prefixes are tried at most, the longest ones."""

_THERE, _MISSING, _UNKNOWN = 0, 1, 2


class _Leaves(NamedTuple):
    """The leaves of one group, from the first to the last one that any of the prefixes needs.

    Attributes:
        rule: the group's.
        needed: what each prefix needs.
        begin: the number of the first leaf among the group's own blocks.
        state: int8[n], whether each is there.
    """

    rule: GroupRule
    needed: Needed
    begin: int
    state: NDArray[np.int8]


class _Unknown(NamedTuple):
    """Leaves that are to be asked for: those of the longest prefixes first.

    All are int64[n].

    Attributes:
        groups: the place of each one's group in the list of groups.
        own: its number among the group's own blocks.
        users: the longest prefix that needs it, as the index of one that may be whole.
    """

    groups: NDArray[np.int64]
    own: NDArray[np.int64]
    users: NDArray[np.int64]

    def of(self, which: NDArray[np.int64] | slice) -> _Unknown:
        """Return some of them."""
        return _Unknown(*(each[which] for each in self))


class LeafSearch:
    """A search for the leaves of a prompt's longest prefix that is whole."""

    def __init__(
        self,
        rules: Sequence[GroupRule],
        sought: Sought,
        known: Callable[[bytes], NDArray[np.bool_]],
    ) -> None:
        """Begin a search.

        Args:
            rules: of the groups whose blocks are leaves.
            sought: the prefixes; the chain of all of them is there.
            known: returns which leaves are known to be there, of a buffer with their keys.
        """
        self._keys, self._round = sought.keys, 0
        self._asked: dict[BlockKey, tuple[int, int]] = {}
        step = lcm(*(rule.ratio for rule in rules))
        begin = sought.first // step * step + step
        last = min(sought.last, sought.chain - sought.drop)
        self._ends = np.arange(begin, last + 1, step)[-ENDS_MAX:]
        self._groups = [self._leaves(rule, known) for rule in rules] if len(self._ends) else []
        self._may_be_whole = self._open_ends()

    def _leaves(self, rule: GroupRule, known: Callable[[bytes], NDArray[np.bool_]]) -> _Leaves:
        needed = needed_by(rule, self._ends)
        begin, end = int(needed.first.min()), int(needed.last.max())
        positions = np.arange(begin + 1, end + 1) * rule.ratio - 1
        is_known = known(leaf_keys_at(self._keys, rule.group, positions))
        state = np.where(is_known, _THERE, _UNKNOWN).astype(np.int8)
        return _Leaves(rule, needed, begin, state)

    @property
    def is_over(self) -> bool:
        """Return whether there is nothing more to ask for."""
        return not len(self._may_be_whole)

    def wanted(self, room: int) -> list[BlockKey]:
        """Return the keys of the leaves to ask for next, at most `room`; none once it is over."""
        self._asked = {}
        if self.is_over:
            return []
        unknown = self._unknown()
        needed = int(np.count_nonzero(unknown.users == len(self._may_be_whole) - 1))
        few = min(SHORTER << self._round, room // 2, len(unknown.own) - needed)
        asked = min(needed, room - few)
        chosen = unknown.of(np.r_[:asked, needed : needed + few])
        for number, each in enumerate(self._groups):
            own = chosen.own[chosen.groups == number]
            positions = (own + 1) * each.rule.ratio - 1
            keys, size = leaf_keys_at(self._keys, each.rule.group, positions), BLOCK_KEY_BYTES
            for place, leaf in enumerate((own - each.begin).tolist()):
                self._asked[keys[place * size : (place + 1) * size]] = number, leaf
        return list(self._asked)

    def heard(self, there: Set[BlockKey]) -> None:
        """Take the answer: which leaves are there of those that `wanted` has returned."""
        for key, (number, leaf) in self._asked.items():
            self._groups[number].state[leaf] = _THERE if key in there else _MISSING
        self._round += 1
        self._may_be_whole = self._open_ends()

    def _open_ends(self) -> NDArray[np.int64]:
        """Return the indices of the prefixes that may be whole; none if the search is over.

        It is over once the longest of them is whole, or after some rounds.
        """
        nothing = np.zeros(0, np.int64)
        may_be_whole = np.flatnonzero(self._have_all(_THERE, _UNKNOWN))
        if self._round == ROUNDS_MAX or not len(may_be_whole):
            return nothing
        return nothing if self._have_all(_THERE)[may_be_whole[-1]] else may_be_whole

    def _have_all(self, *states: int) -> NDArray[np.bool_]:
        """Return for each prefix whether all its leaves are in these states: bool[prefixes]."""
        have_all = np.ones(len(self._ends), np.bool_)
        for each in self._groups:
            have_all &= each.needed.are_in(np.isin(each.state, states), each.begin)
        return have_all

    def _unknown(self) -> _Unknown:
        """Return the unknown leaves that prefixes need which may be whole."""
        parts, ends = [], self._may_be_whole
        for number, (_, needed, begin, state) in enumerate(self._groups):
            first, last = needed.first[ends], needed.last[ends]
            own = np.flatnonzero(state == _UNKNOWN) + begin
            # No longer prefix needs an earlier leaf: `first` ascends, and so does `last`.
            users = np.searchsorted(first, own, "right") - 1
            is_needed = (users >= 0) & (own < last[users])
            parts.append((np.full(len(own), number)[is_needed], own[is_needed], users[is_needed]))
        unknown = _Unknown(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        ratios = np.array([each.rule.ratio for each in self._groups])
        positions = (unknown.own + 1) * ratios[unknown.groups]
        return unknown.of(np.lexsort((-positions, -unknown.users)))
