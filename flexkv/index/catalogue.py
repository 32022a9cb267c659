"""The catalogue of what is far: blocks that others hold, such as a remote store or other nodes.

The block table says what this engine owns, and is never wrong. A catalogue has hints of what others
own. Blocks that it promises may be gone, so they are never offered to an engine: they are fetched
into host memory first, and are blocks like any other then.

    get, prefetch ──▶ blocks in the table │ where these end: Catalogue.far ──▶ a leg far→host→device
                                          │ what did not arrive: Catalogue.doubt

A backend supplies the catalogue, and for each far tier `TierParts` without a capacity.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple, Protocol

from flexkv.common.errors import TransferError
from flexkv.common.terms import BlockIds, BlockKey, Tier, Transfer


class FarRun(NamedTuple):
    """Consecutive blocks of a prompt that one tier is said to have.

    `block_ids`, int64[n], mean something to the catalogue and the port of the tier only: transfers
    have them as their source ids.
    """

    tier: Tier
    block_ids: BlockIds


NOT_FAR = -1
"""Stands in `FarLeaves.block_ids` for a leaf that no tier is said to have."""


class FarLeaves(NamedTuple):
    """Which of some leaves one tier is said to have.

    `block_ids` is int64[leaves]: for each as in a `FarRun`, or NOT_FAR.
    """

    tier: Tier
    block_ids: BlockIds


class Sought(NamedTuple):
    """Prefixes of a prompt that a load would bring if all that they need were known to be far.

    Attributes:
        keys: root and keys of the prompt's blocks.
        first: where the longest prefix ends that a load can bring now; all others are longer.
        chain: up to here at least, the chain is here or said to be far.
        last: the furthest position at which a prefix may end.
        drop: how many more blocks of the chain are wanted behind it.
    """

    keys: bytes
    first: int
    chain: int
    last: int
    drop: int = 0


class Catalogue(Protocol):
    """Has hints of what others hold. It is called on the engine's loop: no I/O, no waiting."""

    @property
    def is_empty(self) -> bool:
        """Return whether nothing at all is far; the catalogue is not asked any further then."""
        ...

    @property
    def span_blocks(self) -> int:
        """Return how many consecutive blocks of a prompt make up a span: what is far is known, and
        best fetched, by whole spans."""
        ...

    def has(self, tier: Tier, key: BlockKey) -> bool:
        """Return whether a tier is said to have the span whose last block has this key."""
        ...

    def far(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return which tiers are said to have the blocks from position `first` on, up to `last`.

        Args:
            keys: root and keys of the prompt's blocks.
            first: where the local blocks end.
            last: exclusive; longer runs are cut there.
            avoid: tiers that are down.

        Returns:
            Consecutive runs, the first of which begins at `first`, each in another tier.
        """
        ...

    def leaves(self, keys: bytes, avoid: Set[Tier]) -> Sequence[FarLeaves]:
        """Return which leaves each far tier is said to have, the nearest tier first.

        Each leaf is a span of its own.

        Args:
            keys: of the leaves, 16 bytes each.
            avoid: tiers that are down.
        """
        ...

    def ask(self, sought: Sought, avoid: Set[Tier]) -> None:
        """Find out what is not known of prefixes with leaves, for later searches.

        It is called with each search of a model with several KV groups that finds no prefix of the
        length that was asked for.

        Args:
            sought: the prefixes.
            avoid: tiers that are down.
        """
        ...

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Record that blocks did not arrive, and why: they should not be promised again at once.

        Args:
            transfer: the rest of one, from the first block that did not arrive on. Only that
                block is known to be missing, and not even that one if `error.blames_tier`.
            error: why the transfer ended.
        """
        ...

    def clear(self, root: bytes | None) -> None:
        """Promise nothing any more that was stored before this call.

        Args:
            root: of the namespace that is cleared; None for everything. A catalogue that cannot
                tell namespaces apart forgets everything.
        """
        ...


class NothingIsFar:
    """The catalogue of an engine that has only its own tiers."""

    is_empty, span_blocks = True, 1

    def has(self, tier: Tier, key: BlockKey) -> bool:
        """Return False."""
        return False

    def far(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return nothing."""
        return ()

    def leaves(self, keys: bytes, avoid: Set[Tier]) -> Sequence[FarLeaves]:
        """Return nothing."""
        return ()

    def ask(self, sought: Sought, avoid: Set[Tier]) -> None:
        """Do nothing."""

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Do nothing."""

    def clear(self, root: bytes | None) -> None:
        """Do nothing."""


NOTHING_IS_FAR = NothingIsFar()
