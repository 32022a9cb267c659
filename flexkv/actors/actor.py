"""Transfer actors: one per device or tier. Each is a task that turns a mailbox into I/O.

    scheduler ──post──▶ mailbox ──pieces──▶ port ──wake──▶ reap ──report──▶ scheduler
                        (turns)   (window)

One class serves every device and tier; only the port and the windows differ. A window bounds the
bytes in flight in one direction. All work of a turn is synchronous; the task only waits for its
bell, which a post or the port's wake rings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from flexkv.actors.mailbox import Cursor, Lane, Mailbox
from flexkv.actors.pace import Pace
from flexkv.common.errors import (
    CorruptBlockError,
    InternalError,
    RecalledError,
    TransferError,
)
from flexkv.common.terms import Tier, Transfer
from flexkv.io.ports import Completion, TransferPort
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")


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


class Bell:
    """A signal for which one task waits; a ring while it does not wait is kept."""

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiter, now or when it next waits."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return once the bell has rung since the last wait."""
        if not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False


class TransferActor:
    """Runs the transfers of one device or tier through its port."""

    def __init__(
        self,
        tier: Tier,
        port: TransferPort,
        inbound: Window,
        outbound: Window,
        transfers_max: int,
    ) -> None:
        self.tier = tier
        self.name = tier.label
        self.in_flight_bytes = {True: 0, False: 0}
        self._port = port
        self._windows = {True: inbound, False: outbound}
        self._paces = {
            is_inbound: Pace(window.bytes_max, window.piece_bytes_max, port.block_bytes)
            for is_inbound, window in self._windows.items()
            if window.is_paced
        }
        self._mailbox = Mailbox(transfers_max, port.block_bytes)
        self._pieces: dict[int, tuple[Cursor, int, int, float]] = {}
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
        """Check the queue again, because a watch may let more of a transfer go."""
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

    def oldest_s(self) -> float:
        """Return for how many seconds the oldest piece has been in flight; 0 if there is none."""
        for *_, begin_s in self._pieces.values():
            return self._now_s() - begin_s
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
        """Release the port."""
        self._port.close()

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
        """Submit pieces while the window has room; return whether any was submitted."""
        pieces, submit, begun_s = self._pieces, self._port.submit, self._begun_s
        window = self._paces.get(inbound) or self._windows[inbound]
        limit, piece_bytes_max = window.bytes_max, window.piece_bytes_max
        in_flight, submitted, now_s = self.in_flight_bytes[inbound], 0, self._now_s()
        # Discount at most one window, so that slow checksumming cannot pile up bytes.
        arrived = min(self._port.arrived_bytes, limit) if inbound else 0
        while submitted != pieces_max:
            # Whatever its size, one piece may always be in flight.
            busy = in_flight - arrived
            taken = lane.take(piece_bytes_max, limit - busy if busy else ANY_BYTES)
            if taken is None:
                break
            cursor, begin, units = taken
            in_flight += units * cursor.unit_bytes
            self.in_flight_bytes[inbound] = in_flight
            piece = cursor.transfer
            if begun_s is not None and not begin:
                begun_s[piece.op_id] = now_s
            if units != cursor.units or cursor.watch is not None:
                piece = self._piece(cursor, begin, units)
            pieces[piece.op_id] = (cursor, begin, units, now_s)
            submit(piece)
            submitted += 1
        return submitted > 0

    def _piece(self, cursor: Cursor, begin: int, units: int) -> Transfer:
        """Return a part of a transfer as a transfer of its own."""
        self._next_piece += 1
        whole, op_id = cursor.transfer, self._next_piece
        if whole.watch is not None:
            layers = cursor.layers(begin, units)
            return msgspec.structs.replace(whole, op_id=op_id, layers=layers)
        return msgspec.structs.replace(whole.part(begin, begin + units), op_id=op_id)

    def _reap(self, ends: list[Completion]) -> None:
        pieces, in_flight = self._pieces, self.in_flight_bytes
        for completion in self._port.reap():
            op_id, error, filled = completion
            cursor, begin, units, begin_s = pieces.pop(op_id)
            nbytes = units * cursor.unit_bytes
            in_flight[cursor.inbound] -= nbytes
            if self._paces and error is None:
                self._measure_piece(cursor.inbound, nbytes, begin_s)
            cursor.pieces_in_flight -= 1
            if cursor.watch is not None and error is None:
                cursor.watch.moved(cursor.transfer.op_id, begin, begin + units)
            if error is not None:
                self._fail(cursor, error)
                cursor.fail_from(begin + filled)
            if cursor.pieces_in_flight or cursor.queued:
                continue
            if op_id < PIECE_OP_IDS:  # it was one piece, so the port's completion is its end
                self._mailbox.forget(cursor)
                ends.append(completion)
            else:
                self._end(cursor, ends)

    def _measure_piece(self, inbound: bool, nbytes: int, begin_s: float) -> None:
        for pace in self._paces.values():
            pace.moved(nbytes)
        self._paces[inbound].ended(nbytes, begin_s, self._now_s())

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


