"""The frozen snapshot that `KVManager.statistics()` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from flexkv.actors.actor import TransferActor
from flexkv.actors.scheduler import Scheduler
from flexkv.actors.write_behind import WriteBehind, WriteBehindCounts
from flexkv.common.terms import FAR_TIERS, Tier
from flexkv.engine.admission import Admission
from flexkv.index.residency import Residency
from flexkv.observe.observer import Observer
from flexkv.tiers.parts import Cluster, ClusterStatistics, StoreStatistics
from flexkv.tiers.unavailable import Unavailable


@dataclass(frozen=True)
class Sources:
    """The parts of an engine from which a snapshot is taken."""

    residency: Residency
    scheduler: Scheduler
    admission: Admission
    actors: Mapping[Tier, TransferActor]
    backing: Mapping[Tier, str]
    behind: WriteBehind
    restored_blocks: int
    unavailable: Unavailable
    stores: Mapping[Tier, Callable[[], StoreStatistics]]
    cluster: Cluster | None


class TierStatistics(msgspec.Struct, frozen=True):
    """One tier, in blocks."""

    capacity_blocks: int
    ready_blocks: int
    reserved_blocks: int
    draining_blocks: int
    pinned_blocks: int
    free_blocks: int
    evicted_blocks: int
    backing: str
    """What holds the blocks: the kind of memory, or the disk adapter."""
    reads: str = "up"
    """One of: up; down, if it failed repeatedly and is not used for a while, or its files are gone;
    hung, if I/O does not end."""
    writes: str = "up"
    group_blocks: tuple[int, ...] = ()
    """READY blocks by KV group."""

    @property
    def used_blocks(self) -> int:
        """Return the number of places that hold or receive a block."""
        return self.capacity_blocks - self.free_blocks

    def __repr__(self) -> str:
        down = [f"{way} {getattr(self, way)}" for way in ("reads", "writes")]
        told = "".join(f", {each}" for each in down if not each.endswith(" up"))
        used = f"{self.used_blocks} of {self.capacity_blocks} blocks"
        return f"TierStatistics({used}, {self.backing}{told})"


def tier_statistics(of: Sources, tier: Tier) -> TierStatistics:
    """Return the snapshot of one tier."""
    counts, watch = of.residency.counts(tier), of.scheduler.watch
    return TierStatistics(
        capacity_blocks=counts.capacity,
        ready_blocks=counts.ready,
        reserved_blocks=counts.reserved,
        draining_blocks=counts.draining,
        pinned_blocks=counts.pinned,
        free_blocks=counts.free,
        evicted_blocks=counts.evicted,
        backing=of.backing[tier],
        reads=watch.breaker(tier, True).health.value,
        writes=watch.breaker(tier, False).health.value,
        group_blocks=tuple(of.residency.group_blocks(tier)),
    )


class RouteStatistics(msgspec.Struct, frozen=True):
    """What one route has moved since the start."""

    ops: int
    """Those that ended, including failed ones, but not recalled ones."""
    blocks: int
    """Those that were moved, including the leading ones of failed ops."""
    bytes: int
    failed_ops: int


class QueueStatistics(msgspec.Struct, frozen=True):
    """The queue of one actor at this moment."""

    waiting_ops: int
    inbound_bytes_in_flight: int
    outbound_bytes_in_flight: int
    inbound_window_bytes: int
    """The most bytes in flight now; for a disk it follows the rate. One piece is always allowed."""
    outbound_window_bytes: int


class Statistics(msgspec.Struct, frozen=True):
    """Everything an engine counts, at one moment. Keys are tier, route and status names."""

    tiers: dict[str, TierStatistics]
    routes: dict[str, RouteStatistics]
    queues: dict[str, QueueStatistics]
    requests: dict[str, dict[str, int]]
    asked_blocks: int
    hit_blocks: dict[str, int]
    requests_waiting: int
    """Requests that wait to be admitted, or for room in host memory."""
    runs_in_flight: int
    claims: int
    corrupt_blocks: int = 0
    """Blocks that came back from SSD with wrong bytes: they were dropped, and never used."""
    restored_blocks: int = 0
    """Blocks of an earlier run that the SSD tier began with."""
    write_behind: dict[str, WriteBehindCounts] = {}
    """What host memory owes each lower tier."""
    missing_tiers: dict[str, str] = {}
    """Configured tiers that cannot be used, or were lost, with the reason."""
    unused_directories: dict[str, str] = {}
    """Directories of the SSD tier that are not used, with the reason."""
    stores: dict[str, StoreStatistics] = {}
    """What each far tier knows of its store, and has asked of it."""
    cluster: ClusterStatistics | None = None
    """What this node knows of the nodes with which it shares blocks; None if it shares none."""

    @property
    def own_tiers(self) -> dict[str, TierStatistics]:
        """Return the tiers whose blocks are this engine's: all but the far ones."""
        far = {tier.label for tier in FAR_TIERS}
        return {name: tier for name, tier in self.tiers.items() if name not in far}

    @property
    def hit_rate(self) -> float:
        """Return the share of the blocks asked for by gets that some tier had."""
        return sum(self.hit_blocks.values()) / self.asked_blocks if self.asked_blocks else 0.0

    @property
    def disk_written_per_hit(self) -> float:
        """Return the blocks written to SSD for each block that a get found there: its wear.

        It is infinite if blocks were written but none has been found, and 0 if none was written.
        """
        route = self.routes.get("host→disk")
        written = route.blocks if route else 0
        hits = self.hit_blocks.get("disk", 0)
        return written / hits if hits else float("inf") if written else 0.0

    def __repr__(self) -> str:
        tiers = [
            f"{name} {tier.used_blocks} of {tier.capacity_blocks} blocks"
            + ("" if tier.reads == tier.writes == "up" else " (down)")
            for name, tier in self.own_tiers.items()
        ]
        tiers += [
            f"{name} {store.known_spans} spans known" + ("" if store.is_joined else " (not joined)")
            for name, store in self.stores.items()
        ]
        if (cluster := self.cluster) is not None:
            tiers.append(f"{len(cluster.state.nodes)} peers")
        ended = [f"{sum(n.values())} {kind}" for kind, n in self.requests.items() if n]
        hits = f"hit rate {100 * self.hit_rate:.0f} %"
        return f"Statistics({', '.join([*tiers, *ended, hits])})"


