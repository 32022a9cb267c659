"""Blocks of other nodes by Mooncake's TransferEngine, through a mover. (ADR 17 and ADR 18)

    holder's engine ──▶ a slot of the window ──copy threads: copy and sum──▶ arena
                                                    sums ══ the sums that came with the grant

A read is one batch, with a slot of its own. A batch that fails may go on writing, so its slot is
never used again in this life of the mover. Mooncake is given the window, and never the arena.

An engine that has failed is not used for a while; the pauses grow until it sends something again.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv._ext import PageMap
from flexkv.common.errors import CorruptBlockError, PeerError, RemoteError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.fence import Fence
from flexkv.io.peer.transport import Fetched, Part, Places
from flexkv.mover.life import MoverLife
from flexkv.mover.mover import Mover
from flexkv.mover.window import Slot, granted
from flexkv.mover.wire import Done, Read
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

READS_AT_ONCE = 2
"""Reads of one holder that the mover has at once: one runs, and the next can begin at once."""
PAUSE_S, PAUSE_MAX_S = 5.0, 300.0
"""The first and the longest pause before an engine that has failed is tried again."""


class MooncakeCounts(msgspec.Struct, frozen=True):
    """What was read by Mooncake.

    Attributes:
        endpoint: where other nodes reach this node's engine; empty while it does not run.
        lives: how often its mover was started.
        reads: how many reads its engine was asked for.
        blocks: how many blocks arrived with the right checksums.
        failed: how many reads have failed, or brought other bytes.
        fallbacks: how many reads were made over connections of our own instead: those that failed,
            and those of a node whose engine does not run, or is left out since it has failed.
        spoiled: slots of the window that are not used again in this life, since Mooncake may still
            write to them.
        spoiled_bytes: how many bytes these have.
    """

    endpoint: str
    lives: int
    reads: int
    blocks: int
    failed: int
    fallbacks: int
    spoiled: int
    spoiled_bytes: int


class _Failing(NamedTuple):
    """An engine that has failed: how often in turn, and when it is tried again."""

    failures: int
    until_s: float


class MooncakeTransport:
    """A transport by Mooncake; the end of the mover is its fence."""

    name = "mooncake"

    def __init__(self, mover: Mover, host: HostBlocks, copier: Copier, stall_s: float) -> None:
        """Read from nobody yet.

        Args:
            mover: runs the engine; closed with this.
            host: the blocks in host memory.
            copier: the threads that copy and sum; whoever made it closes it, after this.
            stall_s: how long a read may take.
        """
        self._mover, self._host, self._copier, self._stall_s = mover, host, copier, stall_s
        self._turns: dict[int, asyncio.Semaphore] = {}
        self._failing: dict[int, _Failing] = {}
        self._waiting: dict[Future[Any], int] = {}
        """What reads wait for, with their holders."""
        self._reads = self._blocks = self._failed = 0

    @property
    def counts(self) -> MooncakeCounts:
        """Return what was read; nothing falls back to another transport here."""
        life, mover = self._mover.ready, self._mover
        spoiled = 0 if life is None else life.spoiled
        return MooncakeCounts(
            endpoint="" if life is None or life.ready is None else life.ready.endpoint,
            lives=mover.lives,
            reads=self._reads,
            blocks=self._blocks,
            failed=self._failed,
            fallbacks=0,
            spoiled=spoiled,
            spoiled_bytes=spoiled * mover.sizes.slot_bytes,
        )

    def places(self, addresses: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]] | None:
        """Return where others find our blocks: the endpoint, and addresses in its memory.

        Args:
            addresses: offsets in the memory that is lent; negative ones stand for no block.

        Returns:
            None while the engine does not run.
        """
        life = self._mover.ready
        if life is None or life.ready is None:
            return None
        ready = life.ready
        return ready.endpoint, np.where(addresses < 0, -1, addresses + ready.address)

    def connect(self) -> None:
        """Do nothing: the mover is started by its keeper."""

    def wants_places(self, holder: int) -> bool:
        """Return whether it can read from a holder now, as far as it is known."""
        return self._mover.ready is not None and not self._is_failing(holder)

    def _is_failing(self, holder: int) -> bool:
        failing = self._failing.get(holder)
        return failing is not None and asyncio.get_running_loop().time() < failing.until_s

    async def fetch(self, part: Part) -> Fetched:
        """Read blocks into host blocks; see `Transport`."""
        places = part.places
        if places is None:
            why = "its engine does not run, or ours does not"
            return Fetched(0, PeerError(str(part.holder), "reading blocks by Mooncake", why))
        if (places.addresses < 0).any():
            return Fetched(0, _error(places, "a block is not in the grant"))
        try:
            async with self._turns.setdefault(part.holder, asyncio.Semaphore(READS_AT_ONCE)):
                if why := self._why_not(part.holder, places):
                    return Fetched(0, _error(places, why))
                slot = await self._read(part.holder, places, self._host.block_bytes[part.group])
        except RemoteError as error:  # our engine, or its end
            return Fetched(0, _error(places, error.why))
        except PeerError as error:
            self._fails(part.holder, places, error.why)
            return Fetched(0, error)
        self._failing.pop(part.holder, None)
        try:
            return await self._copied(part, places, slot)
        finally:
            slot.free()

    def _why_not(self, holder: int, places: Places) -> str:
        """Return why an engine is not read from now; empty if it is."""
        if asyncio.get_running_loop().time() >= places.until_s:
            return "the grant may be over"
        return "its engine has failed a moment ago" if self._is_failing(holder) else ""

    async def _read(self, holder: int, places: Places, block_bytes: int) -> Slot:
        """Return a slot of the window that has the blocks.

        Raises:
            RemoteError: the mover is not there, or the read was stopped.
            PeerError: the holder's engine did not send them.
        """
        life = self._mover.ready
        if life is None:
            raise RemoteError(self._mover.where, "read", "its mover is not there")
        try:
            async with asyncio.timeout(self._stall_s):
                with self._stoppable(holder, life.take()) as taken:
                    slot = await granted(taken)
                await self._filled(holder, life, slot, places, block_bytes)
        except TimeoutError:
            raise _error(places, f"no answer in {self._stall_s:g} s") from None
        return slot

    async def _filled(
        self, holder: int, life: MoverLife, slot: Slot, places: Places, block_bytes: int
    ) -> None:
        """Have a slot filled. It is ours only if this returns.

        Raises:
            RemoteError: the mover has ended, or the read was stopped.
            PeerError: the transfer failed.
        """
        asked = partial(Read, endpoint=places.endpoint, addresses=places.addresses.tolist(),
                        at=slot.at, block_bytes=block_bytes)  # fmt: skip
        self._reads += 1
        with self._stoppable(holder, life.ask(asked, slot)) as reply:
            try:
                done = await reply
            except asyncio.CancelledError:
                # An answer that came just before the cancellation has left the slot to us.
                if reply.done() and not reply.cancelled() and not reply.exception():
                    slot.free()
                raise
        assert isinstance(done, Done)
        if done.code:
            raise _error(places, "the transfer failed")

    @contextmanager
    def _stoppable(self, holder: int, future: Future[T]) -> Iterator[Future[T]]:
        """Let `stop` end the wait for a future."""
        self._waiting[future] = holder
        try:
            yield future
        finally:
            del self._waiting[future]

    async def _copied(self, part: Part, places: Places, slot: Slot) -> Fetched:
        """Copy what has arrived to host memory, and compare its sums with the promised ones."""
        host, ids, copying = self._host, part.host_ids, Fence()
        size = host.block_bytes[part.group]
        body = slot.body(0, len(ids) * size)
        row = [body.__array_interface__["data"][0], size, size, 0]
        stride = host.arena.block_stride_bytes
        pages = PageMap(
            np.array([row], np.int64), len(ids), host.buffer, stride, body, host.sums, True
        )
        copying.begin()
        self._copier.start_copy(pages, ids, copying.end)
        await copying.passed()
        right = host.sums[ids] == places.sums
        filled = len(ids) if right.all() else int(right.argmin())
        self._blocks += filled
        if filled == len(ids):
            return Fetched(filled, None)
        self._fails(part.holder, places, "blocks have other checksums than it said")
        wrong = ids[~right].tolist()
        return Fetched(filled, CorruptBlockError(f"peer {places.endpoint}", 0, wrong))

    def _fails(self, holder: int, places: Places, why: str) -> None:
        """Leave a holder's engine out for a while."""
        self._failed += 1
        failures = self._failing[holder].failures if holder in self._failing else 0
        pause_s = min(PAUSE_MAX_S, PAUSE_S * 2 ** min(failures, 16))
        until_s = asyncio.get_running_loop().time() + pause_s
        self._failing[holder] = _Failing(failures + 1, until_s)
        log.warning("mooncake_read_failed", endpoint=places.endpoint, reason=why, pause_s=pause_s)

    def stop(self, holder: int | None = None) -> None:
        """Make what is being read from a holder, or from all, fail at once."""
        for future, each in list(self._waiting.items()):
            if holder in (None, each) and not future.done():
                future.set_exception(RemoteError(self._mover.where, "read", "it was stopped"))

    async def forget(self, holder: int) -> None:
        """Drop what is known of a holder."""
        self._turns.pop(holder, None)
        self._failing.pop(holder, None)

    def close(self) -> None:
        """End the mover. Idempotent."""
        self._mover.close()


def _error(places: Places, why: str) -> PeerError:
    return PeerError(places.endpoint, "reading blocks by Mooncake", why)
