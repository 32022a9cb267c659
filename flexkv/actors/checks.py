"""The checksums of the blocks that an actor moves: when they are made, kept and compared.

    from a tier     move ─▶ sum ─▶ compare with the kept sums; CorruptBlockError if unequal
    to a tier       have the journals forget the places ─▶ move ─▶ keep the sums
    from a device   move ─▶ sum

Of a read that its port could make only in part, the leading blocks go on to be summed and compared.

A write keeps the sums that were made when the blocks' bytes reached host memory, so a read also
finds damage that happened in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from flexkv.common.errors import CorruptBlockError
from flexkv.common.terms import BlockIds, Transfer
from flexkv.io.ports import Checksummer, Completion, Sums

Forget: TypeAlias = Callable[[BlockIds, Callable[[], None]], bool]
"""Makes the journals forget the blocks whose places are about to be overwritten: returns True if
they name none of the places; otherwise it calls the second argument once they name none."""


class KeptSums:
    """The checksums of a tier's blocks.

    Attributes:
        sums: uint64[blocks of the tier], the sum of what was last written to each place.
        forget: called before every write; None if the tier keeps no journals.
    """

    def __init__(self, num_blocks: int, place_of: Callable[[int], tuple[str, int]]) -> None:
        """Keep sums of `num_blocks`; `place_of` returns a block's path and byte offset."""
        self.sums: Sums = np.zeros(num_blocks, np.uint64)
        self.forget: Forget | None = None
        self._place_of = place_of

    def compared(self, read: Transfer, host_sums: Sums) -> Completion:
        """Return the end of a read whose blocks were summed; its error names those that differ."""
        wrong = host_sums[read.target_ids] != self.sums[read.source_ids]
        bad = read.source_ids[wrong].tolist()
        if not bad:
            return Completion(read.op_id, None)
        error = CorruptBlockError(*self._place_of(bad[0]), bad)
        return Completion(read.op_id, error, int(wrong.argmax()))


class BlockChecks(NamedTuple):
    """What an actor needs to sum the blocks that arrive in host memory, and to check them."""

    checksummer: Checksummer
    """Sums host blocks, and holds their sums; closed by whoever opened it."""
    kept: KeptSums | None = None
    """The sums of the tier's blocks; None for a device, whose blocks have none."""
    port_sums: bool = False
    """Whether the port sums whole blocks as it copies them; then the checksummer sums only blocks
    that arrive layer by layer."""
