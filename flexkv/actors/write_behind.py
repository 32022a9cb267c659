"""Writes to lower tiers, in the background, the blocks of host memory that they are owed.

    put ──plan──▶ queued for the tier at once, up to `write_behind_max_gb`
            └───▶ owed: kept in host memory ──in turn──▶ written when there is room
                                            └─too long─▶ may be evicted unwritten: given up

Far tiers are owed whole spans, as soon as host memory has them (`ShipLimits`). These are not kept.

A put that finds host memory full of owed blocks waits for room. The puts of one burst may wait for
`write_behind_wait_s` in all. A tier that is down is owed blocks, too, but none of them are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from flexkv.actors.flight import wake
from flexkv.actors.health import Health
from flexkv.actors.tier_health import TierHealth
from flexkv.actors.write_rate import WriteRate
from flexkv.common.errors import DeadlineError, RecalledError, TransferError
from flexkv.common.request import Operation, Request
from flexkv.common.terms import BlockIds, Tier
from flexkv.graph.planner import Planned, Planner
from flexkv.index.owed import EVICTED, FAILED, NO_PLACE, NOT_WORTH_IT, OwedBlocks, Taken
from flexkv.index.owed_spans import OwedSpans
from flexkv.index.residency import Residency
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

ATTEMPTS_MAX = 5
"""A block is given up once its write has failed this many times."""
UNREPORTED_FAILURES_MAX = 100
"""The most failures that are kept for the next flush to report; later ones are not kept."""
RETRY_S = 1.0
"""Time between two checks of whether a tier that is down is due for a trial."""
LOAD_WAIT_S = 0.1
"""The longest that a load waits for room that owed blocks take."""
SHIP_SHARE = 4
"""Blocks on their way to a far tier stay in host memory. They take at most host memory divided by
this, or one span, so that a store that hangs leaves room for others."""


Queue: TypeAlias = OwedBlocks | OwedSpans


class ShipLimits(NamedTuple):
    """What is written to a far tier, and the bound on it."""

    span_blocks: int
    """How many blocks a span has."""
    in_flight_blocks: int
    """Blocks that may be on their way at once."""
    reused_only: bool = False
    """Whether only blocks that a load has found are written, not all that reach host memory."""
    blocks_per_s: float | None = None
    """How many blocks a second may begin to be written; None: any number."""
    where: str = "the tier"
    """Names the tier in errors."""


class WriteBehindLimits(NamedTuple):
    """The bounds on writing owed blocks."""

    batch_blocks: int
    """The most blocks in one transfer."""
    in_flight_blocks: int
    """Blocks that may be on their way to a tier at once: enough to keep it busy."""
    kept_blocks_max: int
    """The most host blocks that may be kept from eviction until they are written."""
    burst_wait_s: float
    """How long the puts of a burst may wait, in all, for room in host memory."""
    far: Mapping[Tier, ShipLimits] = {}
    """The far tiers that are written to."""


class WriteBehindCounts(msgspec.Struct, frozen=True):
    """What one lower tier is owed, in blocks."""

    owed_blocks: int
    """Blocks in host memory that wait to be written, without those in `writing_blocks`."""
    kept_blocks: int
    """The owed blocks that are kept from eviction until they are written."""
    writing_blocks: int
    """Blocks being written, including those that puts queued at once."""
    given_up_blocks: dict[str, int]
    """Blocks that were never written, by reason."""


class WriteBehind:
    """The blocks that each lower tier is owed, and their writing.

    Attributes:
        waiting_requests: the number of requests that wait for room in host memory.
        is_active: whether `pump` has anything to do.
        coming_blocks: blocks on their way to host memory, to be owed once they are there.
    """

    def __init__(
        self,
        residency: Residency,
        planner: Planner,
        watch: TierHealth,
        limits: WriteBehindLimits,
        begin: Callable[[Taken], None],
        tell: Callable[..., None],
    ) -> None:
        """Take the parts of an engine.

        Args:
            residency: where blocks are.
            planner: learns which tiers are owed blocks.
            watch: knows which tiers may be written to.
            limits: the bounds on the work.
            begin: starts the transfer of a batch of owed blocks.
            tell: called with an event's kind, tier and detail when blocks are given up.
        """
        self.waiting_requests, self.is_active, self.coming_blocks = 0, False, 0
        self._residency, self._planner, self._watch = residency, planner, watch
        self._limits, self._begin, self._tell = limits, begin, tell
        lower = [tier for tier in residency.tiers if tier > Tier.HOST]
        self._queues: dict[Tier, Queue] = {
            tier: OwedBlocks(residency, tier, limits.batch_blocks) for tier in lower
        }
        is_far = planner.catalogue.has
        self._rates: dict[Tier, WriteRate] = {}
        for tier, ship in limits.far.items():
            self._queues[tier] = OwedSpans(residency, tier, ship.span_blocks, is_far)
            self._rates[tier] = WriteRate(ship.blocks_per_s)
        self._near = tuple(lower)
        self._in_flight = dict.fromkeys(self._queues, 0)
        self._told = dict.fromkeys(self._queues, 0)
        self._host_places = residency.counts(Tier.HOST).capacity  # resizing does not change it
        self._failures: dict[Tier, TransferError] = {}
        self._failures_untold: list[TransferError] = []
        self._burst_until_s: float | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._retry: asyncio.TimerHandle | None = None
        self._is_pumping = self._is_closed = False

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Return the tiers that are written to, the nearest first."""
        return tuple(self._queues)

    # -- owing ----------------------------------------------------------------------------------

    def owe(self, tier: Tier, host_ids: BlockIds) -> None:
        """Owe blocks of host memory to a tier."""
        if not self._is_closed:
            self._add(tier, host_ids, 0, None)

    def arrived(self, host_ids: BlockIds) -> None:
        """Owe far tiers the spans that are whole now that these blocks have become READY."""
        for tier, ship in self._limits.far.items():
            if not ship.reused_only:
                self.owe(tier, host_ids)

    def reused(self, host_ids: BlockIds) -> None:
        """Owe blocks that a load has found in host memory to far tiers that take only those."""
        for tier, ship in self._limits.far.items():
            if ship.reused_only:
                self.owe(tier, host_ids)

    def failed(
        self, tier: Tier, host_ids: BlockIds, taken: Taken | None, error: TransferError
    ) -> None:
        """Owe blocks again whose write failed, or give them up after `ATTEMPTS_MAX` attempts.

        Args:
            tier: the tier to which they were being written.
            host_ids: their places in host memory.
            taken: the batch, if the blocks were owed before.
            error: the reason. A recalled transfer does not count as an attempt.
        """
        if self._is_closed:
            return
        attempts, epoch = (taken.attempts, taken.epoch) if taken is not None else (0, None)
        if isinstance(error, DeadlineError) and tier in self._limits.far:
            error = self._silent(tier, len(host_ids))  # which names the store, as its errors do
        if not isinstance(error, RecalledError):
            self._failures[tier] = error
            attempts += 1
        if attempts < ATTEMPTS_MAX:
            self._add(tier, host_ids, attempts, epoch)
        else:
            if len(self._failures_untold) < UNREPORTED_FAILURES_MAX:
                self._failures_untold.append(error)
            self._queues[tier].given_up[FAILED] += len(host_ids)
            self.is_active = True

    def _add(self, tier: Tier, host_ids: BlockIds, attempts: int, epoch: int | None) -> None:
        queue = self._queues[tier]
        room = self._limits.kept_blocks_max - self._residency.counts(tier).reserved
        queue.add(host_ids, room if self._may_write(tier) else 0, attempts, epoch)
        if queue.blocks > 2 * self._host_places:
            queue.drop_gone(EVICTED)
        self._planner.tiers_owed |= {tier}
        self.is_active = True

    def about_to_clear(self) -> None:
        """Count blocks evicted so far as given up; those that the clear removes do not count."""
        for queue in self._queues.values():
            queue.drop_gone(EVICTED)

    def planned(self, planned: Planned) -> None:
        """Owe what the plan of a put leaves unwritten, and count what tiers have refused."""
        for fill in planned.plan.fills:
            if fill.owed_to:
                self.coming_blocks += fill.positions.block_count
        for tier, blocks in planned.declined:
            self._queues[tier].given_up[NOT_WORTH_IT] += blocks
            self.is_active = True
        for owed in planned.owed:
            self.owe(owed.tier, owed.host_ids)

    def cleared(self, tier: Tier | None) -> None:
        """Forget owed blocks after a clear of `tier`; None stands for a namespace or everything."""
        for lower, queue in self._queues.items():
            if tier is lower:
                queue.clear()
            else:
                queue.drop_gone()
            if tier is None and isinstance(queue, OwedSpans):
                queue.forget_writes()
        self.pump()

    # -- writing --------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start to write owed blocks, as far as there is room, and wake all waiters."""
        if self._is_pumping or self._is_closed:
            return
        self._is_pumping = True
        try:
            for tier, queue in self._queues.items():
                if queue.blocks:
                    self._pump(tier, queue)
        finally:
            self._is_pumping = False
        tiers_owed = frozenset(tier for tier, queue in self._queues.items() if queue.blocks)
        self._planner.tiers_owed = tiers_owed
        self._tell_given_up()
        # All owed blocks count, not only kept ones: letting them be evicted must not end a burst.
        pending = sum(self._queues[tier].blocks + self._in_flight[tier] for tier in self._near)
        pending += self.coming_blocks
        if pending <= self._limits.kept_blocks_max // 2:
            self._burst_until_s = None
        self.is_active = bool(tiers_owed or pending or self._burst_until_s is not None)
        wake(self._waiters)

    def _pump(self, tier: Tier, queue: Queue) -> None:
        far, rate = self._limits.far.get(tier), self._rates.get(tier)
        limit = self._limits.in_flight_blocks
        if far is not None:
            spans = max(1, self._host_places // SHIP_SHARE // far.span_blocks)
            limit = min(far.in_flight_blocks, spans * far.span_blocks)
        now_s = asyncio.get_running_loop().time()
        while queue.blocks and self._in_flight[tier] < limit:
            if not self._may_write(tier):
                queue.unkeep(queue.kept_blocks)
                self._pump_again(now_s + RETRY_S)
                return
            if rate is not None and (wait_s := rate.wait_s(now_s)) > 0:
                self._pump_again(now_s + wait_s)
                return
            if self._residency.counts(tier).reserved >= self._limits.kept_blocks_max > 0:
                return  # what puts have queued is enough: blocks free no room until written
            before = queue.blocks
            taken = queue.take()
            if taken is not None:
                self._in_flight[tier] += len(taken.host_ids)
                if rate is not None:
                    rate.began(len(taken.host_ids), now_s)
                self._begin(taken)
            elif queue.blocks == before:
                if self._in_flight[tier] or self._residency.counts(tier).reserved:
                    return  # there may be room once these writes are over
                queue.give_up_next(NO_PLACE)

    def ended(self, taken: Taken) -> None:
        """Record that a transfer of owed blocks is over, successful or not."""
        self._in_flight[taken.tier] -= len(taken.host_ids)
        self._queues[taken.tier].ended(taken)

    def _may_write(self, tier: Tier) -> bool:
        return tier not in self._watch.unusable()[1]

    def _is_on_trial(self, tier: Tier) -> bool:
        """Return whether a tier that was down is being tried right now."""
        is_hung = self._watch.breaker(tier, inbound=False).health is Health.HUNG
        return self._in_flight[tier] > 0 and not is_hung

    def _pump_again(self, at_s: float) -> None:
        """Pump at a time by the loop's clock, or earlier if that is due anyway."""
        if self._retry is not None:
            if self._retry.when() <= at_s:
                return
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_at(at_s, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self.pump()

    def _tell_given_up(self) -> None:
        for tier, queue in self._queues.items():
            if (total := queue.given_up.total()) > self._told[tier]:
                blocks, self._told[tier] = total - self._told[tier], total
                so_far = ", ".join(f"{why} {n}" for why, n in sorted(queue.given_up.items()) if n)
                self._tell("given_up", tier, detail=f"{blocks} blocks; so far: {so_far}")
                log.warning("blocks_given_up", tier=tier.label, blocks=blocks, so_far=so_far)

    # -- waiting --------------------------------------------------------------------------------

    def lacks(self, request: Request) -> bool:
        """Return whether owed blocks leave too little room in host memory for a request."""
        return self._missing_room(request) > 0

    async def make_room(self, request: Request) -> None:
        """Wait until owed blocks leave room in host memory for a request, or until time is up.

        A put waits for as long as its burst may. A load has priority, and waits `LOAD_WAIT_S` at
        most. After that, as many owed blocks as the request needs may be evicted unwritten.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + min(LOAD_WAIT_S, self._limits.burst_wait_s)
        self.waiting_requests += 1
        try:
            while missing := self._missing_room(request):
                if request.operation is Operation.PUT:
                    until_s = self._burst_ends_s(loop.time())
                left_s = until_s - loop.time()
                if left_s <= 0:
                    self._unkeep(missing)
                    return
                await self._change(left_s)
        finally:
            self.waiting_requests -= 1

    def _burst_ends_s(self, now_s: float) -> float:
        if self._burst_until_s is None:
            self._burst_until_s = now_s + self._limits.burst_wait_s
        return self._burst_until_s

    async def _change(self, timeout_s: float) -> None:
        """Return after the next change, or after `timeout_s`."""
        changed = asyncio.get_running_loop().create_future()
        self._waiters.append(changed)
        self.is_active = True
        await asyncio.wait([changed], timeout=timeout_s)

    def _missing_room(self, request: Request) -> int:
        """Return how many blocks of a request exceed the room that owed blocks leave."""
        if self._is_closed or not (pending := self._pending):
            return 0
        host = self._residency.counts(Tier.HOST)
        room = host.capacity - host.pinned - host.reserved  # DRAINING blocks are pinned
        is_put = request.operation is Operation.PUT
        if is_put:  # its own blocks will be kept, too
            room = min(room, self._limits.kept_blocks_max - pending)
        room = max(0, room)
        if self._planner.most_places(request) <= room:
            return 0
        wanted = self._planner.places_wanted(request)
        return max(0, min(wanted, self._limits.kept_blocks_max) - room)

    @property
    def _pending(self) -> int:
        """Return how many blocks of host memory are, or will be, kept until they are written."""
        most = 0
        for tier in self._near:
            queue = self._queues[tier]
            if self._may_write(tier):
                kept = queue.kept_blocks + self._residency.counts(tier).reserved
                most = max(most, kept + self.coming_blocks)
        return most

    def _unkeep(self, blocks: int) -> None:
        for queue in self._queues.values():
            kept = queue.kept_blocks
            queue.unkeep(min(blocks, kept))
            blocks -= kept - queue.kept_blocks

    async def drain(self) -> TransferError | None:
        """Wait until everything owed by now is written or given up.

        Returns:
            None, or the error that keeps a tier from being written to.
        """
        epochs = {tier: queue.epochs.next() for tier, queue in self._queues.items()}
        self.pump()
        for tier, queue in self._queues.items():
            while queue.epochs.left_of(epochs[tier]) and not self._is_closed:
                if not (self._may_write(tier) or self._is_on_trial(tier)):
                    left = queue.epochs.left_of(epochs[tier])
                    return self._failures.get(tier) or self._silent(tier, left)
                await self._change(RETRY_S)
        return None

    def _silent(self, tier: Tier, blocks: int) -> DeadlineError:
        """Return the error of blocks that are not written because nothing is heard of a tier."""
        ship = self._limits.far.get(tier)
        where = "the tier" if ship is None else ship.where
        return DeadlineError(-1, f"host→{tier.label}", blocks, f"{where} does not respond")

    async def owe_all(self) -> None:
        """Owe to lower tiers the blocks of host memory that they lack and have free places for.

        The tiers have evicted or refused these blocks, or writing them failed.
        """
        for tier, queue in self._queues.items():
            free = self._host_places
            if (ship := self._limits.far.get(tier)) is None:
                free = self._residency.counts(tier).free
            elif ship.reused_only:
                continue
            for first in range(0, self._host_places, queue.scan_blocks):
                lacking = queue.lacking(first, first + queue.scan_blocks)[:free]
                free -= len(lacking)
                self.owe(tier, lacking)
                await asyncio.sleep(0)

    async def left_blocks(self) -> dict[str, int]:
        """Return, by tier name, how many READY blocks of host memory are not READY in the tier.

        Those that it is owed, and those for which a put has only reserved a place, count too. Of a
        far tier only whole spans count, and only those that it is owed if it takes reused blocks
        only.
        """
        left = {}
        for tier, queue in self._queues.items():
            ship = self._limits.far.get(tier)
            if ship is not None and ship.reused_only:
                blocks = queue.epochs.left_of(queue.epochs.epoch)
            else:
                blocks = 0
                for first in range(0, self._host_places, queue.scan_blocks):
                    blocks += queue.count_unwritten(first, first + queue.scan_blocks)
                    await asyncio.sleep(0)
            if blocks:
                left[tier.label] = blocks
        return left

    # -- the end --------------------------------------------------------------------------------

    def take_failures(self) -> list[TransferError]:
        """Return the errors for which blocks were given up since the last call."""
        failures, self._failures_untold = self._failures_untold, []
        return failures

    def counts(self, tier: Tier) -> WriteBehindCounts:
        """Return what a tier is owed."""
        queue = self._queues[tier]
        given_up = {why: n for why, n in list(queue.given_up.items()) if n}
        near = tier in self._near
        writing = self._residency.counts(tier).reserved if near else self._in_flight[tier]
        return WriteBehindCounts(queue.blocks, queue.kept_blocks, writing, given_up)

    def abandon(self) -> None:
        """Stop writing, and wake all waiters: the engine has failed, or is about to close."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        wake(self._waiters)

    def close(self) -> None:
        """Forget everything that is owed."""
        self.abandon()
        for queue in self._queues.values():
            queue.clear()
