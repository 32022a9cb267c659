"""The core of an engine: index, scheduler, and an actor for each tier that a backend lists."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.checks import BlockChecks
from flexkv.actors.scheduler import Scheduler
from flexkv.actors.supervisor import Supervisor
from flexkv.actors.write_behind import WriteBehind
from flexkv.cluster.grants import Owner
from flexkv.common.config import CacheConfig, CacheSizes
from flexkv.common.request import Operation, Request
from flexkv.common.space import rules_of
from flexkv.common.terms import Tier
from flexkv.graph.ops import CHUNKS_MAX, LEGS_MAX
from flexkv.graph.planner import Planner
from flexkv.index.catalogue import Sought
from flexkv.index.change_hub import ChangeHub
from flexkv.index.clears import ClearHistory
from flexkv.io.ports import TransferPort
from flexkv.observe.observer import Observer
from flexkv.tiers.backend import Backend
from flexkv.tiers.limits import behind_limits, empty_index, plan_limits
from flexkv.tiers.parts import TierHooks


class Core:
    """Index, scheduler and actors of one engine, over an open backend.

    Attributes:
        actors: by tier; that of the device is added when it is registered.
        capacities: how many blocks each tier was opened with; without far tiers.
        changes: passes the changes of the index on to readers.
        backing: by tier, the name of what holds the blocks.
        persistence: by tier, what makes its blocks survive, for tiers that have it.
        stores: by far tier, what returns what it knows of its store.
        cluster: the nodes that share blocks with this one; None if none do.
        restored_blocks: how many blocks of an earlier run the tiers began with.
    """

    def __init__(
        self,
        cache: CacheConfig,
        sizes: CacheSizes,
        backend: Backend,
        clears: ClearHistory,
        requests_max: int,
    ) -> None:
        """Compose the parts.

        Args:
            cache: the configuration.
            sizes: of the tiers.
            backend: whose tiers are open.
            clears: counts the clears of the engine.
            requests_max: how many requests are under way at most.
        """
        self._tiers = backend.tiers()
        checks = [parts.checks for parts in self._tiers if parts.checks is not None]
        for each in checks:
            assert each.checksummer.sums is checks[0].checksummer.sums, "sums that are not shared"
        ops_per_run = (LEGS_MAX * len(sizes.spaces) + CHUNKS_MAX) * 4
        self._waiting_max = requests_max * ops_per_run + sizes.num_host_blocks
        self.capacities = {Tier.HOST: sizes.num_host_blocks}
        capacities = [(parts.tier, parts.capacity_blocks) for parts in self._tiers]
        self.capacities |= {tier: blocks for tier, blocks in capacities if blocks is not None}
        self.residency = empty_index(cache, sizes, self.capacities, clears)
        self.changes = ChangeHub(self.residency)
        lasting = [(parts.tier, parts.persistence) for parts in self._tiers]
        self.persistence = {tier: each for tier, each in lasting if each is not None}
        self.restored_blocks = sum(p.restore(self.residency) for p in self.persistence.values())
        self.backing = {Tier.HOST: backend.host}
        self.backing |= {parts.tier: parts.port.adapter for parts in self._tiers}
        self.cluster = next((p.cluster for p in self._tiers if p.cluster is not None), None)
        stores = [(parts.tier, parts.store) for parts in self._tiers]
        self.stores = {tier: store for tier, store in stores if store is not None}
        lookups = [(parts.tier, parts.look_up) for parts in self._tiers]
        self._lookups = [(tier, look_up) for tier, look_up in lookups if look_up is not None]
        self.actors: dict[Tier, TransferActor] = {}
        for parts in self._tiers:
            windows = parts.inbound, parts.outbound
            place_bytes = [parts.port.block_bytes] * len(sizes.spaces)
            actor = self.add_actor(parts.tier, parts.port, windows, place_bytes, parts.checks)
            actor.waiting_since_s, actor.shares = parts.waiting_since_s, parts.shares
        log_every = cache.num_log_interval_requests
        self.observer = Observer(sizes.block_bytes, log_every_requests=log_every)
        self.observer.remind = backend.unavailable.remind
        limits = plan_limits(cache, sizes)
        rules = rules_of(sizes.spaces)
        self.planner = Planner(self.residency, limits, backend.catalogue, rules)
        self.scheduler = Scheduler(
            self.residency, self.planner, self.actors, self.observer, self.persistence,
            cache.io_deadline_s,
        )  # fmt: skip
        ships = {parts.tier: parts.ship for parts in self._tiers if parts.ship is not None}
        self.behind = self.scheduler.behind = WriteBehind(
            self.residency,
            self.planner,
            self.scheduler.watch,
            behind_limits(cache, sizes)._replace(far=ships),
            self.scheduler.write_behind,
            self.observer.event,
        )

    def add_actor(
        self,
        tier: Tier,
        port: TransferPort,
        windows: tuple[Window, Window],
        block_bytes: Sequence[int],
        checks: BlockChecks | None,
    ) -> TransferActor:
        """Add the actor of a tier or device, and return it; it is not started yet."""
        actor = TransferActor(tier, port, windows, self._waiting_max, block_bytes, checks)
        self.actors[tier] = actor
        return actor

    def start_actor(self, actor: TransferActor, supervisor: Supervisor) -> None:
        """Start an actor, which reports to the scheduler."""
        actor.attach(self.scheduler.report)
        supervisor.keep(f"{actor.name} actor", actor.run())

    def start(self, supervisor: Supervisor, owner: Owner, clear: Callable[[], object]) -> None:
        """Start the actors and the background work of all tiers.

        Args:
            supervisor: owns the tasks.
            owner: lends blocks to other nodes.
            clear: forgets all blocks of the engine.
        """
        for actor in self.actors.values():
            self.start_actor(actor, supervisor)
        for parts in self._tiers:
            hooks = TierHooks(
                self.actors[parts.tier].is_idle,
                partial(self.scheduler.drop_corrupt, parts.tier),
                partial(self.scheduler.watch.lose, parts.tier),
                supervisor.spawn,
                supervisor.spawn_session,
                partial(self.scheduler.watch.is_failing, parts.tier),
                partial(self.scheduler.watch.try_now, parts.tier),
                owner,
                self.changes,
                clear,
                self._ssd_cleared,
            )
            for name, work in parts.work(hooks).items():
                supervisor.keep(name, work)

    async def _ssd_cleared(self) -> None:
        """Return once no crash, nor a loss of power, brings back what was cleared of the SSD."""
        if (ssd := self.persistence.get(Tier.DISK)) is not None:
            await ssd.flush()

    def look_up(self, request: Request) -> Awaitable[None] | None:
        """Ask a far tier what longer prefixes it has than a load finds, if that is unknown.

        Returns:
            What ends with the answer, or after a moment; None if there is nothing to wait for.
        """
        if request.operation is Operation.PUT or not self._lookups:
            return None
        avoided, found = self.planner.avoid.unreadable, self.planner.peek(request)
        last = min(request.span.last_block, request.block_count - request.drop)
        chain = max(found.last, found.chain)
        sought = Sought(request.keys, found.last, chain, last, request.drop)
        for tier, look_up in self._lookups:
            answered = None if tier in avoided else look_up(sought)
            if answered is not None:
                return answered
        return None

    def cleared(self, tier: Tier | None, root: bytes | None) -> None:
        """Forget what is owed, and after a clear of more than one tier what is far, too.

        Transfers that wait for a far tier would store what was cleared in its new generation, or
        fetch what belongs to that.
        """
        if tier is None:
            self.planner.catalogue.clear(root)
            for far in self.actors.keys() - self.capacities.keys() - {Tier.DEVICE}:
                self.actors[far].recall_queued()
        self.behind.cleared(tier)

    def stop_transfers(self) -> None:
        """End the transfers of tiers that can end them at once: the engine is being closed."""
        for parts in self._tiers:
            parts.stop()

    async def leave_tiers(self) -> None:
        """Return once nothing goes on in any tier; all tasks are over."""
        for parts in self._tiers:
            await parts.leave()
