"""The port of the remote tier: transfers between the arena and objects of a store, by span.

    transfer ─▶ parts, one for each span ─▶ gets │ puts ─▶ tasks, a bounded number ─▶ completion
                                            (in order of arrival; one put at a time while gets wait)

Each part has a deadline, which every request that succeeds in the same direction puts off. So a
transfer of many parts over a slow way has the time that it needs. If none succeeds until the
deadline, all parts end, those that wait included: the port keeps no places of host memory for a
store that does not answer. A part under way ends after a few deadlines at the latest, whatever
others do, since it has a limited number of tries, and each try has its own limit of time. Only in a
directory whose file system hangs can it end later: a read may write to the arena until the kernel
ends it.

A get fills the blocks before the first one that did not arrive. What has not been asked for behind
such a gap is not asked for any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from flexkv.common.errors import (
    ClosedError,
    InvariantError,
    MissingBlockError,
    RecalledError,
    RemoteError,
    TransferError,
)
from flexkv.common.extents import check_ids
from flexkv.common.terms import BlockKey, Tier, Transfer
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.ports import Completion
from flexkv.io.remote.landing import buffers_of
from flexkv.io.remote.names import CurrentPool, Pool
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.reader import Brought, SpanReader, failed
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import seal
from flexkv.io.remote.spans import SpanPart, parts_of
from flexkv.io.remote.until import Until
from flexkv.process.spawning import Spawn

_OUTER_BLOCKS = 1 << 62
"""Ids at the other end mean nothing here: blocks are addressed by their keys."""


class SpanPool(CurrentPool, Protocol):
    """The pool in use, as the home of spans that are transferred."""

    @property
    def span_blocks(self) -> int:
        """Return how many blocks of the chain an object has."""
        ...

    @property
    def clears(self) -> int:
        """Return how often the pool was left for another; earlier transfers must not go on then."""
        ...

    @property
    def failure(self) -> RemoteError | None:
        """Return why there is no pool yet, if the store has failed."""
        ...


class SpanNews(NamedTuple):
    """Who is told what is in the store; called on the loop's thread with the key of a span."""

    noted: Callable[[BlockKey], None]
    """It is there: it was written or read."""
    missing: Callable[[BlockKey], None]
    """It is not there, or not any more."""


@dataclass(slots=True)
class _Job:
    """A transfer in flight.

    Attributes:
        submitted_s: when it came.
        clears: how often the pool had been left by then.
        ends: how each part that is over has ended.
        running: what stops each part that is under way.
        gap: the first part that did not arrive whole.
        is_stopped: whether nobody waits for it any more.
    """

    transfer: Transfer
    parts: list[SpanPart]
    submitted_s: float
    clears: int
    ends: dict[int, Brought] = field(default_factory=dict)
    running: dict[int, Until] = field(default_factory=dict)
    gap: int | None = None
    is_stopped: bool = False