def snapshot(of: Sources, observer: Observer) -> Statistics:
    """Return a snapshot. Any thread may call this, since metrics have a thread of their own."""
    return Statistics(
        tiers={tier.label: tier_statistics(of, tier) for tier in of.backing},
        routes={
            str(route): RouteStatistics(c.ops, c.blocks, c.bytes, c.failed_ops)
            for route, c in list(observer.routes.items())
        },
        queues={
            actor.name: QueueStatistics(
                actor.depth,
                *(actor.in_flight_bytes[inbound] for inbound in (True, False)),
                *(actor.window_bytes(inbound) for inbound in (True, False)),
            )
            for actor in list(of.actors.values())
        },
        requests={
            operation.label: {status.value: n for status, n in counts.items() if n}
            for operation, counts in observer.requests.items()
        },
        asked_blocks=observer.asked_blocks,
        hit_blocks={t.label: n for t, n in observer.hit_blocks.items() if t in of.backing},
        requests_waiting=of.admission.waiting + of.behind.waiting_requests,
        runs_in_flight=of.scheduler.flights,
        claims=len(of.residency.claims),
        corrupt_blocks=observer.corrupt_blocks,
        restored_blocks=of.restored_blocks,
        write_behind={tier.label: of.behind.counts(tier) for tier in of.behind.tiers},
        missing_tiers=dict(of.unavailable.tiers),
        unused_directories=dict(of.unavailable.directories),
        stores={tier.label: store() for tier, store in of.stores.items()},
        cluster=None if of.cluster is None else of.cluster.statistics(),
    )
