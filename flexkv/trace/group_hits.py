"""Hit rates of a model with several KV groups on a request trace, by what is stored of each group.

Every block of the prefix chain is stored. Of the other groups, whose blocks are leaves, a store
rule says at which boundaries a prefix can end: what such prefixes need is stored, and nothing else.

    every block    at every block
    ends           at the last whole block of each prompt, behind which its next turn goes on
    junctions      at those, and where a prompt leaves what it shares with an earlier one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError
from flexkv.common.space import GROUPS_MAX, GroupRule, Kind
from flexkv.common.terms import Positions, Tier
from flexkv.index.claims import Holding
from flexkv.index.eviction import Eviction
from flexkv.index.found import Found
from flexkv.index.residency import ABSENT, WORTHY, Residency
from flexkv.trace.hits import Prompt
from flexkv.trace.mooncake import TOKENS_PER_HASH_ID

STORE_RULES = ("every block", "ends", "junctions")

_GROUP = re.compile(r"(?P<kind>[a-z]+)(:(?P<tokens>\d+))?(\*(?P<count>\d+))?")
_KINDS = {kind.label: kind for kind in Kind}
_LEAVES_MAX = GROUPS_MAX - 1


class GroupHits(NamedTuple):
    """What a store rule gives on a trace, in blocks of any group."""

    hit_blocks: int
    """Blocks of prompts that were hits; each is counted once, whatever its groups hold."""
    asked_blocks: int
    stored_blocks: int
    """Blocks of all groups that were written to the cache."""

    @property
    def rate(self) -> float:
        """Return the share of the requested blocks that were hits."""
        return self.hit_blocks / self.asked_blocks if self.asked_blocks else 0.0


def groups_of(text: str) -> tuple[GroupRule, ...]:
    """Return the groups that a text names, such as "window:1024*5,state".

    Each is KIND[:TOKENS][*COUNT]; windows and chunks need their size in tokens.

    Raises:
        ConfigError: the text is not like that.
    """
    rules: list[GroupRule] = []
    for part in text.split(","):
        named = _GROUP.fullmatch(part.strip())
        if named is None or named["kind"] not in _KINDS:
            why = f"each must be KIND[:TOKENS][*COUNT], and the kind one of {', '.join(_KINDS)}"
            raise ConfigError("groups", part, why)
        kind = _KINDS[named["kind"]]
        tokens, count = int(named["tokens"] or 0), int(named["count"] or 1)
        if (kind in (Kind.WINDOW, Kind.CHUNK)) != (tokens > 0):
            needs = "needs its size in tokens" if not tokens else "has no size"
            raise ConfigError("groups", part, f"a group of kind {kind.label} {needs}")
        if not 1 <= count <= _LEAVES_MAX - len(rules):
            raise ConfigError("groups", text, f"must be at most {_LEAVES_MAX} groups")
        for _ in range(count):
            number, size = len(rules) + 1, TOKENS_PER_HASH_ID
            rules.append(GroupRule(number, kind, tokens, 1, size))
    return tuple(rules)


def replay_groups(
    prompts: Iterable[Prompt],
    capacity_blocks: int,
    eviction: Eviction,
    rules: Sequence[GroupRule],
    store_rule: str,
) -> GroupHits:
    """Return what a tier of `capacity_blocks` blocks of any group hits and stores.

    Args:
        prompts: the requests of a trace.
        capacity_blocks: how many blocks, which all have the same size, the tier holds.
        eviction: its policy.
        rules: the KV groups beside the prefix chain.
        store_rule: one of STORE_RULES.
    """
    index = Residency({Tier.HOST: capacity_blocks}, eviction, rules=rules)
    hit = asked = stored = now_s = 0
    for prompt in prompts:
        now_s = max(now_s, prompt.at_s)
        index.tick(now_s)
        found = index.find(prompt.keys, use=True)
        hit += found.last
        asked += len(prompt.ids)
        stored += _store(index, prompt, found, rules, store_rule)
    return GroupHits(hit, asked, stored)


def _store(
    index: Residency, prompt: Prompt, found: Found, rules: Sequence[GroupRule], store_rule: str
) -> int:
    """Store a prompt's chain, and its leaves by a store rule; return how many blocks."""
    blocks, stored = len(prompt.ids), 0
    told = index.survey(prompt.keys, 0, blocks, use=False)
    # The chain may be there further than the prefix that was found, and must not go meanwhile.
    chain = [Holding(Tier.HOST, ids[0]) for _, _, ids in told if ids[0] is not None]
    for states, positions, _ in told:
        if states[0] == ABSENT:
            with index.holding(chain):
                chain.append(_stored(index, prompt, positions, 0))
            stored += len(chain[-1].block_ids)
    with index.holding(chain):
        for rule in rules:
            wanted = _wanted(rule, store_rule, found, prompt)
            for states, positions, _ in index.survey(prompt.keys, 0, blocks, False, rule.group):
                places = np.fromiter(positions, np.int64, positions.block_count)
                places = places[wanted[places]]
                if states[0] == ABSENT and len(places):
                    lacking = Positions(int(places[0]), len(places), places)
                    stored += len(_stored(index, prompt, lacking, rule.group).block_ids)
    return stored


def _wanted(rule: GroupRule, store_rule: str, found: Found, prompt: Prompt) -> NDArray[np.bool_]:
    """Return bool[blocks]: the positions whose leaves are stored."""
    blocks, whole = len(prompt.ids), prompt.whole_blocks
    if store_rule == "every block":
        return np.ones(blocks, np.bool_)
    wanted = np.zeros(blocks, np.bool_)
    is_junction = store_rule == "junctions" and found.chain > found.last
    for end in (found.chain, whole) if is_junction else (whole,):
        first, last = rule.needed(0, end)
        wanted[first:last] = True
    return wanted


def _stored(index: Residency, prompt: Prompt, positions: Positions, group: int) -> Holding:
    """Store blocks as far as they fit, and return where they are."""
    ids = index.reserve(Tier.HOST, prompt.keys, positions, WORTHY, group)
    index.commit(Tier.HOST, ids)
    return Holding(Tier.HOST, ids)