class RemotePort:
    """A durable transfer port between the arena and a store.

    Attributes:
        requests: the store's requests, for whatever else asks it something.
        spawn: starts tasks; to be set before the first transfer.
    """

    def __init__(
        self,
        requests: Requests,
        pool: SpanPool,
        host: HostBlocks,
        options: RemoteOptions,
        news: SpanNews,
    ) -> None:
        """Start the copy threads.

        Args:
            requests: to the store, which the port closes.
            pool: names the objects; may change at any time.
            host: the blocks in host memory, and their sums; they must outlive the port.
            options: limits.
            news: who is told what is in the store.
        """
        self.requests = requests
        self.spawn: Spawn | None = None
        self.adapter, self.block_bytes = requests.store.kind, host.arena.block_stride_bytes
        self._pool, self._host, self._options, self._news = pool, host, options, news
        self._copier = Copier(options.copy_threads)
        self._landing = requests.store.landing(requests, host, self._copier)
        self._reader = SpanReader(pool.span_blocks, self._landing, host, requests)
        self._gets: deque[tuple[_Job, int]] = deque()
        self._puts: deque[tuple[_Job, int]] = deque()
        self._jobs: dict[int, _Job] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = {True: 0, False: 0}
        """Parts that are being read (True) and written (False)."""
        self._landing_parts = 0
        """Parts that have arrived, and are copied or summed."""
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] | None = None
        self._closed = False

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._wake = wake
        self._copier.connect()

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer; one to the store must be of whole spans.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, the id lists differ in length, the keys do not
                name the spans, or the port is not connected.
        """
        self._check_open()
        check_ids(transfer, self._host.arena.num_blocks, _OUTER_BLOCKS)
        if self.spawn is None or self._wake is None or transfer.op_id in self._jobs:
            raise InvariantError(f"transfer {transfer.op_id}: not connected, or in flight already")
        parts = parts_of(transfer, self._pool.span_blocks)
        is_inbound = transfer.route.target is Tier.HOST
        if not is_inbound and not all(part.is_whole for part in parts):
            raise InvariantError(f"transfer {transfer.op_id} {transfer.route} cuts a span")
        if not parts:
            self._ended.append(Completion(transfer.op_id, None))
            return
        now_s = asyncio.get_running_loop().time()
        job = self._jobs[transfer.op_id] = _Job(transfer, parts, now_s, self._pool.clears)
        waiting = self._gets if is_inbound else self._puts
        waiting.extend((job, number) for number in range(len(parts)))
        self._pump()

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    # -- parts ----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start parts while there is room: gets first, and one put at a time while gets wait."""
        gets_max = self.requests.gets.now
        while self._gets and self._running[True] < gets_max and self._landing_parts < gets_max:
            self._start(*self._gets.popleft())
        puts_max = 1 if self._gets else self.requests.puts.now
        while self._puts and self._running[False] < puts_max:
            self._start(*self._puts.popleft())

    def _start(self, job: _Job, number: int) -> None:
        if job.gap is not None and number > job.gap:
            self._end_part(job, number, Brought(0))
            return
        assert self.spawn is not None
        is_inbound = job.transfer.route.target is Tier.HOST
        self._running[is_inbound] += 1
        until = job.running[number] = self._until(job, is_inbound)
        work = self._work(job, number, until, is_inbound)
        self.spawn(f"remote {'get' if is_inbound else 'put'}", work)

    def _until(self, job: _Job, is_inbound: bool) -> Until:
        """Return the deadline of a part that starts now."""
        limit = self.requests.gets if is_inbound else self.requests.puts
        patience_s = self._options.deadline_s
        until = Until(job.submitted_s + patience_s, lambda: limit.moved_s + patience_s)
        until.since_s = asyncio.get_running_loop().time()
        if job.is_stopped:
            until.stop()
        return until

    async def _work(self, job: _Job, number: int, until: Until, is_inbound: bool) -> None:
        """Move one part, in a task of its own."""
        if self._closed:
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        part, pool, has_arrived = job.parts[number], None, False

        def arrived() -> None:
            nonlocal has_arrived
            has_arrived = True
            until.since_s = asyncio.get_running_loop().time()
            self._running[True] -= 1
            self._landing_parts += 1
            self._pump()  # the next part is asked for while this one is copied

        try:
            pool = await until.wait(self._pool.joined())
            if self._pool.clears != job.clears:
                end = failed(_recalled(job.transfer))
            elif is_inbound:
                end = await self._reader.read(pool, part, until, arrived)
            else:
                end = await self._write(pool, part, until)
        except TimeoutError:
            reason = self._pool.failure
            why = f"its pool could not be joined in time{f': {reason.why}' if reason else ''}"
            end = failed(RemoteError(self.requests.store.where, "transfer", why))
        finally:
            self._tasks.discard(task)
            if has_arrived:
                self._landing_parts -= 1
            else:
                self._running[is_inbound] -= 1
            del job.running[number]
        if pool is self._pool.current:  # otherwise its objects are not in use any more
            self._tell(part.span_key, end)
        self._end_part(job, number, end)
        self._pump()

    async def _write(self, pool: Pool, part: SpanPart, until: Until) -> Brought:
        """Store a span; one that is there already counts as stored."""
        block_bytes = self._host.block_bytes[part.group]
        sums = self._host.sums[part.host_ids].tolist()
        seals = [seal(name, block_bytes, its) for name, its in zip(part.names, sums, strict=True)]
        buffers = buffers_of(part, self._host, seals)
        try:
            await self.requests.put(pool.object_name(part.span_key), buffers, until)
        except RemoteError as error:
            return failed(error)
        return Brought(part.blocks)

    def _tell(self, span_key: BlockKey, end: Brought) -> None:
        if end.error is None:
            self._news.noted(span_key)
        elif end.is_deleted or isinstance(end.error, FileNotFoundError):
            self._news.missing(span_key)
            if not end.is_deleted:
                self.requests.counting.other["missing"] += 1

    # -- ends -----------------------------------------------------------------------------------

    def _end_part(self, job: _Job, number: int, end: Brought) -> None:
        """Record the end of a part; after the last one, report that of the transfer."""
        job.ends[number] = end
        if end.filled < job.parts[number].blocks and (job.gap is None or number < job.gap):
            job.gap = number
            for later, until in job.running.items():
                if later > number:
                    until.stop()
        if len(job.ends) < len(job.parts):
            return
        del self._jobs[job.transfer.op_id]
        self._ended.append(_completion(job))
        assert self._wake is not None
        self._wake()

    def stop(self) -> None:
        """End all transfers soon, as if their deadline had come: nobody waits for them any more."""
        for job in self._jobs.values():
            job.is_stopped = True
            for until in job.running.values():
                until.stop()

    def waiting_since_s(self, op_id: int) -> float:
        """Return since when a transfer has waited for the store without any progress."""
        job = self._jobs.get(op_id)
        if job is None:
            return asyncio.get_running_loop().time()
        since_s = [until.since_s for until in job.running.values()]
        if len(job.ends) + len(job.running) < len(job.parts):
            is_inbound = job.transfer.route.target is Tier.HOST
            limit = self.requests.gets if is_inbound else self.requests.puts
            since_s.append(max(job.submitted_s, limit.moved_s))
        return min(since_s)

    async def sync(self) -> None:
        """Return at once: a store reports a put when the object is on stable storage.

        Raises:
            ClosedError: after `close`.
        """
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the remote port to {self.requests.store.where} is closed")

    def close(self) -> None:
        """End everything; nothing writes to the arena any more. Idempotent.

        Raises:
            InvariantError: transfers were in flight, or ended without being reaped.
        """
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self.requests.store.close()
        self._copier.close()
        self._landing.close()
        if unreaped := len(self._jobs) + len(self._ended):
            raise InvariantError(f"remote port closed with {unreaped} transfers unreaped")


def _recalled(transfer: Transfer) -> RecalledError:
    why = "the cache was cleared meanwhile"
    return RecalledError(transfer.op_id, str(transfer.route), transfer.block_count, why)


def _completion(job: _Job) -> Completion:
    """Return the end of a transfer whose parts have ended."""
    transfer, gap = job.transfer, job.gap
    if gap is None:
        return Completion(transfer.op_id, None)
    end = job.ends[gap]
    filled = job.parts[gap].begin + end.filled
    return Completion(transfer.op_id, _error_of(transfer, filled, end.error), filled)


def _error_of(
    transfer: Transfer, filled: int, error: TransferError | FileNotFoundError | None
) -> TransferError:
    """Return why a transfer ended after `filled` blocks."""
    assert error is not None
    if isinstance(error, TransferError):
        return error
    left = transfer.block_count - filled
    return MissingBlockError(transfer.op_id, str(transfer.route), left, str(error))
