"""The metrics that are read from the statistics: what each is called, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from flexkv.engine.statistics import Statistics
from flexkv.tiers.parts import StoreStatistics

Labels: TypeAlias = tuple[str, ...]
Values: TypeAlias = Iterable[tuple[Labels, Any]]
Reader: TypeAlias = Callable[[Statistics], Values]
Kind: TypeAlias = type[CounterMetricFamily | GaugeMetricFamily]

COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily


def _one(field: str) -> Reader:
    """Return a reader of one number."""
    return lambda now: [((), getattr(now, field))]


def _each(parts: str, field: str) -> Reader:
    """Return a reader of one number of each part, such as each tier."""
    return lambda now: [
        ((name,), getattr(part, field)) for name, part in getattr(now, parts).items()
    ]


def _states(parts: str, states: Iterable[str], field: str) -> Reader:
    """Return a reader of one number of each part and state, whose name replaces `{}` in `field`."""
    return lambda now: [
        ((name, state), getattr(part, field.format(state)))
        for name, part in getattr(now, parts).items()
        for state in states
    ]


def _requests(now: Statistics) -> Values:
    return [((o, s), count) for o, of in now.requests.items() for s, count in of.items()]


def _hits(now: Statistics) -> Values:
    return [((tier,), blocks) for tier, blocks in now.hit_blocks.items()]


def _groups(now: Statistics) -> Values:
    return [
        ((tier, str(group)), blocks)
        for tier, of in now.own_tiers.items()
        for group, blocks in enumerate(of.group_blocks)
    ]


def _up(now: Statistics) -> Values:
    ways = _states("tiers", ("reads", "writes"), "{}")
    return [(labels, float(health == "up")) for labels, health in ways(now)]


def _given_up(now: Statistics) -> Values:
    return [
        ((name, reason.replace(" ", "_")), blocks)
        for name, behind in now.write_behind.items()
        for reason, blocks in behind.given_up_blocks.items()
    ]


def _counts(field: str) -> Reader:
    """Return a reader of one number of what was asked of each store."""
    return lambda now: [
        ((tier,), getattr(store.requests, field)) for tier, store in now.stores.items()
    ]


def _kinds(field: str) -> Reader:
    """Return a reader of a number of requests to each store by kind, 0 included."""
    return lambda now: [
        ((tier, kind), count)
        for tier, store in now.stores.items()
        for kind, count in {**dict.fromkeys(_KINDS, 0), **getattr(store.requests, field)}.items()
    ]


def _ways(inbound: str, outbound: str) -> Reader:
    """Return a reader of one number of each store and direction."""
    return lambda now: [
        ((tier, direction), getattr(store.requests, field))
        for tier, store in now.stores.items()
        for direction, field in zip(_DIRECTIONS, (inbound, outbound), strict=True)
    ]


def _outcomes(of: Callable[[StoreStatistics], Struct]) -> Reader:
    """Return a reader of all counts of a struct of each store, by their names."""
    return lambda now: [
        ((tier, name), count)
        for tier, store in now.stores.items()
        for name, count in asdict(of(store)).items()
    ]


def _horizon(now: Statistics) -> Values:
    ages = [((tier,), store.collection.horizon_s) for tier, store in now.stores.items()]
    return [(labels, age_s) for labels, age_s in ages if age_s is not None]


def _of_cluster(field: str) -> Reader:
    """Return a reader of one number of what a node knows of its cluster; of none if it has none."""
    of = attrgetter(field)
    return lambda now: [] if now.cluster is None else [((), of(now.cluster))]


def _of_mooncake(field: str) -> Reader:
    """Return a reader of one number of Mooncake's reads; without Mooncake it returns no values."""
    of = attrgetter(field)
    return lambda now: (
        []
        if now.cluster is None or now.cluster.mooncake is None
        else [((), of(now.cluster.mooncake))]
    )


def _mooncake_up(now: Statistics) -> Values:
    return [((), bool(endpoint)) for _, endpoint in _of_mooncake("endpoint")(now)]


def _outcomes_of(part: str, outcomes: Iterable[str]) -> Reader:
    """Return a reader of some counts of a part of that knowledge, by their names."""
    of = attrgetter(part)
    return lambda now: (
        []
        if now.cluster is None
        else [((name,), getattr(of(now.cluster), name)) for name in outcomes]
    )