class Supervisor:
    """The root task of an engine and the group of its other tasks, which are all started here.

    A task that raises is a bug of ours: it is logged, the group ends, and `on_failure` is called,
    so that nobody waits for an answer that cannot come. A session, which serves one peer and holds
    no state of the engine, ends alone.
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._stop = asyncio.Event()
        self._started = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._root: asyncio.Task[None] | None = None
        self._permanent: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the root task."""
        self._root = asyncio.get_running_loop().create_task(self._main(), name="flexkv")
        await self._started.wait()

    def spawn(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends by itself; one that raises ends the engine."""
        return cast("asyncio.Task[T]", self._spawn(name, work, is_session=False))

    def spawn_session(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that serves one peer; what it raises is logged, and ends only this task.

        An InternalError ends the engine all the same: it means that the engine's own state is
        wrong, and not what the peer has sent.
        """
        return self._spawn(name, work, is_session=True)

    def _spawn(
        self, name: str, work: Coroutine[Any, Any, T], is_session: bool
    ) -> asyncio.Task[T | None]:
        reporting = self._reporting(name, work, is_session)
        task = self._group.create_task(reporting, name=f"flexkv {name}")
        # A task that is cancelled before its first step never awaits its work.
        task.add_done_callback(lambda _: work.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that runs until `stop`."""
        self._permanent.append(self.spawn(name, work))

    async def stop(self) -> None:
        """Cancel the permanent tasks and return once every task is over."""
        self._stop.set()
        if self._root is not None:
            await asyncio.wait([self._root])

    def abandon(self) -> None:
        """Cancel every task, without waiting for its end: the loop may no longer run.

        No task takes another step, not even one that has been woken already.
        """
        for task in (*self._tasks, self._root):
            if task is not None:
                task.cancel()

    async def _main(self) -> None:
        try:
            async with self._group:
                self._started.set()
                await self._stop.wait()
                for task in self._permanent:
                    task.cancel()
        except BaseExceptionGroup as failures:
            self._on_failure(failures.exceptions[0])

    async def _reporting(
        self, name: str, work: Coroutine[Any, Any, T], is_session: bool
    ) -> T | None:
        """Run a task, and report at once what it raises, since others may wait for its work."""
        try:
            return await work
        except Exception as error:
            log.exception("task_failed", task=name)
            if is_session and not isinstance(error, InternalError):
                return None
            self._on_failure(error)
            raise


def spawn_on(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T],
    ended: Callable[[asyncio.Task[T]], None],
) -> asyncio.Task[T]:
    """Start a task for a caller in another thread; `ended` is called once, when it is over."""
    task = loop.create_task(work, name="flexkv call")
    task.add_done_callback(ended)
    return task
