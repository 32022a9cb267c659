"""What the port of the peers' tier needs of that which moves the bytes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import TransferError
from flexkv.common.terms import BlockIds
from flexkv.io.ports import Sums


class Fetched(NamedTuple):
    """How a read has ended.

    Attributes:
        filled: how many leading blocks are in their places, with the right sums.
        error: why not all are.
    """

    filled: int
    error: TransferError | None


class Places(NamedTuple):
    """Where a holder's engine has the blocks of a grant.

    Attributes:
        endpoint: of the engine.
        addresses: of the block at each position, int64[n]; a negative one if there is none.
        sums: their checksums, uint64[n].
        until_s: the loop's time from which on the grant may have ended, since its owner does not
            see that it is read.
    """

    endpoint: str
    addresses: NDArray[np.int64]
    sums: Sums
    until_s: float

    def at(self, first: int, count: int, step: int) -> Places:
        """Return those of some positions, counted from the first one of the grant."""
        own = slice(first, first + count * step, step)
        return self._replace(addresses=self.addresses[own], sums=self.sums[own])


class Part(NamedTuple):
    """Blocks of a grant that are read together.

    Attributes:
        holder: its number.
        number: of the grant.
        first: the position of the first block.
        host_ids: where they are to be, int64[n].
        group: their KV group.
        lane: which of the connections to take.
        places: where the holder's engine has them; None if it is not known.
    """

    holder: int
    number: int
    first: int
    host_ids: BlockIds
    group: int
    lane: int
    places: Places | None = None


class Transport(Protocol):
    """Moves blocks of other nodes into host memory, and believes only right sums.

    Attributes:
        name: what moves the bytes.
    """

    @property
    def name(self) -> str:
        """Return what moves the bytes."""
        ...

    def connect(self) -> None:
        """Attach to the running loop."""
        ...

    def wants_places(self, holder: int) -> bool:
        """Return whether it would use the places of a holder's blocks now."""
        ...

    async def fetch(self, part: Part) -> Fetched:
        """Read blocks into host blocks, and return how many are there.

        When it returns or raises, nothing of it is written to host memory any more.
        """
        ...

    def stop(self, holder: int | None = None) -> None:
        """Make what is being read from a holder, or from all, fail soon."""
        ...

    async def forget(self, holder: int) -> None:
        """Drop what is kept for a holder, whose number may be another node's later."""
        ...

    def close(self) -> None:
        """End everything: nothing writes to host memory any more. Idempotent."""
        ...
