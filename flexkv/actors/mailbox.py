"""The queue of one transfer actor: inbound before outbound, fair between requests, bounded.

Inbound ops (towards the device) always go first. Within a direction, requests take turns: each
turn gives one piece of the request whose turn it is, so that a large prefetch never holds a small
get back by more than what is already in flight.
"""

from __future__ import annotations

from collections import deque

import msgspec

from flexkv.common.errors import InvariantError, TransferError
from flexkv.common.terms import Transfer


class Cursor(msgspec.Struct):
    """How far an actor is with one transfer: blocks handed out, pieces still in flight."""

    transfer: Transfer
    owner: int
    inbound: bool
    block_count: int
    next_block: int = 0
    pieces_in_flight: int = 0
    error: TransferError | None = None
    queued: bool = True

    @property
    def over(self) -> bool:
        """Tell whether nothing of the transfer is queued or in flight."""
        return not self.queued and not self.pieces_in_flight


class Lane:
    """The waiting transfers of one direction, in turns by owner."""

    def __init__(self) -> None:
        self._turns: dict[int, deque[Cursor]] = {}

    def __bool__(self) -> bool:
        return bool(self._turns)

    def append(self, cursor: Cursor) -> None:
        """Queue a transfer behind its owner's others."""
        queue = self._turns.get(cursor.owner)
        if queue is None:
            self._turns[cursor.owner] = deque((cursor,))
        else:
            queue.append(cursor)

    def take(self, blocks_max: int, room_blocks: int) -> tuple[Cursor, int, int] | None:
        """Hand out a piece of the transfer whose turn it is: its cursor, first block and length.

        None when nothing waits, or the piece has more than `room_blocks`. The next turn is the
        next owner's.
        """
        turns = self._turns
        if not turns:
            return None
        owner, queue = next(iter(turns.items()))
        cursor = queue[0]
        begin = cursor.next_block
        rest = cursor.block_count - begin
        blocks = rest if rest < blocks_max else blocks_max
        if blocks > room_blocks:
            return None
        cursor.next_block = begin + blocks
        cursor.pieces_in_flight += 1
        if blocks == rest:
            cursor.queued = False
            queue.popleft()
            if not queue:
                del turns[owner]
                return cursor, begin, blocks
        if len(turns) > 1:
            turns[owner] = turns.pop(owner)
        return cursor, begin, blocks

    def remove(self, cursor: Cursor) -> None:
        """Take a waiting transfer out."""
        self._turns[cursor.owner].remove(cursor)
        cursor.queued = False
        if not self._turns[cursor.owner]:
            del self._turns[cursor.owner]


class Mailbox:
    """Both lanes of an actor, and the bound on what may wait."""

    def __init__(self, transfers_max: int) -> None:
        self.inbound, self.outbound = Lane(), Lane()
        self._transfers_max = transfers_max
        self._cursors: dict[int, Cursor] = {}

    def __len__(self) -> int:
        """Count the transfers that are queued or in flight."""
        return len(self._cursors)

    def lane(self, cursor: Cursor) -> Lane:
        """Give the lane of a transfer's direction."""
        return self.inbound if cursor.inbound else self.outbound

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer.

        Raises:
            InvariantError: the mailbox is full, which admission should have made impossible.
        """
        if len(self._cursors) >= self._transfers_max:
            raise InvariantError(f"mailbox full: {self._transfers_max} transfers are waiting")
        source, target = transfer.route
        inbound = target < source
        cursor = Cursor(transfer, transfer.owner, inbound, len(transfer.source_ids))
        self._cursors[transfer.token] = cursor
        (self.inbound if inbound else self.outbound).append(cursor)

    def find(self, token: int) -> Cursor | None:
        """Give the cursor of a transfer that is not over."""
        return self._cursors.get(token)

    def forget(self, cursor: Cursor) -> None:
        """Drop a transfer that is over."""
        del self._cursors[cursor.transfer.token]
