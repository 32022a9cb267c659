"""Fakes of the ports, trusted because they pass the contract tests of the real adapters."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from errno import EIO
from random import Random

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ClosedError, InvariantError, StorageError, TransferError
from flexkv.common.extents import check_ids
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.ports import Completion, Sums
from flexkv.testing.faults import FaultPlan

SECTOR_BYTES = 4
"""What a fake disk writes atomically: less than a block of a simulation."""


@dataclass(slots=True)
class _Job:
    """A transfer in flight, with its remaining copies and the time of each."""

    transfer: Transfer
    error: TransferError | None
    copies: deque[tuple[float, BlockIds]]
    end_s: float
    timer: asyncio.TimerHandle | None = None


class FakePort:
    """A durable transfer port between two arrays, with the delays and failures of a fault plan.

    The bytes move while the transfer is in flight, not at its start or end: some blocks at one
    random moment and the rest at a later one, in random order. So wrong bytes show when a buffer
    is used before its completion is reaped. A transfer that fails moves only the first part.
    """

    adapter = "FakePort"

    def __init__(
        self,
        store: NDArray[np.uint8],
        host: NDArray[np.uint8],
        faults: FaultPlan,
        block_bytes: int,
        sums: NDArray[np.uint64] | None = None,
    ) -> None:
        """Move `block_bytes` of each row between `store` and `host`, both uint8[blocks, bytes].

        In writes to the DISK tier, bits flip by the fault plan. `sums`, uint64[host blocks], gets
        the checksum of each host block that is filled whole. `on_io` is called before each step.
        """
        assert store.shape[1] >= block_bytes, (store.shape, block_bytes)
        assert host.shape[1] >= block_bytes, (host.shape, block_bytes)
        self._store = store
        self._host = host
        self._faults = faults
        self.block_bytes = block_bytes
        self.on_io: Callable[[], None] = lambda: None
        self.failure: TransferError | None = None
        self.awake = True
        self.touched: list[int] = []
        """Places of the store in the order in which writes to them began."""
        self._ended_at: dict[int, int] = {}
        """The `_clock` at the end of each block's last write; a block being written is absent."""
        self._clock = self._synced_at = 0
        self._durable = store.copy()
        self._lost = np.zeros(len(store), np.bool_)
        """Rows that a failed sync has lost; only a new write and a sync make them durable."""
        self._syncs = self._synced = 0
        self._sums = sums
        self._jobs: dict[int, _Job] = {}
        self._ended: list[Completion] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[], None] | None = None
        self._closed = False

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks of the store."""
        return len(self._store)

    @property
    def in_flight(self) -> int:
        """Return the number of transfers that have not ended."""
        return len(self._jobs)

    def order_after(self, to_device: bool) -> None:
        """Do nothing: there is no stream whose writes could be pending."""

    def suspend(self) -> None:
        """Refuse transfers until `resume`."""
        assert not self._jobs, "suspended with transfers in flight"
        self.awake = False

    def resume(self, layouts: object, owner: object) -> None:
        """Accept transfers again."""
        self.awake = True

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop, whose clock the delays follow."""
        self._loop = asyncio.get_running_loop()
        self._wake = wake

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer; the fault plan decides when and how it ends.

        Raises:
            ClosedError: after `close`, or while suspended.
            InvariantError: before `connect`, for ids that are out of range or of unequal length,
                or for an op that is in flight.
        """
        if self._closed or not self.awake:
            raise ClosedError("the fake port is closed, or suspended")
        loop, faults = self._loop, self._faults
        if loop is None or transfer.op_id in self._jobs:
            raise InvariantError(f"transfer {transfer.op_id}: not connected, or in flight already")
        to_host = transfer.route.target is Tier.HOST
        check_ids(transfer, len(self._host), len(self._store))

        error: TransferError | None = None
        if faults.fails():
            why = f"injected by {faults!r}"
            error = TransferError(transfer.op_id, str(transfer.route), transfer.block_count, why)
        order = np.array(faults.order(transfer.block_count), dtype=np.int64)
        first, rest = np.split(order, [faults.cut(len(order))])
        start_s, delay_s = loop.time(), faults.delay_s()
        early_s, late_s = sorted((faults.moment_s(delay_s), faults.moment_s(delay_s)))
        copies = deque([(start_s + early_s, first)])
        if error is None:
            copies.append((start_s + late_s, rest))
        if not to_host:
            self.touched += transfer.target_ids.tolist()
            for block_id in transfer.target_ids.tolist():
                self._ended_at.pop(block_id, None)
        job = self._jobs[transfer.op_id] = _Job(transfer, error, copies, start_s + delay_s)
        self._await_next(loop, job)

    def _await_next(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        """Set the timer of a job's next step: one at a time, since equal times have no order."""
        when_s = job.copies[0][0] if job.copies else job.end_s
        job.timer = loop.call_at(when_s, self._step, loop, job)

    def _step(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        """Make the next copy of a job, or end the job after the last."""
        if job.copies:
            self._copy(job.transfer, job.copies.popleft()[1])
            self._await_next(loop, job)
        else:
            self._end(job)

    def _copy(self, transfer: Transfer, which: BlockIds) -> None:
        """Copy the blocks at the positions `which` of a transfer."""
        self.on_io()
        to_host = transfer.route.target is Tier.HOST
        source, target = (self._store, self._host) if to_host else (self._host, self._store)
        layers, size = transfer.layers, self.block_bytes
        span = slice(size)
        if layers is not None and transfer.watch is not None:
            of = transfer.watch.num_layers
            span = slice(size * layers.first // of, size * layers.last // of)
        target[transfer.target_ids[which], span] = source[transfer.source_ids[which], span]
        if not to_host:
            self._lost[transfer.target_ids[which]] = False
        if to_host and self._sums is not None and layers is None:
            host_ids = transfer.target_ids[which]
            self._sums[host_ids] = sums_of(self._host[host_ids])
        if transfer.route.target is Tier.DISK:
            for block_id in transfer.target_ids[which].tolist():
                if self._faults.flips():
                    bit = self._faults.bit(8 * self.block_bytes)
                    self._store[block_id, bit // 8] ^= 1 << bit % 8

    def _end(self, job: _Job) -> None:
        """End a job, and report its completion."""
        del self._jobs[job.transfer.op_id]
        self._clock += 1
        if job.transfer.route.target is not Tier.HOST:
            for block_id in job.transfer.target_ids.tolist():
                self._ended_at[block_id] = self._clock
        self._ended.append(Completion(job.transfer.op_id, job.error))
        assert self._wake is not None
        self._wake()

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    async def sync(self) -> None:
        """Make completed writes durable after a delay; a failed sync loses what was not durable.

        Raises:
            StorageError: the fault plan makes the sync fail.
        """
        self._syncs += 1
        number, content, kept = self._syncs, self._store.copy(), ~self._lost
        begun_at = self._clock
        # Sleeping is the work of a fake disk; on a virtual clock it takes no time.
        await asyncio.sleep(self._faults.delay_s())
        self.on_io()
        if self._faults.fails():
            self._lost |= (self._store != self._durable).any(axis=1)
            raise StorageError("fake", 0, EIO)
        if number > self._synced:
            self._synced = number
            self._durable[kept] = content[kept]
            self._synced_at = begun_at

    def is_synced(self, block_id: int) -> bool:
        """Return whether a block was written before the last successful sync and not after it."""
        return self._ended_at.get(block_id, self._clock + 1) <= self._synced_at

    def remains(self, random: Random, power_loss: bool) -> NDArray[np.uint8]:
        """Return what a crash at this moment leaves of the store, uint8[blocks, bytes].

        Of a block that is being written, any part may have arrived. After a loss of power, each
        sector that was written since the last sync is the old or the new one.
        """
        left = self._store.copy()
        for job in self._jobs.values():
            if job.transfer.route.target is not Tier.HOST:
                for block in np.concatenate([[], *(which for _, which in job.copies)]):
                    place = int(job.transfer.target_ids[int(block)])
                    source = self._host[int(job.transfer.source_ids[int(block)])]
                    written = random.choice([0, self.block_bytes, random.randint(0, source.size)])
                    left[place, :written] = source[:written]
        if power_loss:
            sectors = np.array([random.random() < 0.5 for _ in range(left.size // SECTOR_BYTES)])
            old = np.repeat(sectors, SECTOR_BYTES).reshape(left.shape)
            left[old] = self._durable[old]
        return left

    def close(self) -> None:
        """Stop every timer. Idempotent.

        Raises:
            InvariantError: transfers were in flight, or ended without being reaped.
        """
        if self._closed:
            return
        self._closed = True
        for job in self._jobs.values():
            if job.timer is not None:
                job.timer.cancel()
        if unreaped := len(self._jobs) + len(self._ended):
            raise InvariantError(f"fake port closed with {unreaped} transfers unreaped")


def sums_of(blocks: NDArray[np.uint8]) -> list[int]:
    """Return a checksum of each row of uint8[n, bytes], by another function than the real one."""
    return [zlib.crc32(block.tobytes()) for block in blocks]


class FakeChecksummer:
    """A checksummer of an array's blocks with a delay, during which their sums are wrong."""

    def __init__(
        self, host: NDArray[np.uint8], faults: FaultPlan, sums: Sums | None = None
    ) -> None:
        """Sum rows of `host`, uint8[blocks, bytes], with the delays of a fault plan.

        `sums` is the array of another checksummer, if both are to share it.
        """
        self._faults = faults
        self.sums: Sums = np.zeros(len(host), np.uint64) if sums is None else sums
        self._host = host
        self._ended: list[int] = []
        self._wake: Callable[[], None] | None = None

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._wake = wake

    def submit(self, op_id: int, host_ids: BlockIds, urgent: bool, group: int = 0) -> None:
        """Start to write the checksums of host blocks, of their whole places, to `sums`."""
        self.sums[host_ids] = 0
        loop = asyncio.get_running_loop()
        loop.call_later(self._faults.delay_s(), self._end, op_id, host_ids)

    def _end(self, op_id: int, host_ids: BlockIds) -> None:
        self.sums[host_ids] = sums_of(self._host[host_ids])
        self._ended.append(op_id)
        assert self._wake is not None
        self._wake()

    def reap(self) -> list[int]:
        """Return the ids of the ops that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
