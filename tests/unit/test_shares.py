"""What is in flight from one source of a tier leaves room for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.mailbox import FRESH_TURNS_MAX, Cursor, Mailbox
from flexkv.actors.shares import Shares
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.testing.virtual_time import run_virtual

READ = Route(Tier.PEER, Tier.HOST)
BLOCK_BYTES = 8
HUNG, WELL = 7, 9


def transfer(op_id: int, owner: int, source: int, blocks: int = 2) -> Transfer:
    """Return a read of some blocks, whose ids at the other end are their source."""
    return Transfer(op_id, owner, READ, np.full(blocks, source), np.arange(blocks))


def source_of(read: Transfer, block: int) -> int:
    """Return the source of a block."""
    return int(read.source_ids[block])


class Port:
    """A port of which one source never answers; all others do at once.

    Attributes:
        begun: the op ids, in the order in which they came.
    """

    adapter = "fake"

    def __init__(self) -> None:
        self.begun: list[Transfer] = []
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] = lambda: None

    def connect(self, wake: Callable[[], None]) -> None:
        """Call `wake` when something has ended."""
        self._wake = wake

    def submit(self, read: Transfer) -> None:
        """Begin a read."""
        self.begun.append(read)
        if source_of(read, 0) != HUNG:
            self.end(read)

    def end(self, read: Transfer) -> None:
        """End a read."""
        self._ended.append(Completion(read.op_id, None))
        self._wake()

    def reap(self) -> list[Completion]:
        """Return what has ended."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Release nothing."""

    def blocks_of(self, source: int) -> int:
        """Return how many blocks of a source were begun."""
        return sum(read.block_count for read in self.begun if source_of(read, 0) == source)


def test_a_source_that_hangs_leaves_room_for_the_others() -> None:
    """Whatever waits for a source that hangs, reads of others go on; the rest begins in its turn.

    A piece of one block is begun for the hung source while it has less than two in flight.
    """

    async def run() -> None:
        port, ended = Port(), set[int]()
        window = Window(4 * BLOCK_BYTES, BLOCK_BYTES)
        actor = TransferActor(Tier.PEER, port, (window, window), 16, [BLOCK_BYTES])
        actor.shares = Shares(source_of, 2 * BLOCK_BYTES)
        actor.attach(lambda ends: ended.update(end.op_id for end in ends))
        task = asyncio.create_task(actor.run())
        for op_id in range(4):
            actor.post(transfer(op_id, op_id, HUNG))
        await asyncio.sleep(1)
        for op_id in (4, 5):
            actor.post(transfer(op_id, op_id, WELL, blocks=6))
        await asyncio.sleep(1)
        assert ended == {4, 5}
        assert (port.blocks_of(HUNG), port.blocks_of(WELL)) == (2, 12)
        while len(ended) < 6:
            for read in list(port.begun):
                if source_of(read, 0) == HUNG:
                    port.begun.remove(read)
                    port.end(read)
            await asyncio.sleep(1)
        task.cancel()
        actor.close()
        assert actor.in_flight_bytes[True] == 0
        assert not actor.shares._in_flight

    run_virtual(run())


def test_owners_are_passed_over_while_their_first_transfer_may_not_go() -> None:
    """Among the owners that may go, turns are taken as ever; a refused owner keeps its turn."""
    mailbox = Mailbox(16, [1])
    for op_id, source in enumerate((HUNG, WELL, WELL)):
        mailbox.put(transfer(op_id, op_id, source))
    mailbox.put(transfer(3, 0, WELL))

    def may_go(cursor: Cursor) -> bool:
        return source_of(cursor.transfer, 0) != HUNG

    order = []
    while (taken := mailbox.inbound.take(1, 8, may_go)) is not None:
        order.append(taken[0].transfer.op_id)
    assert order == [1, 2, 1, 2], "the second transfer of an owner does not pass its first"
    taken = mailbox.inbound.take(8, 8)
    assert taken is not None
    assert taken[0].transfer.op_id == 0


def test_owners_that_had_a_turn_may_go_if_no_new_one_may() -> None:
    """An owner is passed over whether it is new or has had its turn, and so it is among both."""
    mailbox = Mailbox(16, [1])
    mailbox.put(transfer(0, 0, WELL, blocks=FRESH_TURNS_MAX + 2))
    assert mailbox.inbound.take(1, 8) is not None
    mailbox.put(transfer(1, 1, HUNG))

    def refuses(source: int) -> Callable[[Cursor], bool]:
        return lambda cursor: source_of(cursor.transfer, 0) != source

    for refused, op_id in ((HUNG, 0), (WELL, 1)):
        taken = mailbox.inbound.take(1, 8, refuses(refused))
        assert taken is not None
        assert taken[0].transfer.op_id == op_id
