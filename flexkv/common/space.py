"""What a block is: its size, its division among TP ranks, and what identifies it.

A model has a block space for each KV group: layers whose blocks are kept and found together. Space
0 is that of the prefix chain. All spaces share one pool in each tier, and so one stride: a smaller
block leaves the end of its place unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from flexkv import _ext
from flexkv.common.layout import KVShape, Part
from flexkv.common.terms import Labelled

BLOCK_ALIGNMENT_BYTES = 4096
"""Blocks start on multiples of this, so that each is one O_DIRECT extent."""

GROUPS_MAX = 32
"""Most KV groups of a model."""


class Kind(Labelled):
    """Which blocks of a KV group a prefix needs; the numbers are those of `ext/needs.h`."""

    FULL = 0
    """Every block."""
    WINDOW = 1
    """Those with tokens in the window that ends with the next token."""
    CHUNK = 2
    """Those of the chunk that the next token is in."""
    STATE = 3
    """The one that ends where the prefix ends."""


class GroupRule(NamedTuple):
    """What the index needs to know of a KV group whose blocks are leaves.

    Attributes:
        group: its number, at least 1.
        kind: a `Kind`.
        window: tokens of the window or of a chunk, 0 for the other kinds.
        ratio: how many blocks of the prefix chain one of its blocks covers.
        block_tokens: tokens of one of its blocks.
    """

    group: int
    kind: int
    window: int
    ratio: int
    block_tokens: int

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """Return which of the group's own blocks a prefix of `last` chain blocks needs.

        Those before the chain's block `first`, which are on the device, are left out.
        """
        tokens = last // self.ratio * self.block_tokens
        begin, end = _ext.needed(self.kind, self.window, self.block_tokens, tokens)
        return min(max(begin, first // self.ratio), end), end


@dataclass(frozen=True)
class BlockSpace:
    """What a block of one KV group is, and which blocks of the group a prefix needs.

    Attributes:
        tokens_per_block: how many tokens a block covers.
        shapes: the shape of a block in each layer of one rank.
        dtypes: the element type of each layer.
        ranks: the number of TP ranks.
        parts: into how many equal parts they divide a block; ranks may share one.
        facts: what the bytes of a block depend on, besides its tokens and their namespace.
        group: the index of the space among those of its model.
        stride_bytes: bytes from one place in a pool to the next, the same for all spaces.
        kind: which blocks a prefix needs on the device. All blocks of space 0 are kept and found.
        window: tokens of the window or of a chunk; 0 for kinds without one.
        layers: the indices of the group's layers among those of the model, ascending.
    """

    tokens_per_block: int
    shapes: tuple[KVShape, ...]
    dtypes: tuple[str, ...]
    ranks: int
    parts: int
    facts: Mapping[str, int | str]
    group: int = 0
    stride_bytes: int = 0
    kind: Kind = Kind.FULL
    window: int = 0
    layers: tuple[int, ...] = ()

    def needed(self, end: int) -> tuple[int, int]:
        """Return which of the group's own blocks a prefix needs: first, and last (exclusive).

        Args:
            end: the tokens of the prefix, a multiple of the tokens of a block.
        """
        return _ext.needed(self.kind, self.window, self.tokens_per_block, end)

    @cached_property
    def part_bytes(self) -> int:
        """Return the bytes of one part of a block: all layers of one rank."""
        return sum(shape.block_bytes for shape in self.shapes)

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block, over all layers and all parts."""
        return self.parts * self.part_bytes

    def part_of(self, tp_rank: int) -> Part:
        """Return the part of a block that a rank fills; ranks that share one are consecutive."""
        return Part(tp_rank * self.parts // self.ranks, self.parts)


def rules_of(spaces: Sequence[BlockSpace]) -> tuple[GroupRule, ...]:
    """Return the rules of the groups whose blocks are leaves: all but group 0."""
    chain = spaces[0].tokens_per_block
    return tuple(
        GroupRule(each.group, each.kind, each.window, tokens // chain, tokens)
        for each in spaces[1:]
        for tokens in [each.tokens_per_block]
    )


def in_one_pool(*spaces: BlockSpace) -> tuple[BlockSpace, ...]:
    """Return spaces numbered in this order, with the stride that the largest block needs."""
    largest = max(space.block_bytes for space in spaces)
    stride = -(-largest // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES
    return tuple(
        replace(space, group=group, stride_bytes=stride) for group, space in enumerate(spaces)
    )


class GivenSize(NamedTuple):
    """The key that sets the size of a tier, and its value, as the user gave it."""

    key: str
    value: object


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """How many blocks each tier has for one model, and what a block of each KV group is."""

    spaces: tuple[BlockSpace, ...]
    num_host_blocks: int
    num_disk_blocks: int
    max_file_blocks: int | None
    """Most blocks in one SSD file; None = no cap."""
    host_given: GivenSize
    """The key and value that an error about the size of the host tier names."""
    disk_given: GivenSize
    """The same for the SSD tier."""

    @property
    def block_bytes(self) -> list[int]:
        """Return the bytes of a block of each KV group."""
        return [space.block_bytes for space in self.spaces]

    @property
    def block_stride_bytes(self) -> int:
        """Return the bytes from one place of a tier to the next."""
        return self.spaces[0].stride_bytes
