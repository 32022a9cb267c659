"""A far tier without hardware: what others hold, the hints of that, and a port to it.

The port is addressed by content: it looks up the keys of a transfer's blocks. Like a real port it
checks what arrives. If the hints were wrong, a transfer fails with only the leading blocks filled.
It stores whole spans. A span that is there already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from itertools import takewhile
from random import Random

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from flexkv.actors.write_behind import ShipLimits
from flexkv.common.errors import CorruptBlockError, MissingBlockError, TransferError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Tier, Transfer
from flexkv.index.catalogue import NOT_FAR, FarLeaves, FarRun, Sought
from flexkv.index.keys import block_keys, key_list
from flexkv.index.residency import PENDING, READY, Residency
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakePort, sums_of
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_contents import content_of, generation_of


def _no_leaves(keys: bytes, blocks: int) -> list[BlockKey]:
    """Return nothing."""
    return []


class FakeFar:
    """What others hold, and a catalogue of it.

    Attributes:
        tier: where it is.
        store: uint8[blocks, bytes], the bytes of every block that was ever held.
        held: keys of the blocks that are held now.
        hinted: keys of the blocks that the catalogue believes to be held.
        dropped: keys of the blocks whose hints were dropped without a fetch that failed.
        doubts: what the catalogue was told of blocks that did not arrive.
        looks: the position of each look at the hints.
        sought: what the catalogue was asked to find out last.
        residency: if given, each look is checked: it must ask for a block that is not here.
        generation: grows by one when everything is cleared; what was stored before is not there,
            and others store blocks as they are in the new generation.
    """

    def __init__(
        self,
        tier: Tier = Tier.REMOTE,
        blocks_max: int = 4096,
        span_blocks: int = 1,
        generation: int = 0,
    ) -> None:
        self.tier, self.span_blocks, self.generation = tier, span_blocks, generation
        self.store = np.zeros((blocks_max, BLOCK_KEY_BYTES), np.uint8)
        self.held: set[BlockKey] = set()
        self.hinted: set[BlockKey] = set()
        self.dropped: set[BlockKey] = set()
        self.doubts: list[tuple[list[BlockKey], TransferError]] = []
        self.damaged_blocks = 0
        self.looks: list[int] = []
        self.sought: Sought | None = None
        self.residency: Residency | None = None
        self._row: dict[tuple[BlockKey, int], int] = {}
        self._ever_held: set[BlockKey] = set()

    # -- what others do -------------------------------------------------------------------------

    def hold(self, keys: Iterable[BlockKey]) -> None:
        """Hold blocks with their right content in this generation, and announce them."""
        for key in keys:
            self.store[self.row(key)] = content_of(key, self.generation)
            self._hold(key)

    def _hold(self, key: BlockKey) -> None:
        self.held.add(key)
        self.hinted.add(key)
        self._ever_held.add(key)

    def row(self, key: BlockKey) -> int:
        """Return the row of a block in this generation, whether it is held or not."""
        row = self._row.setdefault((key, self.generation), len(self._row))
        assert row < len(self.store) - 1, "the far tier has too few rows"
        return row

    def content(self, key: BlockKey) -> NDArray[np.uint8]:
        """Return the bytes of a block that is held: uint8[16]."""
        content: NDArray[np.uint8] = self.store[self.row(key)]
        return content

    def stored(self, keys: Iterable[BlockKey], generation: int) -> None:
        """Hold blocks whose bytes are in their rows, if they were stored in this generation."""
        if generation == self.generation:
            for key in keys:
                self._hold(key)

    def damage(self, key: BlockKey) -> None:
        """Change a bit of a block that is held."""
        self.store[self.row(key), -1] ^= 1
        self.damaged_blocks += 1

    def live(
        self,
        random: Random,
        keys: bytes,
        leaves: Callable[[bytes, int], list[BlockKey]] = _no_leaves,
    ) -> None:
        """At random, have others store, drop or damage blocks of a prompt, announced or not.

        Hints may also be lost.

        `leaves` returns the keys of all leaves that the first blocks of the prompt can have.
        """
        prompt, chance = block_keys(keys), random.random()
        some = prompt[: random.randint(0, len(prompt))]
        of_some, of_all = leaves(keys, len(some)), leaves(keys, len(prompt))
        if of_some and random.random() < 0.3:
            of_some = [key for key in of_some if random.random() < 0.8]
        if chance < 0.4:
            self.hold([*some, *of_some])
        elif chance < 0.55:
            self.held.difference_update(prompt[len(some) :], set(of_all).difference(of_some))
        elif chance < 0.6:
            self.hinted.update(some, of_some)
        elif chance < 0.65 and (
            there := [key for key in (*some[-1:], *of_some[-1:]) if key in self.held]
        ):
            self.damage(there[-1])
        elif chance < 0.7:
            self.drop_hints([*prompt[len(some) :], *set(of_all).difference(of_some)])

    def drop_hints(self, keys: Iterable[BlockKey]) -> None:
        """Promise some blocks no more, whether they are held or not."""
        for key in keys:
            if key in self.hinted:
                self.hinted.discard(key)
                self.dropped.add(key)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Hold some blocks no more, and promise them no more."""
        keys = list(keys)
        self.drop_hints(keys)
        self.held.difference_update(keys)

    @property
    def ever_held(self) -> Set[BlockKey]:
        """Return the keys of all blocks that were held at some time since the last clear."""
        return self._ever_held

    def rows(self, keys: Iterable[BlockKey]) -> NDArray[np.int64]:
        """Return the rows of the leading blocks that are held."""
        there = takewhile(self.held.__contains__, keys)
        return np.array([self.row(key) for key in there], np.int64)

    # -- the catalogue --------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Return whether there is no hint at all."""
        return not self.hinted

    def far(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return the run that the hints promise."""
        self.looks.append(first)
        if self.residency is not None:
            _check_absent(self.residency, keys, first, avoid)
        if self.tier in avoid:
            return ()
        prompt, size, end = block_keys(keys), self.span_blocks, first
        while end < last and (span := end // size) < len(prompt) // size:
            if prompt[(span + 1) * size - 1] not in self.hinted:
                break
            end = (span + 1) * size
        count = min(end, last) - first
        return [FarRun(self.tier, np.zeros(count, np.int64))] if count > 0 else ()

    def leaves(self, keys: bytes, avoid: Set[Tier]) -> Sequence[FarLeaves]:
        """Return which leaves the hints promise."""
        usable = set() if self.tier in avoid else self.hinted
        is_far = [key in usable for key in key_list(keys)]
        return [FarLeaves(self.tier, np.where(is_far, 0, NOT_FAR))]

    def ask(self, sought: Sought, avoid: Set[Tier]) -> None:
        """Record what is sought."""
        self.sought = sought

    def has(self, tier: Tier, key: BlockKey) -> bool:
        """Return whether the hints promise the span that ends with a block."""
        return tier is self.tier and key in self.hinted

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Drop the hint of the first span that did not arrive, or of all that may be gone."""
        keys, size = transfer.block_keys, 1 if transfer.group else self.span_blocks
        assert transfer.names is not None
        prompt = block_keys(transfer.names.keys)
        spans = dict.fromkeys([position // size for position in transfer.positions])
        ends = [prompt[(span + 1) * size - 1] for span in spans]
        self.doubts.append((keys, error))
        self.hinted.difference_update(ends if error.blames_tier else ends[:1])

    def clear(self, root: bytes | None) -> None:
        """Hold nothing any more, and promise nothing."""
        self.generation += 1
        self.held.clear()
        self.hinted.clear()
        self._ever_held.clear()


def random_far(random: Random, generation: int) -> tuple[FakeFar | None, ShipLimits | None]:
    """Return a far tier, or none, and how it is written to, if it is."""
    span_blocks = random.choice([1, 2, 4])
    far = random.choice([None, FakeFar(span_blocks=span_blocks, generation=generation)])
    if far is None or random.random() < 0.3:
        return far, None
    in_flight_blocks = span_blocks * random.choice([1, 3])
    return far, ShipLimits(span_blocks, in_flight_blocks, random.random() < 0.3)


def _check_absent(residency: Residency, keys: bytes, at: int, avoid: Set[Tier]) -> None:
    """Check that no usable tier has a block, unless an op that hangs is filling it."""
    (group,) = residency.survey(keys, at, at + 1, use=False)
    here = {
        tier for tier, state in zip(residency.tiers, group.states, strict=True) if state == READY
    }
    assert here <= avoid or group.states[0] == PENDING, f"asked for a block that is here: {here}"


class FarPort(FakePort):
    """Fetches far blocks by their keys into host memory, and stores spans, with a plan's faults.

    Attributes:
        fetching: by op id, a transfer in flight, and the rows of its leading blocks that are there.
        fetched: how often each block has arrived.
        storing: by op id, a span that is being stored, and the generation at its beginning.
    """

    adapter = "FarPort"

    def __init__(
        self,
        far: FakeFar,
        host: NDArray[np.uint8],
        faults: FaultPlan,
        sums: NDArray[np.uint64] | None = None,
    ) -> None:
        super().__init__(far.store, host, faults, BLOCK_KEY_BYTES, sums)
        self.fetching: dict[int, tuple[Transfer, BlockIds]] = {}
        self.fetched: dict[BlockKey, int] = {}
        self.storing: dict[int, tuple[Transfer, int]] = {}
        self._far = far

    def submit(self, transfer: Transfer) -> None:
        """Begin to fetch the leading blocks that are held, or to store a span."""
        if transfer.route.source is Tier.HOST:
            self._begin_to_store(transfer)
            return
        for other, _ in self.fetching.values():
            assert not np.isin(transfer.target_ids, other.target_ids).any(), "a place has two"
        rows = self._far.rows(transfer.block_keys)
        self.fetching[transfer.op_id] = transfer, rows
        super().submit(structs.replace(transfer.part(0, len(rows)), source_ids=rows))

    def _begin_to_store(self, transfer: Transfer) -> None:
        far, keys = self._far, transfer.block_keys
        span_blocks = 1 if transfer.group else far.span_blocks
        assert len(keys) == span_blocks, "a part of a span is stored"
        assert transfer.positions.first == 0, transfer.positions
        self.storing[transfer.op_id] = transfer, far.generation
        # What is there already stays: its bytes go to a row of no block.
        rows = [len(far.store) - 1 if key in far.ever_held else far.row(key) for key in keys]
        super().submit(structs.replace(transfer, target_ids=np.array(rows, np.int64)))

    async def sync(self) -> None:
        """Do nothing: what others hold is theirs to make durable."""

    def reap(self) -> list[Completion]:
        """Return what ended; only blocks whose bytes are right count as filled."""
        return [
            self._stored(end) if end.op_id in self.storing else self._checked(end)
            for end in super().reap()
        ]

    def _stored(self, end: Completion) -> Completion:
        transfer, generation = self.storing.pop(end.op_id)
        if end.error is None:
            self._far.stored(transfer.block_keys, generation)
        return end

    def _checked(self, end: Completion) -> Completion:
        transfer, rows = self.fetching.pop(end.op_id)
        keys, host_ids, there = transfer.block_keys, transfer.target_ids, len(rows)
        arrived = self._host[host_ids[:there], :BLOCK_KEY_BYTES]
        has_come = (arrived == self._store[rows]).all(axis=1)
        # The bytes prove of which block they are, but not of which generation.
        right = [
            came and generation_of(key, content) is not None
            for came, key, content in zip(has_come, keys[:there], arrived, strict=True)
        ]
        filled = len(list(takewhile(bool, right)))
        if self._sums is not None:
            self._sums[host_ids[:filled]] = sums_of(self._host[host_ids[:filled]])
        for key in keys[:filled]:
            self.fetched[key] = self.fetched.get(key, 0) + 1
        if filled == len(keys) or end.error is not None:
            return Completion(end.op_id, end.error, filled)
        if filled < there:
            return Completion(end.op_id, CorruptBlockError("far", 0, [0]), filled)
        route, why = str(transfer.route), "it is not there any more"
        error = MissingBlockError(end.op_id, route, len(keys) - filled, why)
        return Completion(end.op_id, error, filled)
