"""Reads of blocks from a peer that are summed while more arrive, and then compared.

socket ──ring──▶ arena ──copy threads: sum──▶ sums ══ the sums that the owner sent
"""

from __future__ import annotations

import numpy as np

from flexkv.common.errors import CorruptBlockError, PeerError, TransferError
from flexkv.common.terms import BlockIds
from flexkv.io.checksums.sums import sum_maps
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.fence import Fence
from flexkv.io.peer.frames import Read
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.transport import Fetched
from flexkv.io.ports import Sums


class CheckedReads:
    """Reads blocks into host memory, and believes only what has the sums that were promised."""

    def __init__(self, host: HostBlocks, copier: Copier) -> None:
        """Take host memory and the threads that sum; both must outlive the reads."""
        self._host, self._copier = host, copier
        self._pages = sum_maps(host.arena, host.sums, host.block_bytes)

    async def fetch(
        self, receiver: Receiver, number: int, first: int, host_ids: BlockIds, group: int = 0
    ) -> Fetched:
        """Read blocks of a grant into host blocks, and return how many are there.

        A wrong sum breaks the connection.

        Args:
            receiver: the socket to read from.
            number: of the grant.
            first: the position of the first block.
            host_ids: int64[n], where they are to be; n is at most BLOCKS_MAX.
            group: their KV group.

        Cancellation: see `Receiver.read`; nothing is summed any more, either.
        """
        summing, seen, promised = Fence(), 0, np.zeros(0, np.uint64)

        def arrived(count: int, sums: Sums) -> None:
            nonlocal seen, promised
            self._copier.start_checksum(self._pages[group], host_ids[seen:count], summing.end)
            summing.begin()
            seen, promised = count, sums

        arena = self._host.arena
        addresses = arena.address + host_ids * arena.block_stride_bytes
        read = Read(number, first, len(host_ids), self._host.block_bytes[group])
        error: TransferError | None = None
        try:
            await receiver.read(read, addresses, arrived)
        except PeerError as failure:
            error = failure
        finally:
            await summing.passed()
        right = self._host.sums[host_ids[:seen]] == promised[:seen]
        if right.all():
            return Fetched(seen, error)
        receiver.stop()
        wrong = host_ids[:seen][~right].tolist()
        return Fetched(int(right.argmin()), CorruptBlockError(f"peer {receiver.peer}", 0, wrong))

    def close(self) -> None:
        """Release the arena; nothing may be on its way."""
        self._pages = []
