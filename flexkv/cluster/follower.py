"""Reads what the other nodes tell, and keeps the hints in step with it.

    log ──▶ entry of a life: is it the next one?
              yes ──▶ hints: note, drop
              no, or the registry knows of a later one that the log does not have
                  ──▶ behind: a snapshot, from the node itself ──▶ then what came meanwhile

While a node is behind, its entries are kept and its hints stand as they are. Once a whole snapshot
is there, a round of the holder notes it, and what the round did not see is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from flexkv.actors.supervisor import Bell
from flexkv.cluster.generations import Generations, Heard
from flexkv.cluster.membership import Member, Membership
from flexkv.cluster.rate import Rate
from flexkv.cluster.records import (
    FAREWELL,
    TAG_BYTES,
    Entry,
    NodeRecord,
    SpanTags,
    entry_from,
)
from flexkv.cluster.store import BEGIN, ClusterStore, ClusterStoreError, Positions
from flexkv.common.errors import MalformedError, TransferError
from flexkv.index.hints import Hints
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn

log = get_logger(__name__)

POLL_S = 0.02
"""The shortest time between two reads of the log."""
WAIT_S = 0.5
"""How long the store waits if the log has nothing new."""
RETRY_S, RETRY_MAX_S = 0.1, 2.0
"""The first and the longest pause before a store that failed is asked again."""
SNAPSHOTS_AT_ONCE = 4
SNAPSHOT_S = 30.0
"""How long a node may take to send a snapshot."""
SNAPSHOT_BYTES_MAX = 64 << 20
SPREAD_S, SPREAD_MAX_S = 0.01, 10.0
"""All nodes notice a gap at once. They ask for the snapshot within this time for each of them."""
SNAPSHOT_RETRY_S, SNAPSHOT_RETRY_MAX_S = 0.5, 30.0
KEPT_SPANS_MAX = 1 << 17
"""How many spans the entries may tell of that are kept for a node that is behind."""
SPANS_A_TURN, ENTRY_SPANS = 2048, 16
"""How many spans a task takes in one turn of the loop (about 0.2 ms). Each entry counts as
so many spans more than it tells of, since even a small one costs time."""


class Snapshots(Protocol):
    """Asks nodes for what they have."""

    def parts(self, node: NodeRecord) -> AsyncGenerator[SpanTags, None]:
        """Return the parts of a node's snapshot; the generator is closed in any case.

        Raises:
            TransferError: the node does not answer, is busy, or the connection ended.
        """
        ...


@dataclass
class Feed:
    """What is known of a node's entries.

    Attributes:
        member: the node.
        seq: of the latest entry in the hints; 0 before the first snapshot.
        behind_since_s: since when entries are missing; None if none is.
        due_s: when to ask for the next snapshot; None while one is under way, or none is needed.
        attempts: how many snapshots have failed to end this.
        kept: entries that came meanwhile, in order.
        kept_spans: how many spans they tell of.
        is_cleared: whether the hints were cleared while a snapshot was under way.
    """

    member: Member
    seq: int = 0
    behind_since_s: float | None = None
    due_s: float | None = None
    attempts: int = 0
    kept: deque[Entry] = field(default_factory=deque)
    kept_spans: int = 0
    is_cleared: bool = False


class Follower:
    """The follower of all other nodes.

    Attributes:
        generations: the cluster's generation, as this node knows it.
        positions: up to which the log was read; None before the registry was.
        entries: how many were read since the start.
        malformed: how many of them cannot be decoded.
        snapshots_taken: how many snapshots were noted.
        on_failure: is told what the store did not do.
        on_success: is called whenever the store has answered.
        on_need: is called when the store lacks what it should have of the generation.
        on_stranger: is called when an entry is of a life that is not registered.
        may_ask: returns whether other nodes may be asked for snapshots; `resync` follows once they
            may be asked again.
    """

    def __init__(
        self, store: ClusterStore, membership: Membership, hints: Hints, snapshots: Snapshots
    ) -> None:
        """Follow the nodes that join from now on."""
        self.entries = self.malformed = self.snapshots_taken = 0
        self.generations = Generations()
        self.positions: Positions | None = None
        self.on_failure: Callable[[ClusterStoreError], None] = lambda _: None
        self.on_success: Callable[[], None] = lambda: None
        self.on_need: Callable[[], None] = lambda: None
        self.on_stranger: Callable[[], None] = lambda: None
        self.may_ask: Callable[[], bool] = lambda: True
        self._store, self._membership, self._hints = store, membership, hints
        self._snapshots = snapshots
        self._feeds: dict[int, Feed] = {}
        self._reads = 0
        self._rate: Rate | None = None
        self._check_from: int | None = None
        self._begun, self._bell = Bell(), Bell()
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = Random(membership.own.life)
        membership.listeners.append(self)

    # -- nodes ----------------------------------------------------------------------------------

    def joined(self, holder: int, node: NodeRecord) -> None:
        """Follow a node, beginning with a snapshot."""
        member = self._membership.member_of(node.life)
        assert member is not None, node
        feed = self._feeds[node.life] = Feed(member)
        self._fall_behind(feed)

    def left(self, holder: int, node: NodeRecord) -> None:
        """Stop following a node."""
        self._feeds.pop(node.life, None)

    def is_behind(self, life: int) -> bool:
        """Return whether entries of a node are missing."""
        feed = self._feeds.get(life)
        return feed is not None and feed.behind_since_s is not None

    def resync(self) -> None:
        """Ask all nodes for a snapshot: the hints were cleared.

        What nodes have refused before, they may grant now, so earlier failures are forgotten.
        """
        for feed in self._feeds.values():
            if feed.due_s is not None:
                feed.behind_since_s, feed.attempts = None, 0
            feed.is_cleared = feed.behind_since_s is not None and feed.due_s is None
            self._fall_behind(feed)
        self._bell.ring()

    def registered(self, ends: Positions, before: Positions | None) -> None:
        """Take what the registry says: how far the log goes, and each node's latest entry.

        A log that ends before what was read of it is another one: the store has lost the old one.

        Args:
            ends: of the streams.
            before: our positions before the registry was read.
        """
        if self.positions is None:
            self.positions = ends
            self._begun.ring()
        elif before is not None and any(map(_is_before, ends, before)):
            now = zip(self.positions, ends, before, strict=True)
            self.positions = tuple(
                BEGIN if _is_before(end, position) else latest for latest, end, position in now
            )
        self._check_from = self._reads + 1

    # -- the log --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read the log until cancelled."""
        loop, pause_s = asyncio.get_running_loop(), RETRY_S
        if self.positions is None:
            await self._begun.wait()
        while True:
            begin_s = loop.time()
            try:
                is_at_end = await self.read()
            except ClusterStoreError as error:
                self.on_failure(error)
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            else:
                pause_s = RETRY_S
                self.on_success()
                left_s = begin_s + POLL_S - loop.time() if is_at_end else 0.0
                await asyncio.sleep(max(0.0, left_s))

    async def read(self) -> bool:
        """Read once, and take what was read; return whether nothing more was there.

        Raises:
            ClusterStoreError: the store failed.
        """
        assert self.positions is not None, "the registry comes first"
        self._reads += 1
        number, before = self._reads, self.positions
        page = await self._store.read(before, WAIT_S)
        if self.positions is before:
            self.positions = page.positions
        self._take_generation(page.heard)
        self._count(page.entries)
        turn = _Turn()
        for entries in page.entries:
            await self._take(entries, turn)
        is_at_end = all(page.is_at_end)
        if is_at_end and self._check_from is not None and number >= self._check_from:
            self._check()
        return is_at_end

    def _count(self, entries: Sequence[Sequence[bytes]]) -> None:
        """Count what was read, but for entries that only woke us."""
        count = sum(bool(data) for each in entries for data in each)
        now_s = asyncio.get_running_loop().time()
        self.entries += count
        if self._rate is None:
            self._rate = Rate(now_s)
        self._rate.add(count, now_s)

    def entries_per_s(self, now_s: float) -> float:
        """Return the recent rate of entries per second; any thread may call this."""
        return 0.0 if self._rate is None else self._rate.per_s(now_s)

    def _take_generation(self, heard: Heard) -> None:
        before = self.generations.is_settled
        self.generations.take(heard)
        if before and not self.generations.is_settled:
            self.on_need()

    async def _take(self, entries: Sequence[bytes], turn: _Turn) -> None:
        """Take some entries of a stream; other tasks run in between."""
        loop, own = asyncio.get_running_loop(), self._membership.own.life
        for data in entries:
            if not data:
                continue  # it only woke us
            await turn.take(ENTRY_SPANS + len(data) // TAG_BYTES)
            try:
                entry = entry_from(data)
            except MalformedError:
                self.malformed += 1
                continue
            if entry.life == own:
                continue
            feed = self._feeds.get(entry.life)
            if entry.seq == FAREWELL:
                self._membership.farewell(entry.life)
            elif feed is None:
                self.on_stranger()
            else:
                feed.member.heard_s = loop.time()
                self._follow(feed, entry)

    def _follow(self, feed: Feed, entry: Entry) -> None:
        """Apply an entry if it is the next one; keep it if others are missing."""
        if feed.behind_since_s is None and entry.seq > feed.seq + 1:
            self._fall_behind(feed)
        if feed.behind_since_s is not None:
            self._keep(feed, entry)
        else:
            self._apply(feed, entry)

    def _apply(self, feed: Feed, entry: Entry) -> None:
        if entry.seq != feed.seq + 1:
            return  # it was sent twice
        holder, hints = feed.member.holder, self._hints
        if entry.added:
            hints.note(holder, entry.added, False, TAG_BYTES)
        if entry.moved:
            hints.note(holder, entry.moved, True, TAG_BYTES)
        if entry.dropped:
            hints.drop(holder, entry.dropped, TAG_BYTES)
        feed.seq = entry.seq

    def _keep(self, feed: Feed, entry: Entry) -> None:
        feed.kept.append(entry)
        feed.kept_spans += 1 + entry.spans
        if feed.kept_spans > KEPT_SPANS_MAX:  # the next entry, or a beat, shows what is missing
            feed.kept.clear()
            feed.kept_spans = 0

    def _check(self) -> None:
        """Find the nodes whose latest entry, as registered, was not in the log."""
        self._check_from = None
        for feed in self._feeds.values():
            if feed.behind_since_s is None and feed.seq < feed.member.beat.seq:
                self._fall_behind(feed)

    def _fall_behind(self, feed: Feed) -> None:
        """Plan a snapshot of a node; the readers of a node do not ask for it all at once."""
        if feed.behind_since_s is None:
            now_s = asyncio.get_running_loop().time()
            spread_s = min(SPREAD_MAX_S, SPREAD_S * len(self._feeds))
            feed.behind_since_s = now_s
            feed.due_s = now_s + self._random.uniform(0.0, spread_s) + self._back_off_s(feed)
            self._bell.ring()

    def _back_off_s(self, feed: Feed) -> float:
        if not feed.attempts:
            return 0.0
        longest_s = min(SNAPSHOT_RETRY_MAX_S, SNAPSHOT_RETRY_S * 2 ** min(feed.attempts, 10))
        return self._random.uniform(longest_s / 2, longest_s)

    # -- snapshots ------------------------------------------------------------------------------

    async def take_snapshots(self, spawn: Spawn) -> None:
        """Ask nodes for the snapshots that are due, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                now_s = loop.time()
                feeds = self._feeds.values() if self.may_ask() else ()
                waiting = [feed for feed in feeds if feed.due_s is not None]
                waiting.sort(key=lambda feed: feed.due_s or 0.0)
                for feed in waiting:
                    if (feed.due_s or 0.0) <= now_s and len(self._tasks) < SNAPSHOTS_AT_ONCE:
                        feed.due_s = None
                        task = spawn("cluster snapshot", self._snapshot(feed))
                        self._tasks.add(task)
                        task.add_done_callback(self._ended)
                due = [feed.due_s for feed in waiting if feed.due_s is not None]
                await self._wait_for(min(due, default=None))
        finally:
            for task in self._tasks:
                task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._bell.ring()

    async def _wait_for(self, due_s: float | None) -> None:
        """Return once the bell rings, or a snapshot is due and may be taken."""
        if len(self._tasks) >= SNAPSHOTS_AT_ONCE:
            due_s = None
        try:
            async with asyncio.timeout_at(due_s):
                await self._bell.wait()
        except TimeoutError:
            pass

    async def _snapshot(self, feed: Feed) -> None:
        """Take a snapshot of a node, or plan the next attempt."""
        if feed.member.is_gone:  # before this task's first step
            return
        node, feed.is_cleared = feed.member.node, False
        feed.attempts += 1
        try:
            async with asyncio.timeout(SNAPSHOT_S):
                seq, on_host, on_disk = await self._fetch(node)
        except (TransferError, MalformedError, TimeoutError) as error:
            if not feed.member.is_gone:
                why = str(error) or "it took too long"
                log.warning("cluster_snapshot_failed", node=node.id.hex(), error=why)
                feed.due_s = asyncio.get_running_loop().time() + self._back_off_s(feed)
            return
        if not await self._note(feed.member, on_host, on_disk):
            return
        self.snapshots_taken += 1
        await self._catch_up(feed, seq)

    async def _fetch(self, node: NodeRecord) -> tuple[int, bytearray, bytearray]:
        """Return a snapshot's seq and tags.

        Raises:
            TransferError: the node did not send it all.
            MalformedError: it is too large, has no parts, or a tag is cut.
        """
        seq, on_host, on_disk, is_whole = 0, bytearray(), bytearray(), False
        async with aclosing(self._snapshots.parts(node)) as parts:
            async for part in parts:
                seq = part.seq
                on_host += part.on_host
                on_disk += part.on_disk
                if len(on_host) + len(on_disk) > SNAPSHOT_BYTES_MAX:
                    raise MalformedError(len(on_host) + len(on_disk), "it is too large")
                is_whole = part.is_last
        if not is_whole or (len(on_host) | len(on_disk)) % TAG_BYTES:
            raise MalformedError(len(on_host) + len(on_disk), "it is not whole")
        return seq, on_host, on_disk

    async def _note(self, member: Member, on_host: bytearray, on_disk: bytearray) -> bool:
        """Note all that a node has, and nothing else; return False if it has left meanwhile."""
        hints, holder = self._hints, member.holder
        await scrub(hints)  # of what an earlier round has dropped
        if member.is_gone:
            return False
        hints.begin_round(holder)
        turn = _Turn()
        for tags, is_on_disk in ((on_host, False), (on_disk, True)):
            for begin in range(0, len(tags), SPANS_A_TURN * TAG_BYTES):
                some = bytes(tags[begin : begin + SPANS_A_TURN * TAG_BYTES])
                await turn.take(len(some) // TAG_BYTES)
                if member.is_gone:  # its number may be another node's by now
                    return False
                hints.note(holder, some, is_on_disk, TAG_BYTES)
        hints.end_round(holder)
        return True

    async def _catch_up(self, feed: Feed, seq: int) -> None:
        """Apply the entries that came during a snapshot, and those that come meanwhile."""
        feed.seq, turn = seq, _Turn()
        while feed.kept and feed.kept[0].seq <= feed.seq + 1:
            entry = feed.kept[0]
            await turn.take(ENTRY_SPANS + entry.spans)
            if feed.member.is_gone:
                return
            if feed.kept and feed.kept[0] is entry:  # else they have become too many meanwhile
                feed.kept.popleft()
                feed.kept_spans -= 1 + entry.spans
                self._apply(feed, entry)
        feed.behind_since_s = None
        if feed.is_cleared or feed.kept:
            self._fall_behind(feed)
        if feed.behind_since_s is None:
            feed.attempts = 0


class _Turn:
    """What a task has done since it last let the others run."""

    def __init__(self) -> None:
        self._spans = 0

    async def take(self, spans: int) -> None:
        """Let other tasks run first, if these spans are too many for this turn."""
        if self._spans and self._spans + spans > SPANS_A_TURN:
            self._spans = 0
            await asyncio.sleep(0)
        self._spans += spans


async def scrub(hints: Hints) -> None:
    """Remove all dead pairs, in steps."""
    for _ in hints.scrubbing():
        await asyncio.sleep(0)


def _is_before(one: bytes, other: bytes) -> bool:
    """Return whether an id of a stream's entry is smaller than another one."""
    return _numbers(one) < _numbers(other)


def _numbers(entry_id: bytes) -> tuple[int, int]:
    time_ms, _, number = entry_id.partition(b"-")
    return int(time_ms), int(number)
