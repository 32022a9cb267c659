"""The queue of one transfer actor: inbound before outbound, fair between requests, bounded.

Inbound ops (towards the device) go first. Within a direction, requests take turns of one piece
each. A new request goes ahead of those that have had a turn, as in fq_codel (RFC 8290), so that
large prefetches, however many, delay a small get by no more than what is already in flight. While
new requests keep arriving, the others still get every fifth turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import msgspec

from flexkv.common.errors import InvariantError, TransferError
from flexkv.common.terms import Layers, LayerWatch, Transfer

LAYERED_PIECES = 16
"""The fewest pieces of a transfer that goes layer by layer, so that its first layers arrive soon;
one with fewer layers has a piece per layer."""

FRESH_TURNS_MAX = 4
"""The most turns in a row that go to new requests while others wait."""


class Cursor(msgspec.Struct):
    """The progress of one transfer in an actor: units handed out, pieces still in flight.

    A unit is a block; for a transfer that has a watch, a unit is one layer of all its blocks.
    """

    transfer: Transfer
    owner: int
    inbound: bool
    units: int
    unit_bytes: int
    watch: LayerWatch | None = None
    next_unit: int = 0
    pieces_in_flight: int = 0
    error: TransferError | None = None
    failed_from: int | None = None
    """The first block that did not arrive; None while nothing has failed."""
    queued: bool = True

    @property
    def over(self) -> bool:
        """Return whether nothing of the transfer is queued or in flight."""
        return not self.queued and not self.pieces_in_flight

    @property
    def filled(self) -> int:
        """Return how many leading blocks of a failed inbound transfer have arrived.

        It is 0 for a transfer that goes layer by layer: each piece has a layer of every block.
        """
        if self.failed_from is None or not self.inbound or self.watch is not None:
            return 0
        return min(self.failed_from, self.next_unit)

    @property
    def ready(self) -> int:
        """Return how many units may be handed out by now, including those that already were."""
        return self.units if self.watch is None else min(self.units, self.watch.ready)

    def fail_from(self, block: int) -> None:
        """Record that a block has not arrived, nor any that belong to the same piece behind it."""
        self.failed_from = block if self.failed_from is None else min(self.failed_from, block)

    def layers(self, first: int, units: int) -> Layers:
        """Return the description of a piece that has `units` layers, from `first` on."""
        return Layers(first, first + units, self.transfer.op_id)


class Lane:
    """The queued transfers of one direction; their owners take turns.

    Owners that have had no turn yet go first, but not for more than a few turns in a row.
    """

    def __init__(self) -> None:
        self._turns: dict[int, deque[Cursor]] = {}
        self._fresh: dict[int, deque[Cursor]] = {}
        """The owners that have had no turn yet."""
        self._fresh_in_row = 0

    def __bool__(self) -> bool:
        return bool(self._turns or self._fresh)

    def append(self, cursor: Cursor) -> None:
        """Queue a transfer behind its owner's others."""
        queue = self._turns.get(cursor.owner) or self._fresh.get(cursor.owner)
        if queue is None:
            self._fresh[cursor.owner] = deque((cursor,))
        else:
            queue.append(cursor)

    def take(
        self, bytes_max: int, room_bytes: int, may_go: Callable[[Cursor], bool] | None = None
    ) -> tuple[Cursor, int, int] | None:
        """Return the next piece: its transfer's cursor, its first unit and its number of units.

        Return None if nothing that waits may go, or the piece has more than `room_bytes`. The next
        turn is the next owner's.

        Args:
            bytes_max: the most bytes of a piece.
            room_bytes: how many bytes may go.
            may_go: owners whose first transfer it refuses are passed over.
        """
        found = self._next_owner(may_go)
        if found is None:
            return None
        turns, owner, queue = found
        cursor = queue[0]
        if cursor.watch is not None:
            return self._take_layers(bytes_max, room_bytes)
        begin, unit_bytes = cursor.next_unit, cursor.unit_bytes
        units = rest = cursor.units - begin
        if rest * unit_bytes > bytes_max:
            units = bytes_max // unit_bytes or 1
        if units * unit_bytes > room_bytes:
            return None
        cursor.next_unit = begin + units
        cursor.pieces_in_flight += 1
        if units == rest:
            cursor.queued = False
            queue.popleft()
        self._fresh_in_row = self._fresh_in_row + 1 if turns is self._fresh else 0
        if not queue:
            del turns[owner]
        elif turns is self._fresh or len(turns) > 1:
            self._turns[owner] = turns.pop(owner)
        return cursor, begin, units

    def _take_layers(self, bytes_max: int, room_bytes: int) -> tuple[Cursor, int, int] | None:
        """Return the next piece when the transfer in turn goes layer by layer.

        Transfers whose next layer is not ready are passed over. The transfers of one owner take
        turns, too, so that their first layers go first.
        """
        queues = chain(self._fresh.values(), self._turns.values())
        waiting = (cursor for queue in queues for cursor in queue)
        cursor = next((each for each in waiting if each.next_unit < each.ready), None)
        if cursor is None:
            return None
        begin = cursor.next_unit
        most = min(bytes_max // cursor.unit_bytes, cursor.units // LAYERED_PIECES) or 1
        units = min(cursor.ready - begin, most)
        if units * cursor.unit_bytes > room_bytes:
            return None
        cursor.next_unit = begin + units
        cursor.pieces_in_flight += 1
        turns = self._turns_of(cursor.owner)
        queue = turns.pop(cursor.owner)
        queue.remove(cursor)
        if cursor.next_unit < cursor.units:
            queue.append(cursor)
        else:
            cursor.queued = False
        if queue:
            self._turns[cursor.owner] = queue
        return cursor, begin, units

    def remove(self, cursor: Cursor) -> None:
        """Remove a transfer from the queue."""
        turns = self._turns_of(cursor.owner)
        turns[cursor.owner].remove(cursor)
        cursor.queued = False
        if not turns[cursor.owner]:
            del turns[cursor.owner]

    def _next_owner(
        self, may_go: Callable[[Cursor], bool] | None
    ) -> tuple[dict[int, deque[Cursor]], int, deque[Cursor]] | None:
        """Return whose turn it is: where that owner waits, the owner, and its transfers."""
        first, then = self._fresh, self._turns
        if then and self._fresh_in_row == FRESH_TURNS_MAX:
            first, then = then, first
        for turns in (first, then):
            for owner, queue in turns.items():
                if may_go is None or may_go(queue[0]):
                    return turns, owner, queue
        return None

    def _turns_of(self, owner: int) -> dict[int, deque[Cursor]]:
        return self._turns if owner in self._turns else self._fresh


class Mailbox:
    """Both lanes of an actor, and the bound on the transfers that are queued or in flight."""

    def __init__(self, transfers_max: int, block_bytes: Sequence[int]) -> None:
        """Hold at most `transfers_max`; `block_bytes` has a block's bytes in each KV group."""
        self._block_bytes = block_bytes
        self.inbound, self.outbound = Lane(), Lane()
        self._transfers_max = transfers_max
        self._cursors: dict[int, Cursor] = {}

    def __len__(self) -> int:
        """Return the number of transfers that are queued or in flight."""
        return len(self._cursors)

    def lane(self, cursor: Cursor) -> Lane:
        """Return the lane of a transfer's direction."""
        return self.inbound if cursor.inbound else self.outbound

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer.

        Raises:
            InvariantError: the mailbox is full, which admission should have made impossible.
        """
        if len(self._cursors) >= self._transfers_max:
            raise InvariantError(
                f"the mailbox is full: {self._transfers_max} transfers are waiting"
            )
        source, target = transfer.route
        inbound = target < source
        blocks, watch = len(transfer.source_ids), transfer.watch
        unit_bytes = self._block_bytes[transfer.group]
        cursor = Cursor(transfer, transfer.owner, inbound, blocks, unit_bytes, watch)
        if watch is not None:
            cursor.units = watch.num_layers
            cursor.unit_bytes = max(1, blocks * unit_bytes // watch.num_layers)
        self._cursors[transfer.op_id] = cursor
        (self.inbound if inbound else self.outbound).append(cursor)

    def find(self, op_id: int) -> Cursor | None:
        """Return the cursor of a transfer; None if it is over."""
        return self._cursors.get(op_id)

    def queued(self) -> list[int]:
        """Return the op ids of the transfers that are not wholly in flight yet."""
        return [op_id for op_id, cursor in self._cursors.items() if cursor.queued]

    def forget(self, cursor: Cursor) -> None:
        """Drop a transfer that is over."""
        del self._cursors[cursor.transfer.op_id]