def _peers(now: Statistics) -> Values:
    if now.cluster is None:
        return []
    down = len(now.cluster.down)
    return [(("up",), len(now.cluster.state.nodes) - down), (("down",), down)]


def _peer_spans(now: Statistics) -> Values:
    if now.cluster is None:
        return []
    return [((), sum(node.spans for node in now.cluster.state.nodes))]


def _behind(now: Statistics) -> Values:
    if now.cluster is None:
        return []
    return [((), sum(node.is_behind for node in now.cluster.state.nodes))]


def _stale(now: Statistics) -> Values:
    if now.cluster is None:
        return []
    return [((), max((node.stale_s for node in now.cluster.state.nodes), default=0.0))]


def _apart(now: Statistics) -> Values:
    return [] if now.cluster is None else [((), now.cluster.shared_generation is None)]


_KINDS = ("get", "put", "head", "list", "delete", "touch")
_BLOCK_STATES = ("free", "reserved", "ready", "draining", "pinned")
_DIRECTIONS = ("inbound", "outbound")

FIGURES: tuple[tuple[Kind, str, str, Labels, Reader], ...] = (
    (COUNTER, "flexkv_requests", "Requests that have ended, by operation and status.",
     ("operation", "status"), _requests),
    (GAUGE, "flexkv_requests_running", "Requests running now.", (), _one("runs_in_flight")),
    (GAUGE, "flexkv_requests_waiting",
     "Requests waiting to be admitted, or for room in host memory.", (), _one("requests_waiting")),
    (COUNTER, "flexkv_asked_blocks", "Blocks requested by gets.", (), _one("asked_blocks")),
    (COUNTER, "flexkv_hit_blocks", "Requested blocks that gets found, by tier.", ("tier",), _hits),
    (GAUGE, "flexkv_claims", "Open claims on blocks, which keep them from being evicted or reused.",
     (), _one("claims")),
    (COUNTER, "flexkv_corrupt_blocks", "Blocks read with wrong bytes; none was used.",
     (), _one("corrupt_blocks")),
    (GAUGE, "flexkv_restored_blocks", "Blocks of earlier runs that the SSD tier had at the start.",
     (), _one("restored_blocks")),
    (GAUGE, "flexkv_tier_blocks", "Blocks by state; a pinned block is ready or draining, too.",
     ("tier", "state"), _states("own_tiers", _BLOCK_STATES, "{}_blocks")),
    (GAUGE, "flexkv_tier_group_blocks", "Ready blocks by KV group; group 0 is the prefix chain.",
     ("tier", "group"), _groups),
    (GAUGE, "flexkv_tier_capacity_blocks", "Blocks that a tier has room for.",
     ("tier",), _each("own_tiers", "capacity_blocks")),
    (COUNTER, "flexkv_evicted_blocks", "Blocks that were evicted.",
     ("tier",), _each("own_tiers", "evicted_blocks")),
    (GAUGE, "flexkv_tier_up", "Whether a tier can be read or written; 0 after failures.",
     ("tier", "direction"), _up),
    (GAUGE, "flexkv_write_behind_blocks",
     "Blocks that a lower tier still has to get; kept ones are owed, and cannot be evicted.",
     ("tier", "state"), _states("write_behind", ("owed", "kept", "writing"), "{}_blocks")),
    (COUNTER, "flexkv_given_up_blocks", "Blocks that were never written to a tier, by reason.",
     ("tier", "reason"), _given_up),
    (COUNTER, "flexkv_transfers", "Transfers that have ended, including failed ones.",
     ("route",), _each("routes", "ops")),
    (COUNTER, "flexkv_transfer_blocks",
     "Blocks that were moved, including the leading ones of failed transfers.",
     ("route",), _each("routes", "blocks")),
    (COUNTER, "flexkv_transfer_bytes", "Bytes that were moved.",
     ("route",), _each("routes", "bytes")),
    (COUNTER, "flexkv_transfer_failures", "Transfers that failed.",
     ("route",), _each("routes", "failed_ops")),
    (GAUGE, "flexkv_queue_transfers", "Transfers that are queued or in flight.",
     ("actor",), _each("queues", "waiting_ops")),
    (GAUGE, "flexkv_in_flight_bytes", "Bytes in flight; inbound is towards the GPU.",
     ("actor", "direction"), _states("queues", _DIRECTIONS, "{}_bytes_in_flight")),
    (GAUGE, "flexkv_window_bytes", "Most bytes that may be in flight at once.",
     ("actor", "direction"), _states("queues", _DIRECTIONS, "{}_window_bytes")),
    (COUNTER, "flexkv_store_requests", "Requests to the store, by kind; they may cost money.",
     ("tier", "kind"), _kinds("requests")),
    (COUNTER, "flexkv_store_failures", "Requests to the store that failed.",
     ("tier", "kind"), _kinds("failures")),
    (COUNTER, "flexkv_store_retries", "Requests to the store that repeat one that failed.",
     ("tier", "kind"), _kinds("retries")),
    (COUNTER, "flexkv_store_bytes", "Bytes that were read from the store, and written to it.",
     ("tier", "direction"), _ways("read_bytes", "written_bytes")),
    (COUNTER, "flexkv_store_hedges", "Gets that were sent again because the first was slow.",
     ("tier",), _counts("hedges")),
    (COUNTER, "flexkv_store_hedges_won", "Gets that were sent again, and answered first.",
     ("tier",), _counts("hedges_won")),
    (COUNTER, "flexkv_store_busy", "Answers by which the store asked for fewer requests.",
     ("tier",), _counts("busy")),
    (COUNTER, "flexkv_store_missing_spans", "Spans that hints promised and the store lacked.",
     ("tier",), _counts("missing")),
    (COUNTER, "flexkv_store_existing_spans", "Spans that were written, and were there already.",
     ("tier",), _counts("existing")),
    (COUNTER, "flexkv_store_wrong_answers", "Answers with wrong bytes, or too few; none was used.",
     ("tier",), _counts("wrong")),
    (COUNTER, "flexkv_store_deleted_spans", "Spans deleted because they were proved wrong.",
     ("tier",), _counts("deleted")),
    (GAUGE, "flexkv_store_limit_spans", "Spans that may be on their way at once now.",
     ("tier", "direction"), _ways("gets_limit", "puts_limit")),
    (GAUGE, "flexkv_store_joined", "Whether the store has answered, so that it is in use.",
     ("tier",), _each("stores", "is_joined")),
    (GAUGE, "flexkv_store_generation", "Generation of the pool in use; a clear begins the next.",
     ("tier",), _each("stores", "generation")),
    (GAUGE, "flexkv_store_known_spans", "Spans that the store is said to have.",
     ("tier",), _each("stores", "known_spans")),
    (COUNTER, "flexkv_store_lost_spans", "Spans forgotten because the table of hints is full.",
     ("tier",), _each("stores", "lost_spans")),
    (COUNTER, "flexkv_store_collected_spans", "Old spans that this engine was to delete.",
     ("tier", "outcome"), _outcomes(lambda store: store.collection.removed)),
    (COUNTER, "flexkv_store_touched_spans", "Spans that were read and old, so as to stay.",
     ("tier", "outcome"), _outcomes(lambda store: store.touches)),
    (GAUGE, "flexkv_store_horizon_seconds", "Age of the oldest spans that the budget has room for.",
     ("tier",), _horizon),
    (GAUGE, "flexkv_store_refused", "Whether it refuses what collecting or touching spans needs.",
     ("tier",), lambda now: [((tier,), bool(of.refused)) for tier, of in now.stores.items()]),
    (COUNTER, "flexkv_store_listed_rounds", "Listings of the whole pool that have ended.",
     ("tier",), _each("stores", "listed_rounds")),
    (GAUGE, "flexkv_cluster_peers", "Other nodes; one that is down is not asked for a while.",
     ("state",), _peers),
    (GAUGE, "flexkv_cluster_peers_behind", "Other nodes whose snapshot is needed.",
     (), _behind),
    (GAUGE, "flexkv_cluster_stale_seconds", "How long ago the most silent node was heard of.",
     (), _stale),
    (GAUGE, "flexkv_cluster_known_spans", "Spans that other nodes are said to have.",
     (), _peer_spans),
    (GAUGE, "flexkv_cluster_generation", "Latest generation of the cluster; a reset begins it.",
     (), _of_cluster("state.generation")),
    (GAUGE, "flexkv_cluster_apart", "Whether this node is apart: it shares nothing until a reset.",
     (), _apart),
    (GAUGE, "flexkv_cluster_redis_up", "Whether Redis has answered last.",
     (), _of_cluster("state.is_store_up")),
    (GAUGE, "flexkv_cluster_registered", "Whether this node is registered.",
     (), _of_cluster("state.is_registered")),
    (GAUGE, "flexkv_cluster_log_bytes", "What the log of changes takes in Redis.",
     (), _of_cluster("state.log_bytes")),
    (COUNTER, "flexkv_cluster_log_entries", "Entries of the log that were read.",
     (), _of_cluster("state.entries")),
    (COUNTER, "flexkv_cluster_malformed_entries", "Entries of the log that have no meaning.",
     (), _of_cluster("state.malformed_entries")),
    (COUNTER, "flexkv_cluster_snapshots", "Snapshots of other nodes that were taken.",
     (), _of_cluster("state.snapshots")),
    (GAUGE, "flexkv_cluster_untold_spans", "Spans whose change other nodes are not told yet.",
     (), _of_cluster("state.pending_spans")),
    (COUNTER, "flexkv_cluster_untold_gaps", "Times that changes were dropped: Redis was away.",
     (), _of_cluster("state.gaps")),
    (GAUGE, "flexkv_cluster_connections", "Connections of other nodes.",
     (), _of_cluster("connections")),
    (GAUGE, "flexkv_cluster_grants", "Grants that other nodes have now.",
     (), _of_cluster("grants.grants")),
    (GAUGE, "flexkv_cluster_granted_blocks", "Blocks of host memory that these keep in place.",
     (), _of_cluster("grants.pinned_blocks")),
    (COUNTER, "flexkv_cluster_wants", "What other nodes asked this one for, by outcome.",
     ("outcome",), _outcomes_of("grants", ("granted", "missed", "busy"))),
    (COUNTER, "flexkv_cluster_prefetched_wants", "Those that waited for the SSD.",
     (), _of_cluster("grants.prefetched")),
    (COUNTER, "flexkv_cluster_expired_grants", "Grants that ended because nothing was read.",
     (), _of_cluster("grants.expired")),
    (COUNTER, "flexkv_cluster_lent_bytes", "Bytes that other nodes were let read.",
     (), _of_cluster("lent_bytes")),
    (COUNTER, "flexkv_peer_read_blocks", "Blocks read from other nodes, with the right checksums.",
     (), _of_cluster("read_in_all.blocks")),
    (COUNTER, "flexkv_peer_read_bytes", "Bytes of these.", (), _of_cluster("read_in_all.bytes")),
    (COUNTER, "flexkv_peer_failures", "Reads from other nodes that brought less, by reason.",
     ("reason",), _outcomes_of("read_in_all", ("failed", "busy", "missing", "wrong"))),
    (GAUGE, "flexkv_mooncake_up", "Whether this node's engine of Mooncake runs.",
     (), _mooncake_up),
    (COUNTER, "flexkv_mooncake_starts", "How often it was started.", (), _of_mooncake("lives")),
    (COUNTER, "flexkv_mooncake_reads", "Reads from other nodes that it was asked for.",
     (), _of_mooncake("reads")),
    (COUNTER, "flexkv_mooncake_read_blocks", "Blocks it read, with the right checksums.",
     (), _of_mooncake("blocks")),
    (COUNTER, "flexkv_mooncake_failed_reads", "Reads by it that failed, or brought other bytes.",
     (), _of_mooncake("failed")),
    (COUNTER, "flexkv_mooncake_fallbacks", "Reads made over TCP, though Mooncake is configured.",
     (), _of_mooncake("fallbacks")),
    (GAUGE, "flexkv_mooncake_spoiled_bytes", "Bytes of its window that it may still write to.",
     (), _of_mooncake("spoiled_bytes")),
)  # fmt: skip
"""The metrics that the statistics have: kind, name, description, labels, and what reads them."""
