"""Hints of which spans others hold, and the catalogue made of them.

The pairs of spans and holders are in `_ext.Hints` (see `ext/README.md`, "Hints"). They have no
states and claims, and are never believed: a wrong one costs a fetch that fails, a lost one costs a
fetch that is not tried. (ADR 6)

    own writes, listings, announcements ──▶ note, drop ──▶ HintedCatalogue.far ──▶ a fetch
                                              doubt, drop ◀───────────────────── what failed

A listing does not name what is gone. So it is a *round* of its holder. At its end, those pairs are
dropped that were noted neither by one of its pages nor after a write of our own since it began:

    begin_round ──▶ note the keys of every page ──▶ end_round ──▶ scrub, until nothing is left ─┐
         ▲                                                                                      │
         └──────────────────────────────────────────────────────────────────────────────────────┘

If pages cannot be listed, the round goes on until they can: ending it would drop their keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.errors import PeerError, TransferError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Tier, Transfer
from flexkv.index.catalogue import NOT_FAR, FarLeaves, FarRun, Sought
from flexkv.index.spans import rows_of, span_rows

STORE: Final = 0
"""The holder that is the remote store. All others are nodes: holder n is a life of some node."""
HOLDERS_MAX: Final = 4096
SCRUB_LINES: Final = 1 << 14
"""How many lines one step of scrubbing searches for dead pairs: about a millisecond."""
PEER_TICKS = 1
"""For how many ticks of the hints' time spans are doubted that a peer did not send."""

_USE_STORE, _USE_NODES = 1, 2


class HintCounts(NamedTuple):
    """How many pairs there are."""

    pairs: int
    """Dead ones included."""
    dead: int
    """Pairs that no run names any more, and that are not scrubbed yet."""
    lost: int
    """Pairs that others have displaced since the start."""
    memory_bytes: int
    """Once all of it is used."""


