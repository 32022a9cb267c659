"""The owner's side of sharing: which blocks it keeps in host memory for which peer, and how long.

    Want ──▶ held at once ─────────────────────────▶ Grant ──▶ reads ──▶ Release, end of the link,
         │                                             ▲                 or 30 s without a read
         ├─▶ fetched from DISK first, a few at a time ─┘
         └─▶ no room ──▶ Busy

All grants together keep a bounded number of blocks; one that several grants keep counts once. Of
what is still free, a peer gets half, after what it already has is taken off. So one peer alone gets
half of the bound, more peers share it, and there is always something left for a newcomer. A grant
that such a limit cuts says so (`Grant.is_cut`). How often a grant is read is bounded, too.

The pins outlive the grant until the read that is under way has ended: no block is reused while it
is being sent. Reads by Mooncake are not seen here, so a block may be reused under one of them: its
reader compares what has arrived with the sums that came with the grant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np

from flexkv import _ext
from flexkv.cluster.wire import (
    WANT_BLOCKS_MAX,
    Busy,
    Grant,
    GrantedPlaces,
    PeerId,
    PeerProtocolError,
    Want,
)
from flexkv.common.errors import FlexKVError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn

log = get_logger(__name__)

Reply: TypeAlias = Callable[[Grant | Busy], None]

IDLE_S = 30.0
"""A grant ends if nothing of it was read for so long."""
READS_EACH = 2
"""How often the blocks of a grant may be read, all together. A reader needs each of them once: it
wants anew what has failed. A second time is for one whose connection has broken."""
PREFETCH_S, PREFETCH_SHARE = 3.0, 0.75
"""A Want waits for the disk for so many seconds, or this share of the time that its reader waits,
if that is less. Then it is granted what is there."""
BUSY_MS = 100
"""When to ask again."""


class Held(NamedTuple):
    """Blocks of a prompt that the engine keeps in host memory.

    Attributes:
        block_ids: their host blocks, by position from the first wanted one on. Without leaves, it
            is an unbroken run. -1 is a position at which no leaf is held.
        on_disk: how many positions after these the engine could fetch from its disk.
        pins: what `Owner.release` needs.
    """

    block_ids: BlockIds
    on_disk: int
    pins: object


class Owner(Protocol):
    """What grants need of an engine."""

    def hold(self, keys: bytes, first: int, last: int, group: int) -> Held:
        """Keep those blocks of a prompt that are in host memory, and count their use.

        The range may be empty. Keys come from another node: they may contradict each other.
        """
        ...

    def release(self, held: Held) -> None:
        """End a hold."""
        ...

    async def prefetch(self, keys: bytes, first: int, last: int, group: int) -> None:
        """Bring blocks from disk to host memory; return when they are there, or will not come."""
        ...


class Pace(Protocol):
    """Bounds what is granted by what can be sent."""

    def room(self, group: int) -> int | None:
        """Return how many blocks of a KV group may be granted now; None: any number."""
        ...

    def granted(self, group: int, blocks: int) -> None:
        """Count blocks that are granted."""
        ...


class GrantLimits(NamedTuple):
    """What an engine does for other nodes at most.

    Attributes:
        pinned_blocks: how many host blocks all grants keep.
        grants: how many grants and unanswered Wants there are.
        grants_per_peer: of one peer.
        prefetches: how many Wants wait for the disk; 0 if nothing is fetched for others.
        prefetches_per_peer: of one peer.
    """

    pinned_blocks: int
    grants: int = 1024
    grants_per_peer: int = 64
    prefetches: int = 4
    prefetches_per_peer: int = 2


class ReadStatus(IntEnum):
    """Why a read is not served; the numbers are those of the data protocol."""

    NO_GRANT = 1
    NOT_GRANTED = 2
    """The range is not part of the grant."""
    TOO_OFTEN = 4
    """As many blocks as `READS_EACH` allows were read of the grant."""


class Lent(NamedTuple):
    """Host blocks that may be read.

    Attributes:
        block_ids: which.
        ended: to be called once, when nothing reads them any more.
    """

    block_ids: BlockIds
    ended: Callable[[], None]


class GrantCounts(msgspec.Struct, frozen=True):
    """What was asked of an owner.

    Attributes:
        grants: how many there are now.
        pinned_blocks: how many blocks they keep.
        granted: how many Wants were granted at least one block, since the start.
        missed: Wants for blocks that were not there any more.
        busy: Wants that were put off.
        prefetched: Wants that waited for the disk.
        expired: grants that ended because nothing was read.
        reads: reads that were allowed.
    """

    grants: int
    pinned_blocks: int
    granted: int
    missed: int
    busy: int
    prefetched: int
    expired: int
    reads: int


class _Grant:
    """One grant, or a Want that waits for the disk.

    Attributes:
        held: what is kept.
        reserved: for how many more blocks there is room, while they are being fetched.
        reads: how many reads are under way.
        is_waiting: whether it waits for the disk, by `task`.
        is_over: whether it has ended, so that the last read releases the blocks.
        answer: to whom it is promised, while it waits.
        used_s: when it was granted or read from.
        lent: how many blocks were lent of it, each as often as it was.
    """

    __slots__ = (
        "answer", "first", "group", "held", "is_over", "is_waiting", "lent", "number", "peer",
        "reads", "reserved", "task", "used_s",
    )  # fmt: skip

    def __init__(self, peer: PeerId, want: Want, held: Held) -> None:
        self.peer, self.number, self.first, self.held = peer, want.number, want.first, held
        self.group = want.group
        self.reserved = self.reads = self.lent = 0
        self.is_waiting = self.is_over = False
        self.task: asyncio.Task[None] | None = None
        self.answer: Reply | None = None
        self.used_s = 0.0


Locate: TypeAlias = Callable[[BlockIds], GrantedPlaces | None]
"""Returns where a TransferEngine has host blocks; an id of -1 stands for none."""


def nowhere(block_ids: BlockIds) -> GrantedPlaces | None:
    """Return None: there is no TransferEngine."""
    return None


class Grants:
    """All grants of an owner."""

    def __init__(
        self,
        owner: Owner,
        limits: GrantLimits,
        spawn: Spawn,
        locate: Locate = nowhere,
        pace: Pace | None = None,
    ) -> None:
        """Grant nothing yet.

        Args:
            owner: the engine.
            limits: what it does for others at most.
            spawn: starts tasks.
            locate: says where a TransferEngine has blocks.
            pace: bounds what is granted in time; None if nothing does.
        """
        self._locate, self._pace = locate, pace
        self._owner, self._limits, self._spawn = owner, limits, spawn
        self._grants: dict[PeerId, dict[int, _Grant]] = {}
        self._by_use: dict[_Grant, None] = {}
        """Every granted one, the longest unread one first."""
        self._keepers = np.zeros(1024, np.uint32)
        """How many grants keep each host block."""
        self._number = self._pinned = self._reserved = self._prefetches = 0
        self._kept_by: dict[PeerId, int] = {}
        """How many blocks each peer keeps, or has room reserved for."""
        self._told = dict.fromkeys(GrantCounts.__struct_fields__[2:], 0)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def counts(self) -> GrantCounts:
        """Return what was asked of this owner."""
        return GrantCounts(grants=self._number, pinned_blocks=self._pinned, **self._told)

    # -- for control links ----------------------------------------------------------------------

    def want(self, peer: PeerId, want: Want, answer: Reply) -> None:
        """Answer a Want, now or when its blocks have come from the disk.

        Raises:
            PeerProtocolError: it makes no sense.
        """
        _check(want)
        of_peer = self._grants.get(peer, {})
        if want.number in of_peer:
            raise PeerProtocolError(f"the number {want.number} is in use")
        if self._number >= self._limits.grants or len(of_peer) >= self._limits.grants_per_peer:
            self.put_off(want, answer)
            return
        held, is_cut = self._hold(peer, want)
        last = want.first + len(held.block_ids)
        further = 0 if is_cut else min(held.on_disk, self._room(peer), self._sendable(want.group))
        if further and self._may_prefetch(of_peer):
            grant = _Grant(peer, want, held)
            grant.answer = answer
            self._add(grant, further)
            fetching = self._fetch(want, range(last, last + further), grant, answer)
            grant.task = self._spawn("peer prefetch", fetching)
        else:
            self._decide(peer, want, (held, is_cut), answer)

    def put_off(self, want: Want, answer: Reply, after_ms: int = BUSY_MS) -> None:
        """Answer that the reader should ask again later."""
        self._told["busy"] += 1
        answer(Busy(want.number, after_ms))

    def release(self, peer: PeerId, number: int) -> None:
        """End a grant or an unanswered Want; it may have ended already."""
        if (grant := self._grants.get(peer, {}).get(number)) is not None:
            self._end(grant)

    def end_peer(self, peer: PeerId) -> None:
        """End everything of a peer, because its link has ended."""
        for grant in list(self._grants.get(peer, {}).values()):
            self._end(grant)

    def clear(self) -> None:
        """End everything, because the engine was cleared: nobody reads what it had before.

        A Want that waits for the disk is answered that nothing is there. It must not be granted
        what is put after the clear: its reader has asked for blocks of the generation before.
        """
        for of_peer in list(self._grants.values()):
            for grant in list(of_peer.values()):
                self._end(grant)
                if grant.is_waiting and grant.answer is not None:
                    self._told["missed"] += 1
                    grant.answer(Grant(grant.number, grant.first, 0))

    def close(self) -> None:
        """End everything."""
        for peer in list(self._grants):
            self.end_peer(peer)
        if self._timer is not None:
            self._timer.cancel()

    # -- for data connections -------------------------------------------------------------------

    def blocks(self, peer: PeerId, number: int, first: int, count: int) -> Lent | ReadStatus:
        """Return the host blocks of a granted range; they stay until `Lent.ended` is called."""
        grant = self._grants.get(peer, {}).get(number)
        if grant is None or grant.is_waiting:
            return ReadStatus.NO_GRANT
        begin = first - grant.first
        if begin < 0 or not 0 < count <= len(grant.held.block_ids) - begin:
            return ReadStatus.NOT_GRANTED
        ids = grant.held.block_ids[begin : begin + count]
        if int(ids.min()) < 0:
            return ReadStatus.NOT_GRANTED
        there = len(_there(grant.held))
        if grant.lent + count > READS_EACH * there:
            return ReadStatus.TOO_OFTEN
        grant.lent += count
        if self._pace is not None and grant.lent > there:  # it was granted to be sent once
            self._pace.granted(grant.group, min(count, grant.lent - there))
        grant.reads += 1
        self._told["reads"] += 1
        self._use(grant)
        return Lent(ids, partial(self._end_read, grant))

    def group_of(self, peer: PeerId, number: int) -> int | None:
        """Return the KV group of a grant; None if there is none."""
        grant = self._grants.get(peer, {}).get(number)
        return None if grant is None or grant.is_waiting else grant.group

    def _end_read(self, grant: _Grant) -> None:
        grant.reads -= 1
        if not grant.is_over:
            self._use(grant)
        elif not grant.reads:
            self._unpin(grant)

    # -- deciding -------------------------------------------------------------------------------

    def _room(self, peer: PeerId) -> int:
        """Return how many more blocks may be pinned for a peer."""
        free = self._limits.pinned_blocks - self._pinned - self._reserved
        return max(0, (free - self._kept_by.get(peer, 0) + 1) // 2)

    def _sendable(self, group: int) -> int:
        """Return how many blocks of a KV group can be sent soon."""
        room = None if self._pace is None else self._pace.room(group)
        return WANT_BLOCKS_MAX if room is None else room

    def _hold(self, peer: PeerId, want: Want) -> tuple[Held, bool]:
        """Hold what is in host memory, as far as limits allow; return whether they cut it."""
        last = min(want.last, want.first + self._limits.pinned_blocks)
        held = self._owner.hold(want.keys, want.first, last, want.group)
        ids = held.block_ids
        if len(ids) and (most := int(ids.max())) >= len(self._keepers):
            self._keepers = np.concatenate([self._keepers, np.zeros(most + 1, np.uint32)])
        is_new = (ids >= 0) & (self._keepers[ids] == 0)
        fits = min(
            int(np.searchsorted(np.cumsum(is_new), self._room(peer), side="right")),
            int(np.searchsorted(np.cumsum(ids >= 0), self._sendable(want.group), side="right")),
        )
        if fits >= len(ids):
            return held, want.first + len(ids) == last < want.last
        self._owner.release(held)
        return self._owner.hold(want.keys, want.first, want.first + fits, want.group), True

    def _may_prefetch(self, of_peer: Mapping[int, _Grant]) -> bool:
        limits = self._limits
        return (
            self._prefetches < limits.prefetches
            and sum(each.is_waiting for each in of_peer.values()) < limits.prefetches_per_peer
        )

    async def _fetch(self, want: Want, lacking: range, grant: _Grant, answer: Reply) -> None:
        """Wait for the disk, then grant what is there. The end of the Want cancels this."""
        try:
            async with asyncio.timeout(min(PREFETCH_S, PREFETCH_SHARE * want.within_ms / 1000)):
                await self._owner.prefetch(want.keys, lacking.start, lacking.stop, want.group)
        except (TimeoutError, FlexKVError) as error:
            log.debug("peer_prefetch_failed", peer=str(grant.peer), reason=repr(error))
        if not grant.is_over:
            grant.task = None
            self._end(grant)
            self._decide(grant.peer, want, self._hold(grant.peer, want), answer)

    def _decide(self, peer: PeerId, want: Want, found: tuple[Held, bool], answer: Reply) -> None:
        """Grant what is held, or put the peer off if there is more than limits allow now."""
        held, is_cut = found
        is_cut = is_cut or (held.on_disk > 0 and self._limits.prefetches > 0)
        if count := len(held.block_ids):
            grant = _Grant(peer, want, held)
            self._add(grant)
            self._use(grant)
            self._told["granted"] += 1
            if self._pace is not None:
                self._pace.granted(want.group, len(_there(held)))
            places = self._locate(held.block_ids) if want.with_places else None
            answer(Grant(want.number, want.first, count, is_cut, places))
            return
        self._owner.release(held)
        if is_cut:
            self.put_off(want, answer)
        else:
            self._told["missed"] += 1
            answer(Grant(want.number, want.first, 0))

    # -- accounts -------------------------------------------------------------------------------

    def _add(self, grant: _Grant, waits_for: int = 0) -> None:
        """Count what a grant keeps, and the blocks that it waits for."""
        self._grants.setdefault(grant.peer, {})[grant.number] = grant
        self._number += 1
        self._prefetches += waits_for > 0
        self._reserved += waits_for
        self._told["prefetched"] += waits_for > 0
        grant.reserved, grant.is_waiting = waits_for, waits_for > 0
        ids = _there(grant.held)
        self._pinned += _ext.change_counts(self._keepers, ids, 1)
        self._change_kept(grant.peer, len(ids) + waits_for)

    def _end(self, grant: _Grant) -> None:
        """End a grant; its blocks stay while one of them is being sent."""
        of_peer = self._grants[grant.peer]
        del of_peer[grant.number]
        if not of_peer:
            del self._grants[grant.peer]
        self._by_use.pop(grant, None)
        self._number -= 1
        self._prefetches -= grant.is_waiting
        self._reserved -= grant.reserved
        self._change_kept(grant.peer, -grant.reserved)
        grant.is_over = True
        if grant.task is not None:
            grant.task.cancel()
        if not grant.reads:
            self._unpin(grant)

    def _unpin(self, grant: _Grant) -> None:
        ids = _there(grant.held)
        self._pinned -= _ext.change_counts(self._keepers, ids, -1)
        self._change_kept(grant.peer, -len(ids))
        self._owner.release(grant.held)

    def _change_kept(self, peer: PeerId, by: int) -> None:
        kept = self._kept_by.get(peer, 0) + by
        if kept:
            self._kept_by[peer] = kept
        else:
            self._kept_by.pop(peer, None)

    def _use(self, grant: _Grant) -> None:
        """Record a use of a grant, which then lasts for another `IDLE_S`."""
        grant.used_s = asyncio.get_running_loop().time()
        self._by_use.pop(grant, None)
        self._by_use[grant] = None
        self._arm()

    def _arm(self) -> None:
        """Start the timer for the longest unread grant, if it is not running."""
        if self._timer is None and self._by_use:
            due_s = next(iter(self._by_use)).used_s + IDLE_S
            self._timer = asyncio.get_running_loop().call_at(due_s, self._expire)

    def _expire(self) -> None:
        """End the grants that nobody has read from for too long."""
        now_s = asyncio.get_running_loop().time()
        for grant in list(self._by_use):
            if grant.used_s + IDLE_S > now_s:
                break
            if grant.reads:
                self._use(grant)
                continue
            self._told["expired"] += 1
            log.info("peer_grant_expired", peer=str(grant.peer), blocks=_there(grant.held).size)
            self._end(grant)
        self._timer = None
        self._arm()


def _there(held: Held) -> BlockIds:
    """Return the host blocks of a hold without the positions that have none."""
    return held.block_ids[held.block_ids >= 0]


def _check(want: Want) -> None:
    """Check that a Want names a range of its prompt.

    Raises:
        PeerProtocolError: it does not.
    """
    blocks, rest = divmod(len(want.keys), BLOCK_KEY_BYTES)
    if rest or not want.first < want.last < blocks:
        why = f"positions {want.first} to {want.last} of {blocks - 1} blocks"
        raise PeerProtocolError(f"a Want that makes no sense: {why}")
