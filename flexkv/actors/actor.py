"""Transfer actors: one per device or tier. Each is a task that turns a mailbox into I/O.

    scheduler ──post──▶ mailbox ──pieces──▶ stages ──report──▶ scheduler
                        (turns)   (window)

    a piece   forgetting ──▶ moving ──▶ summing      the first and the last only where blocks are
              (journals)     (port)     (threads)    checked, see `checks.py`

One class serves every device and tier; only the port, the windows and the checks differ. A window
bounds the bytes in flight in one direction. All work of a turn is synchronous; the task only waits
for its bell, which a post or a wake rings.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

import msgspec

from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.actors.mailbox import Cursor, Lane, Mailbox
from flexkv.actors.pace import Pace
from flexkv.actors.shares import Shares
from flexkv.actors.supervisor import Bell
from flexkv.common.errors import (
    CorruptBlockError,
    InvariantError,
    RecalledError,
    TransferError,
)
from flexkv.common.extents import check_ids
from flexkv.common.terms import Tier, Transfer
from flexkv.io.ports import Completion, Sums, TransferPort

ANY_BYTES = 1 << 62
PIECE_OP_IDS = 1 << 62
"""Op ids of pieces count up from here; op ids of whole transfers, set by their runs, are below."""


class Window(NamedTuple):
    """The bytes that an actor may have in flight in one direction."""

    bytes_max: int
    piece_bytes_max: int
    """The largest submission to the port; one block is always allowed."""
    is_paced: bool = False
    """Whether the window shrinks to what keeps the disk busy: see `Pace`."""


class Stage(Enum):
    """Where a piece is on its way."""

    FORGETTING = "forgetting"
    """A write whose places journals still name."""
    MOVING = "moving"
    """At the port."""
    SUMMING = "summing"
    """In host memory, with the checksummer."""


class Piece(msgspec.Struct, gc=False):
    """What an actor knows of a piece; its blocks are lent until it is over, whatever its stage."""

    transfer: Transfer
    cursor: Cursor
    begin: int
    """The first of its units."""
    units: int
    begin_s: float
    moving_s: float
    """When the port got it."""
    stage: Stage = Stage.MOVING
    sums: Sums | None = None
    """uint64[blocks] of a write, to be kept once the blocks are in their places."""
    moved: Completion | None = None
    """How its move ended, once its blocks are being summed: all of them, or the leading ones."""


class TransferActor:
    """Runs the transfers of one device or tier through its port.

    Attributes:
        waiting_since_s: returns since when a transfer at the port has made no progress. None if
            the port does not know: then only the end of a transfer counts as progress.
        shares: bounds the inbound bytes of each source of the tier; None if there is only one.
    """

    def __init__(
        self,
        tier: Tier,
        port: TransferPort,
        windows: tuple[Window, Window],
        transfers_max: int,
        block_bytes: Sequence[int],
        checks: BlockChecks | None = None,
    ) -> None:
        """Create the actor; the port and what checks the blocks stay the caller's.

        Args:
            tier: whose transfers it runs.
            port: moves their blocks.
            windows: the inbound one, and the outbound one.
            transfers_max: how many transfers are queued or in flight at most.
            block_bytes: what the windows count for a block of each KV group.
            checks: sum and compare the blocks; None if that is not done.
        """
        self.tier = tier
        self.name = tier.label
        self.waiting_since_s: Callable[[int], float] | None = None
        self.shares: Shares | None = None
        self.in_flight_bytes = {True: 0, False: 0}
        self._port, self._checks = port, checks
        self._windows = {True: windows[0], False: windows[1]}
        self._paces = {
            is_inbound: Pace(window.bytes_max, window.piece_bytes_max, min(block_bytes))
            for is_inbound, window in self._windows.items()
            if window.is_paced
        }
        self._mailbox = Mailbox(transfers_max, block_bytes)
        self._pieces: dict[int, Piece] = {}
        self._summing = self._summing_inbound_bytes = 0
        self._now_s: Callable[[], float] = lambda: 0.0
        self._next_piece = PIECE_OP_IDS
        self._begun_s: dict[int, float] | None = None
        self._recalled: list[Cursor] = []
        self._bell = Bell()
        self._report: Callable[[list[Completion]], None] | None = None

    # -- the scheduler's side -------------------------------------------------------------------

    def attach(self, report: Callable[[list[Completion]], None]) -> None:
        """Connect to the running loop; `report` is called with the ends of ops, in batches."""
        self._report = report
        self._now_s = asyncio.get_running_loop().time
        self._port.connect(self._bell.ring)
        if self._checks is not None:
            self._checks.checksummer.connect(self._bell.ring)

    def post(self, transfer: Transfer) -> None:
        """Queue a transfer, whose end is reported exactly once.

        Raises:
            InvariantError: the mailbox is full.
        """
        self._mailbox.put(transfer)
        self._bell.ring()

    def note_begins(self, on: bool) -> None:
        """Start or stop recording when transfers begin."""
        self._begun_s = {} if on else None

    def take_begun(self, op_id: int) -> float | None:
        """Return, once, when a transfer's first piece went to the port; None if that is unknown."""
        return None if self._begun_s is None else self._begun_s.pop(op_id, None)

    def nudge(self) -> None:
        """Check the queue again, because a watch may now allow more of a transfer."""
        self._bell.ring()

    def recall(self, op_id: int) -> None:
        """Drop the part of a transfer that is not in flight yet; its end is still reported."""
        cursor = self._mailbox.find(op_id)
        if cursor is not None and cursor.queued:
            transfer = cursor.transfer
            self._mailbox.lane(cursor).remove(cursor)
            cursor.error = RecalledError(
                op_id, str(transfer.route), transfer.block_count, "recalled"
            )
            if cursor.over:
                self._recalled.append(cursor)
                self._bell.ring()

    def recall_queued(self) -> None:
        """Recall every transfer, as far as it is not in flight yet."""
        for op_id in self._mailbox.queued():
            self.recall(op_id)

    def oldest_s(self) -> float:
        """Return the longest time without progress of any piece in flight; 0 without pieces."""
        if self.waiting_since_s is not None:
            return self._now_s() - min(
                map(self.waiting_since_s, self._pieces), default=self._now_s()
            )
        for piece in self._pieces.values():
            return self._now_s() - piece.begin_s
        return 0.0

    def window_bytes(self, inbound: bool) -> int:
        """Return how many bytes may be in flight in a direction now."""
        return (self._paces.get(inbound) or self._windows[inbound]).bytes_max

    @property
    def depth(self) -> int:
        """Return the number of transfers that are queued or in flight."""
        return len(self._mailbox)

    def is_idle(self) -> bool:
        """Return whether nothing is queued or in flight."""
        return not self.depth

    # -- the task -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run transfers until cancelled; cancel only at `depth` 0, since the port owns buffers."""
        while True:
            await self._bell.wait()
            self._turn()

    def close(self) -> None:
        """Check that nothing is in flight.

        Raises:
            InvariantError: pieces are in flight; their ends will not be reported.
        """
        if stages := Counter(piece.stage.value for piece in self._pieces.values()):
            left = ", ".join(f"{count} {stage}" for stage, count in stages.items())
            raise InvariantError(f"{self.name} actor closed with pieces unreaped: {left}")

    def _turn(self) -> None:
        ends: list[Completion] = []
        progress = True
        while progress:
            self._reap(ends)
            progress = self._pump(self._mailbox.inbound, True)
            if not self._mailbox.inbound:
                progress |= self._pump(self._mailbox.outbound, False)
            elif not self.in_flight_bytes[False]:
                progress |= self._pump(self._mailbox.outbound, False, pieces_max=1)
        if self._paces:
            self._measure()
        for cursor in self._recalled:
            self._end(cursor, ends)
        self._recalled.clear()
        if ends and self._report is not None:
            self._report(ends)

    def _pump(self, lane: Lane, inbound: bool, pieces_max: int | None = None) -> bool:
        """Begin pieces while the window has room; return whether any was begun."""
        if not lane:
            return False
        pieces, submit, begun_s = self._pieces, self._port.submit, self._begun_s
        checks = None if inbound else self._checks
        window = self._paces.get(inbound) or self._windows[inbound]
        limit, piece_bytes_max = window.bytes_max, window.piece_bytes_max
        in_flight, begun, now_s = self.in_flight_bytes[inbound], 0, self._now_s()
        # Discount at most one window, so that slow checksumming cannot pile up bytes.
        arrived = min(self._summing_inbound_bytes, limit) if inbound else 0
        shares = self.shares if inbound else None
        may_go = None if shares is None else shares.has_room
        while begun != pieces_max:
            # Whatever its size, one piece may always be in flight.
            busy = in_flight - arrived
            taken = lane.take(piece_bytes_max, limit - busy if busy else ANY_BYTES, may_go)
            if taken is None:
                break
            cursor, begin, units = taken
            if shares is not None:
                shares.begun(cursor, begin, units)
            in_flight += units * cursor.unit_bytes
            self.in_flight_bytes[inbound] = in_flight
            transfer = cursor.transfer
            if begun_s is not None and not begin:
                begun_s[transfer.op_id] = now_s
            if units != cursor.units or cursor.watch is not None:
                transfer = self._part(cursor, begin, units)
            piece = Piece(transfer, cursor, begin, units, now_s, now_s)
            if checks is None or checks.kept is None:
                submit(transfer)
            else:
                self._begin_write(piece, checks.checksummer.sums, checks.kept)
            pieces[transfer.op_id] = piece
            begun += 1
        return begun > 0

    def _part(self, cursor: Cursor, begin: int, units: int) -> Transfer:
        """Return a part of a transfer as a transfer of its own."""
        self._next_piece += 1
        whole, op_id = cursor.transfer, self._next_piece
        if whole.watch is not None:
            layers = cursor.layers(begin, units)
            return msgspec.structs.replace(whole, op_id=op_id, layers=layers)
        return msgspec.structs.replace(whole.part(begin, begin + units), op_id=op_id)

    def _begin_write(self, piece: Piece, host_sums: Sums, kept: KeptSums) -> None:
        """Submit a write once no journal names its places."""
        write = piece.transfer
        check_ids(write, len(host_sums), len(kept.sums))
        piece.sums = host_sums[write.source_ids]
        if kept.forget is None or kept.forget(write.target_ids, partial(self._forgotten, piece)):
            self._port.submit(write)
        else:
            piece.stage = Stage.FORGETTING

    def _forgotten(self, piece: Piece) -> None:
        piece.stage, piece.moving_s = Stage.MOVING, self._now_s()
        self._port.submit(piece.transfer)

    def _reap(self, ends: list[Completion]) -> None:
        """Take each piece that has ended a stage to the next, or to its end."""
        pieces, checks = self._pieces, self._checks
        for completion in self._port.reap():
            piece = pieces[completion.op_id]
            if self._paces and completion.error is None:
                self._measure_piece(piece)
            if checks is None or piece.transfer.route.target is not Tier.HOST:
                self._over(piece, completion, ends)
            elif not self._begin_summing(piece, checks, completion):
                # Blocks without a sum do not count as arrived.
                nothing = completion._replace(filled=0) if completion.filled else completion
                self._over(piece, nothing, ends)
        if checks is None or not self._summing:
            return
        for op_id in checks.checksummer.reap():
            piece = pieces[op_id]
            self._count_summing(piece, -1)
            self._over(piece, _compared(piece, checks), ends)

    def _begin_summing(self, piece: Piece, checks: BlockChecks, moved: Completion) -> bool:
        """Sum the blocks of a piece that have arrived; return False if none is summed, or not yet.

        Blocks that go layer by layer are summed when the last piece of their transfer has arrived.
        """
        cursor, error = piece.cursor, moved.error
        if cursor.watch is None:
            arrived = error is None or (cursor.inbound and moved.filled)
            if checks.port_sums or not arrived:
                return False
        elif cursor.queued or cursor.pieces_in_flight > 1 or (error or cursor.error) is not None:
            return False
        if error is not None and cursor.queued:
            self._mailbox.lane(cursor).remove(cursor)
        piece.stage, piece.moved = Stage.SUMMING, moved
        self._count_summing(piece, 1)
        came = _came(piece)
        checks.checksummer.submit(moved.op_id, came.target_ids, urgent=True, group=came.group)
        return True

    def _count_summing(self, piece: Piece, sign: int) -> None:
        self._summing += sign
        if piece.cursor.inbound:
            self._summing_inbound_bytes += sign * piece.units * piece.cursor.unit_bytes

    def _over(self, piece: Piece, completion: Completion, ends: list[Completion]) -> None:
        """Record the end of a piece; after the last piece, report the end of its transfer."""
        op_id, error, filled = completion
        cursor, checks = piece.cursor, self._checks
        del self._pieces[op_id]
        self.in_flight_bytes[cursor.inbound] -= piece.units * cursor.unit_bytes
        cursor.pieces_in_flight -= 1
        if self.shares is not None and cursor.inbound:
            self.shares.over(cursor, piece.begin, piece.units)
        if error is not None:
            self._fail(cursor, error)
            cursor.fail_from(piece.begin + filled)
        elif cursor.watch is not None:
            begin, end = piece.begin, piece.begin + piece.units
            cursor.watch.moved(cursor.transfer.op_id, begin, end)
        elif piece.sums is not None and checks is not None and checks.kept is not None:
            checks.kept.sums[piece.transfer.target_ids] = piece.sums
        if cursor.pieces_in_flight or cursor.queued:
            return
        if error is None and op_id < PIECE_OP_IDS:  # it was one piece, so its end is the whole's
            self._mailbox.forget(cursor)
            ends.append(completion)
        else:
            self._end(cursor, ends)

    def _measure_piece(self, piece: Piece) -> None:
        cursor = piece.cursor
        nbytes = piece.units * cursor.unit_bytes
        for pace in self._paces.values():
            pace.moved(nbytes)
        self._paces[cursor.inbound].ended(nbytes, piece.moving_s, self._now_s())

    def _measure(self) -> None:
        """Adapt the paced windows to the disk."""
        now_s, mailbox = self._now_s(), self._mailbox
        for is_inbound, pace in self._paces.items():
            lane = mailbox.inbound if is_inbound else mailbox.outbound
            pace.turned(now_s, bool(lane) and (is_inbound or not mailbox.inbound))

    def _fail(self, cursor: Cursor, error: TransferError) -> None:
        """Record why a transfer fails: the first error, and every corrupt block."""
        before = cursor.error
        if before is None:
            cursor.error = error
            if cursor.queued:
                self._mailbox.lane(cursor).remove(cursor)
        elif isinstance(error, CorruptBlockError):
            if isinstance(before, CorruptBlockError):
                cursor.error = before.joined(error)
            elif isinstance(before, RecalledError):
                cursor.error = error

    def _end(self, cursor: Cursor, ends: list[Completion]) -> None:
        self._mailbox.forget(cursor)
        ends.append(Completion(cursor.transfer.op_id, cursor.error, cursor.filled))


def _came(piece: Piece) -> Transfer:
    """Return the part of a piece that its port has moved: all of it, or its leading blocks."""
    moved, transfer = piece.moved, piece.transfer
    assert moved is not None
    return transfer if moved.error is None else transfer.part(0, moved.filled)


def _compared(piece: Piece, checks: BlockChecks) -> Completion:
    """Return the end of a piece whose blocks were summed: at a wrong block, or as it was moved."""
    assert piece.moved is not None
    if checks.kept is None:
        return piece.moved
    compared = checks.kept.compared(_came(piece), checks.checksummer.sums)
    return piece.moved if compared.error is None else compared