class Hints:
    """Which spans others are said to hold: pairs of a span and a holder.

    Spans are named by their keys, 16 bytes each. `len` counts the pairs that are not dead.

    Attributes:
        span_blocks: how many blocks a span has.
    """

    def __init__(self, pairs_max: int, span_blocks: int) -> None:
        """Open an empty table; pairs beyond `pairs_max` displace others more and more often."""
        self._table = _ext.Hints(pairs_max, span_blocks)
        self.span_blocks = span_blocks

    def __len__(self) -> int:
        return len(self._table)

    def far_runs(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return who is said to have the blocks from position `first` on, up to `last`.

        Runs follow each other. There is one for each far tier at most. Its block ids are made of
        holders: see `holders_of`. Nodes come before the store, where both have the first span.

        Args:
            keys: root and keys of the prompt's blocks.
            first: a position.
            last: a position, exclusive.
            avoid: far tiers that must not be used.
        """
        use = _USE_STORE | _USE_NODES
        if avoid:
            use = (Tier.REMOTE not in avoid) * _USE_STORE | (Tier.PEER not in avoid) * _USE_NODES
        packed = self._table.run(keys, first, last, use)
        if not packed:
            return ()
        ids = np.frombuffer(packed, np.int64)
        begins, ends = _tier_of(int(ids[0])), _tier_of(int(ids[-1]))
        if begins is ends:
            return (FarRun(begins, ids),)
        of_store = int(np.count_nonzero(holders_of(ids) == STORE))
        split = of_store if begins is Tier.REMOTE else len(ids) - of_store
        return FarRun(begins, ids[:split]), FarRun(ends, ids[split:])

    def note(
        self, holder: int, keys: bytes, on_disk: bool = False, size: int = BLOCK_KEY_BYTES
    ) -> int:
        """Remember that a holder has spans, and end doubts of them; return how many are new.

        Of a span that many nodes have, only a few are remembered: the latest. What a retired holder
        has is not noted.

        Args:
            holder: its number.
            keys: of the spans.
            on_disk: whether the holder has to read them from its disk.
            size: 8 if only the first 8 bytes of each key are given; they suffice.
        """
        return self._table.note(holder, on_disk, keys, size)

    def drop(self, holder: int, keys: bytes, size: int = BLOCK_KEY_BYTES) -> int:
        """Forget that a holder has spans; return how many it was said to have."""
        return self._table.drop(holder, keys, size)

    def doubt(self, holder: int, keys: bytes, ticks: int) -> int:
        """Leave a holder's spans out of runs for some ticks; return how many it is said to have."""
        return self._table.doubt(holder, keys, ticks)

    def known(self, holder: int, keys: bytes) -> NDArray[np.bool_]:
        """Return which spans a holder is said to have, in doubt or not: bool[n]."""
        return np.frombuffer(self._table.known(holder, keys), np.bool_)

    def usable(self, holder: int, keys: bytes) -> NDArray[np.bool_]:
        """Return which spans are not doubted of a holder that is not down: bool[n]."""
        return np.frombuffer(self._table.known(holder, keys, True), np.bool_)

    def nodes(self, keys: bytes) -> BlockIds:
        """Return which node may be asked for each of some spans: int64[n], -1 for none.

        The numbers are those of a far run: see `holders_of`.
        """
        return np.frombuffer(self._table.nodes(keys), np.int64)

    def tick(self, now: int) -> None:
        """Set the time, in ticks; it must never go back."""
        self._table.tick(now)

    def avoid(self, holder: int, is_down: bool) -> None:
        """Leave a holder out of runs while it is down; spans are noted and dropped as before."""
        self._table.avoid(holder, is_down)

    def retire(self, holder: int) -> None:
        """Declare a holder and all its pairs dead."""
        self._table.retire(holder)

    def revive(self, holder: int) -> None:
        """Use the number of a retired holder for another one.

        Raises:
            ValueError: it is not retired, or its pairs are not all scrubbed.
        """
        self._table.revive(holder)

    def begin_round(self, holder: int) -> None:
        """Begin to note everything that a holder has.

        Raises:
            ValueError: a round of the holder has not ended, or what it dropped is not scrubbed.
        """
        self._table.begin_round(holder)

    def end_round(self, holder: int) -> None:
        """Declare the pairs of a holder dead that were not noted since its round began.

        Raises:
            ValueError: the holder is in no round.
        """
        self._table.end_round(holder)

    def scrub(self, lines: int) -> int:
        """Remove the dead pairs of up to some lines of 8; return how many dead pairs are left."""
        return self._table.scrub(lines)

    def scrubbing(self) -> Iterator[None]:
        """Remove all dead pairs, in steps between which others should run.

        Dead pairs do no harm: no run names them, and new ones take their places. They must be gone
        before a holder's next round, and before the number of a retired holder is used again.
        """
        while self.scrub(SCRUB_LINES):
            yield

    def pairs_of(self, holder: int) -> int:
        """Return how many pairs a holder has, dead ones included."""
        return self._table.pairs_of(holder)[0]

    def spans_of(self, holder: int) -> int:
        """Return how many spans a holder is said to have: its pairs that are not dead."""
        pairs, _, dead = self._table.pairs_of(holder)
        return pairs - dead

    def counts(self) -> HintCounts:
        """Return how many pairs there are."""
        return HintCounts(*self._table.counts())

    def clear(self) -> None:
        """Remove all pairs; rounds go on, and retired holders stay retired."""
        self._table.clear()


def holders_of(block_ids: BlockIds) -> BlockIds:
    """Return the holder of each block of a far run."""
    return block_ids % HOLDERS_MAX


def on_disk(block_ids: BlockIds) -> NDArray[np.bool_]:
    """Return whether its holder has to read each block of a far run from its disk."""
    return block_ids >= HOLDERS_MAX


def _tier_of(block_id: int) -> Tier:
    return Tier.PEER if block_id % HOLDERS_MAX else Tier.REMOTE


class HintedCatalogue:
    """The catalogue of what hints say is far."""

    def __init__(self, hints: Hints, doubt_ticks: int = 30) -> None:
        """Answer from `hints`; what a failing tier could not send is doubted for some ticks."""
        self._hints, self._doubt_ticks = hints, doubt_ticks

    @property
    def is_empty(self) -> bool:
        """Return whether nothing at all is far."""
        return not len(self._hints)

    @property
    def span_blocks(self) -> int:
        """Return how many blocks a span has."""
        return self._hints.span_blocks

    def far(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return which tiers are said to have the blocks from `first` on: see `Hints.far_runs`."""
        return self._hints.far_runs(keys, first, last, avoid)

    def has(self, tier: Tier, key: BlockKey) -> bool:
        """Return whether a tier is said to have the span whose last block has this key.

        Only the remote store's are looked up: nobody writes to the tiers of other nodes.
        """
        return tier is Tier.REMOTE and bool(self._hints.known(STORE, key)[0])

    def leaves(self, keys: bytes, avoid: Set[Tier]) -> Sequence[FarLeaves]:
        """Return which leaves other nodes, and the remote store, are said to have."""
        found = []
        if Tier.PEER not in avoid:
            found.append(FarLeaves(Tier.PEER, self._hints.nodes(keys)))
        if Tier.REMOTE not in avoid:
            ids = np.where(self._hints.usable(STORE, keys), STORE, NOT_FAR)
            found.append(FarLeaves(Tier.REMOTE, ids))
        return found

    def ask(self, sought: Sought, avoid: Set[Tier]) -> None:
        """Do nothing: whoever has blocks says so by itself."""

    def clear(self, root: bytes | None) -> None:
        """Forget everything: hints do not say to which namespace a span belongs."""
        self._hints.clear()

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Drop the span that is missing or has wrong bytes; doubt all if the holder is to blame.

        The spans of a peer are doubted only until the request is planned again.

        Args:
            transfer: the rest of one, from the first block that did not arrive on.
            error: why the transfer ended.
        """
        if error.is_miss:
            for holder, keys in self._spans(transfer.part(0, 1)):
                self._hints.drop(holder, keys)
        elif error.blames_tier or isinstance(error, PeerError):
            # A peer that fails is left out as a whole, for as long as its breaker says.
            ticks = self._doubt_ticks if error.blames_tier else PEER_TICKS
            for holder, keys in self._spans(transfer):
                self._hints.doubt(holder, keys, ticks)

    def _spans(self, transfer: Transfer) -> Iterator[tuple[int, bytes]]:
        """Yield the holders of a transfer's blocks, each with the keys of the spans."""
        assert transfer.names is not None, transfer
        keys, holders = rows_of(transfer.names.keys), holders_of(transfer.source_ids)
        rows = span_rows(transfer.positions.array, 1 if transfer.group else self.span_blocks)
        for holder in np.unique(holders):
            mine = np.unique(rows[holders == holder])
            yield int(holder), keys[mine[mine < len(keys)]].tobytes()
