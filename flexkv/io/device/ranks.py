"""One port for the devices of all ranks; each rank has one part of every block.

part 0: ranks 0, 1 ──┐     to the device: every rank reads its part
part 1: ranks 2, 3 ──┴─▶   to the host: the ranks of one part have the same bytes (MLA, a state that
                           each rank has whole, or fewer heads than ranks), so each writes some of
                           the blocks

The ranks divide the blocks of each KV group in their own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flexkv.common.errors import InvariantError, TransferError
from flexkv.common.extents import check_ids
from flexkv.common.space import BlockSpace
from flexkv.common.terms import Tier, Transfer
from flexkv.io.ports import Completion, DevicePort


class _UnderWay:
    """A transfer under way: how many ranks have to end it, and the first error."""

    __slots__ = ("error", "ranks_left")

    def __init__(self, ranks_left: int) -> None:
        self.ranks_left = ranks_left
        self.error: TransferError | None = None


class RanksPort:
    """A transfer port whose transfers end when those of every rank have ended."""

    def __init__(
        self, ports: Sequence[DevicePort], spaces: Sequence[BlockSpace], host_blocks: int
    ) -> None:
        """Combine the ports of the ranks, in their order; the caller still owns them.

        Args:
            ports: one for each rank.
            spaces: the block space of each KV group, which says what part of a block a rank has.
            host_blocks: how many blocks host memory has.
        """
        self._ports, self._host_blocks = ports, host_blocks
        self._parts = [_by_part(ports, space) for space in spaces]
        self._under_way: dict[int, _UnderWay] = {}

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        for port in self._ports:
            port.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: a rank's port is closed.
            InvariantError: a group or an id is out of range, or the id lists differ in length.
        """
        if transfer.group >= len(self._parts):
            raise InvariantError(f"transfer {transfer.op_id}: no ranks of group {transfer.group}")
        check_ids(transfer, self._host_blocks, min(port.num_blocks for port in self._ports))
        if transfer.route.target is Tier.DEVICE:
            shares = [(port, transfer) for port in self._ports]
        else:
            parts = self._parts[transfer.group]
            shares = [share for ranks in parts for share in _divided(transfer, ranks)]
        for started, (port, share) in enumerate(shares, 1):
            port.submit(share)
            self._under_way[transfer.op_id] = _UnderWay(started)

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended = []
        for port in self._ports:
            for op_id, error, *_ in port.reap():
                under_way = self._under_way[op_id]
                under_way.ranks_left -= 1
                under_way.error = under_way.error or error
                if not under_way.ranks_left:
                    del self._under_way[op_id]
                    ended.append(Completion(op_id, under_way.error))
        return ended

    def close(self) -> None:
        """Check that nothing is in flight. The ranks' ports stay open; their owner closes them.

        Raises:
            InvariantError: a transfer is in flight.
        """
        if self._under_way:
            raise InvariantError(f"{len(self._under_way)} transfers of several ranks unreaped")


def _by_part(ports: Sequence[DevicePort], space: BlockSpace) -> list[list[DevicePort]]:
    """Return the ports of the ranks that have each part of a block."""
    parts: list[list[DevicePort]] = [[] for _ in range(space.parts)]
    for rank, port in enumerate(ports):
        parts[space.part_of(rank).number].append(port)
    return parts


def _divided(transfer: Transfer, ranks: Sequence[DevicePort]) -> list[tuple[DevicePort, Transfer]]:
    """Return each rank's share of the blocks; with fewer blocks than ranks, some have none."""
    count = transfer.block_count
    if len(ranks) == 1 or not count:
        return [(ranks[0], transfer)]
    bounds = np.linspace(0, count, len(ranks) + 1).astype(int).tolist()
    return [
        (port, transfer.part(begin, end))
        for port, begin, end in zip(ranks, bounds, bounds[1:], strict=False)
        if begin < end
    ]
