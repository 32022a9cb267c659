"""The words that every other module uses: tiers, routes, transfers.

See `docs/glossary.md` for what each word means and does not mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

BlockIds: TypeAlias = NDArray[np.int64]
"""Places in one tier's pool: int64[n]."""

BlockKey: TypeAlias = bytes
"""Identity of one block: 16 bytes, chained over its whole prefix."""

BLOCK_KEY_BYTES = 16
BLOCK_RECORD_BYTES = 36
"""A block's key, its parent's key, and its flags: a journal's record. See `Residency.export`."""


class Labelled(IntEnum):
    """An enumeration whose members have labels. An IntEnum so that members hash at C speed."""

    @cached_property
    def label(self) -> str:
        """Return the lower-case name, as it appears in records and messages."""
        return self.name.lower()


class Tier(Labelled):
    """Where a block can be, from the nearest to the farthest; files and messages have the names."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    PEER = 3
    REMOTE = 4


FAR_TIERS = frozenset({Tier.PEER, Tier.REMOTE})
"""Tiers whose blocks are not this engine's."""


class Route(NamedTuple):
    """One hop of a block, from one tier to another."""

    source: Tier
    target: Tier

    def __str__(self) -> str:
        return f"{self.source.label}→{self.target.label}"

    @property
    def outer(self) -> Tier:
        """Return the end that is not host memory: the tier whose actor runs the route."""
        return self.target if self.source is Tier.HOST else self.source

    @property
    def inbound(self) -> bool:
        """Return whether the route brings bytes nearer to the device: such ops go first."""
        return self.target < self.source


class Positions(msgspec.Struct, frozen=True):
    """Positions of some blocks of a prompt: `places`, or consecutive from `first` if it is None."""

    first: int
    block_count: int
    places: BlockIds | None = None

    def part(self, begin: int, end: int) -> Positions:
        """Return the begin-th to the end-th (exclusive) of them."""
        if self.places is None:
            return Positions(self.first + begin, end - begin)
        places = self.places[begin:end]
        return Positions(int(places[0]) if end > begin else self.first, end - begin, places)

    def number_before(self, last: int) -> int:
        """Return how many of them are before a position."""
        if self.places is None:
            return max(0, min(self.block_count, last - self.first))
        return int(np.searchsorted(self.places, last))

    def leading(self, first: int) -> int:
        """Return the length of the unbroken run of them from a position on."""
        if self.first != first:
            return 0
        if self.places is None:
            return self.block_count
        return int(np.count_nonzero(self.places == np.arange(first, first + self.block_count)))

    def at(self, number: int) -> int:
        """Return the position of the number-th of them."""
        return self.first + number if self.places is None else int(self.places[number])

    def within(self, values: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """Return the values for these positions from an array that begins at position `first`."""
        if self.places is None:
            begin = self.first - first
            return values[begin : begin + self.block_count]
        return values[self.places - first]

    @property
    def array(self) -> NDArray[np.int64]:
        """Return the positions as int64[n]."""
        if self.places is None:
            return np.arange(self.first, self.first + self.block_count)
        return self.places

    def chosen(self, which: NDArray[np.bool_]) -> Positions:
        """Return the positions for which `which`, bool[n], is True."""
        return positions_of(self.array[which])

    def __iter__(self) -> Iterator[int]:
        if self.places is None:
            return iter(range(self.first, self.first + self.block_count))
        return iter(self.places.tolist())


def positions_of(places: BlockIds) -> Positions:
    """Return the positions in `places`, which is int64[n] and ascending."""
    count = len(places)
    first = int(places[0]) if count else 0
    if not count or int(places[-1]) - first + 1 == count:
        return Positions(first, count)
    return Positions(first, count, places)


class BlockNames(msgspec.Struct, frozen=True):
    """What identifies some blocks, wherever they are stored.

    Attributes:
        keys: the root and the keys of a prompt, 16 bytes each. For blocks that were gathered from
            several prompts: a root of zeros, and then each block's own key.
        positions: the positions of the blocks in that prompt.
    """

    keys: bytes
    positions: Positions


class LayerWatch(Protocol):
    """Observer of a request that is moved layer by layer; it decides how far the request may go."""

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the model."""
        ...

    @property
    def ready(self) -> int:
        """Return how many layers, from the first on, may be moved by now."""
        ...

    def expect(self, op_ids: Sequence[int]) -> None:
        """Announce the transfers that will move the request's bytes."""
        ...

    def queued(self, rank: int, op_id: int, last: int, event: StreamEvent) -> None:
        """Report that the layers before `last` of a transfer are queued on a rank's stream."""
        ...

    def moved(self, op_id: int, first: int, last: int) -> None:
        """Report that layers of a transfer have arrived: from `first` to `last`, exclusive."""
        ...

    def end(self) -> None:
        """Report that the request has its response."""
        ...


class StreamEvent(Protocol):
    """A point on a device's stream."""

    def hold_back(self, stream: int) -> None:
        """Make another stream of the device wait for this point."""
        ...

    def close(self) -> None:
        """Release the event; streams that wait for it go on waiting."""
        ...


class Layers(NamedTuple):
    """The layers from `first` to `last`, exclusive: a piece of the transfer with op id `whole`."""

    first: int
    last: int
    whole: int


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """A batch of block copies on one route, as an actor and its port receive it.

    All blocks are of one KV group, `group`, which decides how large they are and how they are laid
    out on a device. `source_ids` and `target_ids` are int64[n], the same n. `op_id` names the
    transfer; `owner` groups the transfers of one request, so that a queue can be fair between
    requests. With a `watch` it is moved layer by layer, in pieces that have `layers`.

    An adapter that is addressed by content reads `block_keys` or `positions`, which are computed
    only then. The transfer's blocks are those of `names` from index `names_offset` on.
    """

    op_id: int
    owner: int
    route: Route
    source_ids: BlockIds
    target_ids: BlockIds
    watch: LayerWatch | None = None
    layers: Layers | None = None
    names: BlockNames | None = None
    names_offset: int = 0
    group: int = 0

    @property
    def block_count(self) -> int:
        """Return the number of blocks to copy."""
        return len(self.source_ids)

    @property
    def positions(self) -> Positions:
        """Return where the blocks are in the prompt of `names`."""
        assert self.names is not None, self
        return self.names.positions.part(self.names_offset, self.names_offset + self.block_count)

    @property
    def block_keys(self) -> list[BlockKey]:
        """Return the key of each block."""
        positions, size = self.positions, BLOCK_KEY_BYTES
        assert self.names is not None
        keys = self.names.keys  # the root comes first
        return [keys[size * (at + 1) : size * (at + 2)] for at in positions]

    def part(self, begin: int, end: int) -> Transfer:
        """Return the transfer of a range of the blocks, under the same op id."""
        return msgspec.structs.replace(
            self,
            source_ids=self.source_ids[begin:end],
            target_ids=self.target_ids[begin:end],
            names_offset=self.names_offset + begin,
        )

    @property
    def sides(self) -> tuple[BlockIds, BlockIds]:
        """Return the ids in host memory, and the ids in the tier at the other end."""
        if self.route.target is Tier.HOST:
            return self.target_ids, self.source_ids
        return self.source_ids, self.target_ids
