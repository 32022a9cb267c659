"""The port of the peers' tier: it reads blocks of other nodes into host memory.

    transfer ─▶ runs, one for each holder in turn ─▶ want ─▶ grant ─▶ parts by the transport ─▶ sums
                                                      the holder keeps the blocks in place ────┘

A transfer fills the blocks before the first one that did not arrive, or has another checksum than
its owner said. Every end is definite: when a transfer is over, nothing of it is written any more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from flexkv.common.errors import (
    ClosedError,
    InvariantError,
    MissingBlockError,
    PeerError,
    TransferError,
)
from flexkv.common.extents import check_ids
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier, Transfer
from flexkv.index.hints import HOLDERS_MAX, holders_of
from flexkv.index.keys import chain_keys_of
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.frames import BLOCKS_MAX
from flexkv.io.peer.transport import Fetched, Part, Places, Transport
from flexkv.io.ports import Completion
from flexkv.process.spawning import Spawn

_OUTER_BLOCKS = 2 * HOLDERS_MAX
"""Ids at the other end are holders, twice as many for blocks on a holder's disk."""
READ_BYTES = 8 << 20
"""About how much is read at once."""
BUSY_S = 0.05
"""When to ask a busy holder again."""


class Wish(NamedTuple):
    """Blocks of a prompt that are wanted of a holder.

    Attributes:
        keys: the root and the keys of the prompt's blocks, up to the last that is wanted.
        first: the position of the first block, or of the first leaf's parent.
        last: the position where they end, exclusive.
        group: the KV group.
        with_places: whether to say where the blocks are, for another transport than TCP.
    """

    keys: bytes
    first: int
    last: int
    group: int
    with_places: bool = False


class Allowed(NamedTuple):
    """What a holder lets us read.

    Attributes:
        number: of the grant.
        positions: how many positions, from the first one on.
        is_cut: whether a limit made it shorter; otherwise the holder does not have what follows.
        places: where the blocks are; None if the holder does not say.
    """

    number: int
    positions: int
    is_cut: bool
    places: Places | None = None


class PeerReads(msgspec.Struct, frozen=True):
    """What was read of one node.

    Attributes:
        blocks: how many blocks arrived, with the right checksums.
        bytes: of these.
        failed: how many reads have failed.
        busy: how often the node was too busy to lend what was wanted.
        missing: how often it no longer had what it was said to have.
        wrong: how often a block had another checksum.
    """

    blocks: int = 0
    bytes: int = 0
    failed: int = 0
    busy: int = 0
    missing: int = 0
    wrong: int = 0


class Holders(Protocol):
    """The nodes from which blocks are read, by the numbers that hints have for them."""

    def begin(self, holder: int, request: int) -> None:
        """Take note that a request reads from a holder.

        Raises:
            PeerError: the holder has failed, and is not asked by this request.
        """
        ...

    async def want(self, holder: int, wish: Wish) -> Allowed:
        """Ask a holder to keep blocks in place until `release`.

        Raises:
            PeerError: it refuses, is busy, does not answer in time, or is gone.
        """
        ...

    def release(self, holder: int, number: int) -> None:
        """End a grant."""
        ...

    def blame(self, holder: int, error: PeerError) -> None:
        """Take note that a holder did not lend or send anything, though it was asked."""
        ...

    def arrived(self, holder: int) -> None:
        """Take note that a holder has sent blocks."""
        ...


class _Run(NamedTuple):
    """Consecutive blocks of a transfer that are read from one holder."""

    holder: int
    wish: Wish
    host_ids: BlockIds
    ratio: int

    def behind(self, blocks: int) -> _Run:
        """Return the rest of it behind some blocks."""
        first = self.wish.first + blocks * self.ratio
        return self._replace(wish=self.wish._replace(first=first), host_ids=self.host_ids[blocks:])


