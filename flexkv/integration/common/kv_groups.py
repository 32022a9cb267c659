"""What a prefix needs of each KV group of an engine, and which boundaries are worth keeping.

The blocks of group 0 are the prefix chain. The blocks of any other group are leaves: the parent of
each is the chain's block at its position. A prefix can be offered only where every group has what
it needs, so leaves are stored only at *boundaries*, where a later prompt can end its hit: the same
rule decides both.

In a model without full attention the chain itself has a window. All its blocks are stored as they
are computed, and a match needs all of them. But a load moves only those that the end of the hit
needs, since the engine has null blocks before them.

The device blocks of a request come as one list of block ids for each group, in the order of our
group numbers. A list has the group's own blocks from the prompt's first one on. An id of 0 or less,
or None, stands for a block that the engine does not have: such a null block is neither read nor
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm
from typing import TypeAlias

import numpy as np

from flexkv.common.errors import ConfigError
from flexkv.common.request import NO_BLOCK, LeafBlocks
from flexkv.common.space import BlockSpace, Kind
from flexkv.common.terms import Positions

GroupIds: TypeAlias = Sequence[Sequence[int | None]]
"""The device blocks of a request: for each KV group those of its own blocks, from the first on."""


class KVGroups:
    """The KV groups of one engine.

    Attributes:
        several: whether there are more groups than the chain.
        chain_is_full: whether a request keeps all blocks of the chain while it runs.
        fail_whole: whether a load that comes short has failed as a whole. That is so with several
            groups, and if the chain has a window: the one before a missing block is not loaded.
        drop: how many blocks of the chain behind a hit must be there as well. A draft model drops
            the last block of a hit: its KV there depends on the token that comes next.
    """

    def __init__(
        self, spaces: Sequence[BlockSpace], alignment_tokens: int, drops_last: bool = False,
        fail_whole: bool = False,
    ) -> None:  # fmt: skip
        """Take the engine's groups.

        Args:
            spaces: the block space of each group; the first is the chain's.
            alignment_tokens: hits of the engine end on multiples of this many tokens.
            drops_last: whether a draft model drops the last block of a hit.
            fail_whole: whether loads of this engine fail as a whole, whatever groups it has.

        Raises:
            ConfigError: the alignment does not fit the groups' blocks.
        """
        self._per_block, self._chain = spaces[0].tokens_per_block, spaces[0]
        self.chain_is_full = self._chain.kind is Kind.FULL
        self._leaf_spaces = {space.group: space for space in spaces[1:]}
        self.several, self.drop = len(spaces) > 1, int(drops_last)
        self.fail_whole = self.several or fail_whole or not self.chain_is_full
        unit = lcm(*(space.tokens_per_block for space in spaces))
        if self.several and alignment_tokens != unit:  # the index finds hits on this unit
            why = f"must be the least common multiple of the groups' blocks: {unit}"
            raise ConfigError("alignment_tokens", alignment_tokens, why)
        if alignment_tokens < 1 or alignment_tokens % unit:
            raise ConfigError("alignment_tokens", alignment_tokens, f"must be a multiple of {unit}")
        self._alignment = alignment_tokens // self._per_block

    def wanted(self, num_tokens: int) -> int:
        """Return how many blocks of the chain a match asks for; a hit never has all tokens.

        An engine has to compute the last token at least. A state that has seen it already would see
        it twice.
        """
        blocks = max(0, num_tokens - 1) // self._per_block
        return blocks if self.drop else self.aligned(blocks)

    def aligned(self, blocks: int) -> int:
        """Return how many blocks of the chain a hit can have if so many were found."""
        return blocks // self._alignment * self._alignment

    def first_to_load(self, blocks: int, local: int) -> int:
        """Return the first block of the chain that a load moves.

        Args:
            blocks: the length of the prefix, in blocks of the chain.
            local: how many of them the device has.
        """
        if self.chain_is_full:
            return local
        return max(local, self._chain.needed(blocks * self._per_block)[0])

    def needed(self, group: int, blocks: int, local: int = 0) -> range:
        """Return the positions in the chain of those blocks of a group that a prefix needs.

        Args:
            group: the group's number; not 0, the chain.
            blocks: the length of the prefix, in blocks of the chain.
            local: how many of them the device has; their leaves are left out, except states: a
                longer prefix has another state.
        """
        space, ratio = self._leaf_spaces[group], self._ratio(group)
        first, last = space.needed(blocks * self._per_block)
        if space.kind != Kind.STATE:
            first = max(first, local // ratio)
        return range((first + 1) * ratio - 1, last * ratio, ratio)

    def boundaries(self, prompt_tokens: int, junction_blocks: int = 0) -> tuple[int, ...]:
        """Return where hits of later prompts can end, in blocks of the chain, ascending.

        Leaves are worth storing there: for the same prompt once more, for one that continues it,
        and for one that parts from it at the junction, where it parted from an earlier prompt.

        Args:
            prompt_tokens: the tokens of the prompt, or all tokens of a request that is over.
            junction_blocks: how many blocks of the chain were resident when the prompt was matched,
                if missing leaves made its hit shorter; 0 if they did not.
        """
        replayed = self.wanted(prompt_tokens)
        continued = max(0, prompt_tokens) // self._per_block
        ends = {
            self.aligned(chain - self.drop)
            for chain in (replayed, continued, min(junction_blocks, replayed))
        }
        return tuple(sorted(end for end in ends if end > 0))

    def to_load(self, ids: GroupIds, blocks: int, local: int) -> tuple[LeafBlocks, ...] | None:
        """Return the leaves that a prefix needs, with the device blocks that they are loaded into.

        Args:
            ids: the request's device blocks, by group.
            blocks, local: as for `needed`.

        Returns:
            The leaves; None if the request has no device block for one of them.
        """
        leaves = []
        for group in self._leaf_spaces:
            positions = self.needed(group, blocks, local)
            if positions:
                leaves.append(self._leaves(group, positions, ids))
        if any((each.device_ids == NO_BLOCK).any() for each in leaves):
            return None
        return tuple(leaves)

    def to_store(self, ids: GroupIds, blocks: int) -> tuple[LeafBlocks, ...]:
        """Return the leaves that a prefix of `blocks` blocks needs and the request has.

        States are left out, since their blocks are overwritten while the request goes on: the
        engine says which block has the state of which prefix (see `state`).
        """
        return joined(
            self._leaves(group, self.needed(group, blocks), ids)
            for group, space in self._leaf_spaces.items()
            if space.kind != Kind.STATE
        )

    def state(self, group: int, end_tokens: int, device_id: int | None) -> tuple[LeafBlocks, ...]:
        """Return the state that the engine offers for a prefix of `end_tokens` tokens.

        The result is empty if no hit can end there, or the block is a null block.
        """
        is_kept = end_tokens > 0 and end_tokens % (self._alignment * self._per_block) == 0
        if self._leaf_spaces[group].kind != Kind.STATE or not is_kept:
            return ()
        at = end_tokens // self._per_block - 1
        return joined((_leaf(group, range(at, at + 1), [_real(device_id)]),))

    def _ratio(self, group: int) -> int:
        """Return how many blocks of the chain one block of a group covers."""
        return self._leaf_spaces[group].tokens_per_block // self._per_block

    def _leaves(self, group: int, positions: range, ids: GroupIds) -> LeafBlocks:
        own, ratio = ids[group], self._ratio(group)
        return _leaf(
            group,
            positions,
            [_real(own[at // ratio]) if at // ratio < len(own) else NO_BLOCK for at in positions],
        )


def joined(leaves: Iterable[LeafBlocks]) -> tuple[LeafBlocks, ...]:
    """Return leaves as one entry for each group, by position, without those that have no block.

    If a position is named twice, the last entry counts.
    """
    groups: dict[int, dict[int, int]] = {}
    for group, positions, ids in leaves:
        real = zip(positions, ids.tolist(), strict=True)
        groups.setdefault(group, {}).update((at, block) for at, block in real if block != NO_BLOCK)
    entries = []
    for group, blocks in sorted(groups.items()):
        if blocks:
            at = sorted(blocks)
            places = np.array(at, np.int64)
            entries.append(
                LeafBlocks(
                    group,
                    Positions(at[0], len(at), None if at[-1] - at[0] + 1 == len(at) else places),
                    np.array([blocks[each] for each in at], np.int64),
                )
            )
    return tuple(entries)


def _leaf(group: int, at: range, ids: list[int]) -> LeafBlocks:
    places = None if at.step == 1 else np.arange(at.start, at.stop, at.step)
    return LeafBlocks(group, Positions(at.start, len(at), places), np.array(ids, np.int64))


def _real(block: int | None) -> int:
    """Return a block id; NO_BLOCK for a null block."""
    return NO_BLOCK if block is None or block <= 0 else int(block)
