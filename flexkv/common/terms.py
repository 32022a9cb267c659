"""The words that every other module uses: tiers, routes, transfers.

See `docs/glossary.md` for what each word means and does not mean.
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""A block's key, its parent's key, and whether it is a prompt's first block: a journal's record."""


class Tier(IntEnum):
    """Where a block can be. An IntEnum so that routes hash at C speed."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    REMOTE = 3
    PEER = 4

    @cached_property
    def label(self) -> str:
        """Return the lower-case name, as it appears in records and messages."""
        return self.name.lower()


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
    left: list[int]
    """[Layers that have not ended]: one list, which all pieces of the transfer share."""


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """A batch of block copies on one route, as an actor and its port receive it.

    `source_ids` and `target_ids` are int64[n], the same n. `op_id` names the transfer; `owner`
    groups the transfers of one request, so that a queue can be fair between requests. With a
    `watch` it is moved layer by layer, in pieces that have `layers`.
    """

    op_id: int
    owner: int
    route: Route
    source_ids: BlockIds
    target_ids: BlockIds
    watch: LayerWatch | None = None
    layers: Layers | None = None

    @property
    def block_count(self) -> int:
        """Return the number of blocks to copy."""
        return len(self.source_ids)

    def part(self, begin: int, end: int) -> Transfer:
        """Return the transfer of a range of the blocks, under the same op id."""
        source_ids, target_ids = self.source_ids[begin:end], self.target_ids[begin:end]
        return msgspec.structs.replace(self, source_ids=source_ids, target_ids=target_ids)

    @property
    def sides(self) -> tuple[BlockIds, BlockIds]:
        """Return the ids in host memory, and the ids in the tier at the other end."""
        if self.route.target is Tier.HOST:
            return self.target_ids, self.source_ids
        return self.source_ids, self.target_ids