class PeerPort:
    """A transfer port between the arena and the memory of other nodes; it only reads.

    Attributes:
        spawn: starts tasks; to be set before the first transfer.
        counts: what was read of each holder, by the names of the fields of `PeerReads`.
    """

    def __init__(
        self,
        transport: Transport,
        copier: Copier,
        holders: Holders,
        host: HostBlocks,
        ratios: Sequence[int],
        patience_s: float,
    ) -> None:
        """Read nothing yet.

        Args:
            transport: moves the blocks; the port closes it.
            copier: the threads that it uses; the port closes them, too.
            holders: whom to ask.
            host: the blocks in host memory, and their sums; they must outlive the port.
            ratios: for each KV group, how many blocks of the chain one of its blocks covers.
            patience_s: how long a holder is asked that lends nothing, since it is busy or does not
                answer.
        """
        self.spawn: Spawn | None = None
        self.block_bytes = host.arena.block_stride_bytes
        self.adapter = transport.name
        self._transport, self._copier = transport, copier
        self._holders, self._host = holders, host
        self._ratios, self._patience_s = ratios, patience_s
        self.counts: dict[int, Counter[str]] = {}
        self._in_flight: dict[int, int] = {}
        """The transfers under way, and how many clears there had been when each began."""
        self._clears = 0
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] | None = None
        self._is_stopped = self._closed = False

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._wake = wake
        self._transport.connect()
        self._copier.connect()

    def submit(self, transfer: Transfer) -> None:
        """Start to read the blocks of one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, the id lists differ in length, the blocks have no
                keys, or the port is not connected.
        """
        self._check_open()
        check_ids(transfer, self._host.arena.num_blocks, _OUTER_BLOCKS)
        if self.spawn is None or self._wake is None or transfer.op_id in self._in_flight:
            raise InvariantError(f"transfer {transfer.op_id}: not connected, or in flight already")
        if transfer.route.target is not Tier.HOST or transfer.names is None:
            raise InvariantError(f"transfer {transfer.op_id} {transfer.route}: peers are only read")
        self._in_flight[transfer.op_id] = self._clears
        self.spawn("peer get", self._get(transfer))

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    # -- reading --------------------------------------------------------------------------------

    async def _get(self, transfer: Transfer) -> None:
        """Read a transfer's blocks, and report its end."""
        filled, error = 0, None
        for run in _runs(transfer, self._ratios[transfer.group]):
            brought = await self._bring_all(run, transfer)
            filled, error = filled + brought.filled, brought.error
            if error is not None:
                break
        del self._in_flight[transfer.op_id]
        self._ended.append(Completion(transfer.op_id, error, filled))
        assert self._wake is not None
        self._wake()

    async def _bring_all(self, run: _Run, transfer: Transfer) -> Fetched:
        """Read the blocks of one holder; ask again, for a while, if it lends us fewer at once."""
        loop, filled = asyncio.get_running_loop(), 0
        until_s = loop.time() + self._patience_s
        while True:
            brought = await self._bring(run, transfer, until_s)
            self._count(run, brought)
            filled += brought.filled
            error = brought.error
            if error is None or not (isinstance(error, PeerError) and error.is_busy):
                return Fetched(filled, error)
            if brought.filled:
                run, until_s = run.behind(brought.filled), loop.time() + self._patience_s
            elif loop.time() + BUSY_S >= until_s:
                self._holders.blame(run.holder, error)
                return Fetched(filled, error)
            else:
                await asyncio.sleep(BUSY_S)

    def _count(self, run: _Run, brought: Fetched) -> None:
        # All names from the start: another thread may iterate over them.
        none = Counter(dict.fromkeys(PeerReads.__struct_fields__, 0))
        counts, error = self.counts.setdefault(run.holder, none), brought.error
        counts["blocks"] += brought.filled
        counts["bytes"] += brought.filled * self._host.block_bytes[run.wish.group]
        if isinstance(error, PeerError):
            counts["busy" if error.is_busy else "failed"] += 1
        elif error is not None:
            counts["missing" if isinstance(error, MissingBlockError) else "wrong"] += 1

    async def _bring(self, run: _Run, transfer: Transfer, until_s: float) -> Fetched:
        """Read the blocks that one holder lends us now; it is asked until a time of the loop."""
        try:
            self._check_may_ask(transfer)
            self._holders.begin(run.holder, transfer.owner)
            with_places = self._transport.wants_places(run.holder)
            wish = run.wish._replace(with_places=with_places)
            async with asyncio.timeout_at(until_s):
                allowed = await self._holders.want(run.holder, wish)
        except PeerError as error:
            return Fetched(0, error)
        except TimeoutError:
            why = f"it has lent nothing in {self._patience_s:g} s"
            silent = PeerError(str(run.holder), "asking", why)
            self._holders.blame(run.holder, silent)
            return Fetched(0, silent)
        except ClosedError as error:
            return Fetched(0, PeerError(str(run.holder), "asking", str(error)))
        try:
            self._check_may_ask(transfer)
            brought = await self._read(run, allowed)
        except PeerError as error:
            return Fetched(0, error)
        finally:
            self._holders.release(run.holder, allowed.number)
        if brought.error is not None or brought.filled == len(run.host_ids):
            return brought
        if allowed.is_cut:
            why = f"it lends only {brought.filled} of {len(run.host_ids)} blocks at once"
            return Fetched(brought.filled, PeerError(str(run.holder), "asking", why, is_busy=True))
        why = f"node {run.holder} does not have it any more"
        left = transfer.block_count - brought.filled
        missing = MissingBlockError(transfer.op_id, str(transfer.route), left, why)
        return Fetched(brought.filled, missing)

    async def _read(self, run: _Run, allowed: Allowed) -> Fetched:
        """Read granted blocks, in parts that arrive over all lanes at once."""
        group, ratio = run.wish.group, self._ratios[run.wish.group]
        at_once = read_blocks(self._host.block_bytes[group]) if ratio == 1 else 1
        ends: list[asyncio.Future[Fetched]] = []
        assert self.spawn is not None
        blocks = min(len(run.host_ids), -(-allowed.positions // ratio))
        for lane, begin in enumerate(range(0, blocks, at_once)):
            ended = asyncio.get_running_loop().create_future()
            ends.append(ended)
            first, ids = begin * ratio, run.host_ids[begin : min(begin + at_once, blocks)]
            places = allowed.places and allowed.places.at(first, len(ids), ratio)
            part = Part(
                run.holder, allowed.number, run.wish.first + first, ids, group, lane, places
            )
            self.spawn("peer read", self._read_part(part, ended))
        filled = 0
        error: TransferError | None = None
        for ended in ends:  # all must be over before the blocks are anybody else's
            brought = await ended
            if error is None:
                filled, error = filled + brought.filled, brought.error
        return Fetched(filled, error)

    async def _read_part(self, part: Part, ended: asyncio.Future[Fetched]) -> None:
        """Read some blocks, and report how that ended."""
        try:
            self._check_not_stopped()
            brought = await self._transport.fetch(part)
        except PeerError as error:
            brought = Fetched(0, error)
        except (OSError, ClosedError) as error:  # of this node: the kernel refused, or it closes
            failed = PeerError(str(part.holder), "connecting", str(error), is_own=True)
            brought = Fetched(0, failed)
        if isinstance(brought.error, PeerError):
            if not brought.error.is_own:
                self._holders.blame(part.holder, brought.error)
        elif brought.error is None:
            self._holders.arrived(part.holder)
        ended.set_result(brought)

    # -- the end --------------------------------------------------------------------------------

    def cleared(self) -> None:
        """Have transfers under way ask for nothing more: they began before a clear of this node.

        What they would be granted may be of the generation after it. What they read already goes
        on: it was granted before.
        """
        self._clears += 1

    def stop(self) -> None:
        """End all transfers soon: the engine is being closed."""
        self._is_stopped = True
        self._transport.stop()

    async def sync(self) -> None:
        """Return at once: nothing is written."""
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the port to other nodes is closed")

    def _check_may_ask(self, transfer: Transfer) -> None:
        self._check_not_stopped()
        if self._in_flight[transfer.op_id] != self._clears:
            raise PeerError("any", "asking", "this node was cleared meanwhile")

    def _check_not_stopped(self) -> None:
        if self._is_stopped:
            raise PeerError("any", "reading blocks", "the engine is being closed")

    def close(self) -> None:
        """End everything; nothing writes to the arena any more. Idempotent.

        Raises:
            InvariantError: transfers were in flight, or ended without being reaped.
        """
        if self._closed:
            return
        self._closed = True
        self._transport.close()
        self._copier.close()
        if unreaped := len(self._in_flight) + len(self._ended):
            raise InvariantError(f"peer port closed with {unreaped} transfers unreaped")


def read_blocks(block_bytes: int) -> int:
    """Return how many blocks are read at once."""
    return max(1, min(BLOCKS_MAX, READ_BYTES // block_bytes))


def _runs(transfer: Transfer, ratio: int) -> Iterator[_Run]:
    """Yield the runs of a transfer: consecutive blocks of one holder, in order."""
    assert transfer.names is not None
    keys = chain_keys_of(transfer.names.keys, transfer.group)
    holders = holders_of(transfer.source_ids)
    positions = transfer.positions.array
    breaks = (np.diff(positions) != ratio) | (np.diff(holders) != 0)
    begins = [0, *(np.flatnonzero(breaks) + 1).tolist(), transfer.block_count]
    for begin, end in pairwise(begins):
        first, last = int(positions[begin]), int(positions[end - 1]) + 1
        wish = Wish(keys[: (last + 1) * BLOCK_KEY_BYTES], first, last, transfer.group)
        yield _Run(int(holders[begin]), wish, transfer.target_ids[begin:end], ratio)
