"""Prometheus metrics of one engine: served over HTTP, or in a registry of the caller's.

Most counters, and the gauges, are read from `statistics()` at each scrape. Histograms,
`flexkv_missed_blocks` and the slowest requests come from the records that a trace also gets, from
the moment on that this collector is made. Times are in seconds; names say whether sizes are in
bytes or blocks.

    with MetricsServer(manager, port=8080):
        ...                                   # curl http://127.0.0.1:8080/metrics
"""

from __future__ import annotations

import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any, Self, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flexkv.common.errors import ClosedError, ConfigError, FlexKVError
from flexkv.engine.statistics import Statistics
from flexkv.kvmanager import KVManager
from flexkv.observe.records import OpRecord, Record, RequestRecord
from flexkv.process import forks
from flexkv.process.forks import HomeProcess
from flexkv.tiers.parts import StoreStatistics

BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10,
)  # fmt: skip
"""The upper bounds of the histograms' buckets."""
SLOWEST_NS = 60_000_000_000
"""The least time for which the slowest request is remembered."""
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in BOUNDS_S)

Labels: TypeAlias = tuple[str, ...]
Values: TypeAlias = Iterable[tuple[Labels, Any]]
Reader: TypeAlias = Callable[[Statistics], Values]
Kind: TypeAlias = type[CounterMetricFamily | GaugeMetricFamily]

COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily

HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "flexkv_request_seconds": ("Time from a request's arrival to its answer.", ("operation",)),
    "flexkv_transfer_queue_seconds": ("Time that a transfer waits for its turn.", ("route",)),
    "flexkv_transfer_seconds": (
        "Time that the device or the disk takes for a transfer.",
        ("route",),
    ),
}
"""The description and the labels of each histogram, by name."""


class Histogram:
    """Counts of durations by bucket; the last bucket has no upper bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_ns = 0

    def observe(self, ns: int) -> None:
        """Count a duration."""
        self.counts[bisect_left(_BOUNDS_NS, ns)] += 1
        self.sum_ns += ns


class Slowest:
    """The slowest request of the last minute or two, of each kind."""

    def __init__(self) -> None:
        self._begun_ns = 0
        self._now: dict[str, RequestRecord] = {}
        self._before: dict[str, RequestRecord] = {}

    def take(self, record: RequestRecord) -> None:
        """Consider a request that ended."""
        if record.ended_ns - self._begun_ns >= SLOWEST_NS:
            self._begun_ns, self._before, self._now = record.ended_ns, self._now, {}
        slowest = self._now.get(record.kind)
        if slowest is None or record.took_ns > slowest.took_ns:
            self._now[record.kind] = record

    def by_kind(self) -> dict[str, RequestRecord]:
        """Return the record of the slowest request of each kind."""
        return {
            kind: max(
                (of[kind] for of in (self._now, self._before) if kind in of),
                key=attrgetter("took_ns"),
            )
            for kind in sorted(self._now | self._before)
        }


class Metrics(Collector):
    """The metrics of one engine: a collector for any registry, and a sink of trace records.

    Attributes:
        missed_blocks: blocks that gets asked for and did not load, by reason.
    """

    def __init__(self, manager: KVManager, name: str | None = None, instance: int = 0) -> None:
        """Start to collect from a manager that is started.

        Args:
            manager: the manager to report on.
            name: the label `engine` of every sample; by default the model's `model_id`.
            instance: the label `instance`, which distinguishes engines of one name.

        Raises:
            ClosedError: the manager is not started.
        """
        self._manager = manager
        engine = manager.engine.model.model_id if name is None else name
        self._labels = {"engine": engine, "instance": str(instance)}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self.missed_blocks: dict[str, int] = {}
        self._slowest = Slowest()
        self._lock = threading.Lock()
        manager.on_loop(lambda: manager.engine.tracing.tell(self))

    def close(self) -> None:
        """Stop collecting."""
        manager = self._manager
        with suppress(ClosedError):  # a closed manager sends no records any more
            manager.on_loop(lambda: manager.engine.tracing.tell_no_more(self))

    # -- what happens, on the engine's loop -----------------------------------------------------

    def record(self, record: Record) -> None:
        """Count what a record tells."""
        with self._lock:  # scrapes are served from another thread
            self._take(record)

    def _take(self, record: Record) -> None:
        if isinstance(record, OpRecord):
            if record.outcome != "recalled":
                labels = (record.route,)
                self._observe(
                    "flexkv_transfer_queue_seconds", labels, record.begun_ns - record.issued_ns
                )
                self._observe("flexkv_transfer_seconds", labels, record.ended_ns - record.begun_ns)
        elif isinstance(record, RequestRecord):
            self._observe("flexkv_request_seconds", (record.kind,), record.took_ns)
            self._slowest.take(record)
            missed = record.asked_blocks - record.moved_blocks
            if record.kind == "get" and missed > 0:
                reason = _reason(record)
                self.missed_blocks[reason] = self.missed_blocks.get(reason, 0) + missed

    def _observe(self, name: str, labels: Labels, ns: int) -> None:
        of_name = self._histograms[name]
        histogram = of_name.get(labels)
        if histogram is None:
            histogram = of_name[labels] = Histogram()
        histogram.observe(ns)

    # -- what is asked for, in any thread -------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Yield every metric as it is now; for a closed engine only `flexkv_up`, which is 0."""
        for family in self._families():
            family.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in family.samples
            ]
            yield family

    def _families(self) -> Iterator[Metric]:
        told = "Whether the engine accepts requests."
        try:
            statistics = self._manager.engine.statistics()
        except FlexKVError:
            yield _family(GAUGE, "flexkv_up", told, (), [((), 0)])
            return
        yield _family(GAUGE, "flexkv_up", told, (), [((), 1)])
        for kind, name, told, labels, values in FIGURES:
            yield _family(kind, name, told, labels, values(statistics))
        block_bytes = self._manager.engine.sizes.block_stride_bytes
        sizes = [((n,), t.capacity_blocks * block_bytes) for n, t in statistics.own_tiers.items()]
        told = "Bytes that a tier has room for."
        yield _family(GAUGE, "flexkv_tier_capacity_bytes", told, ("tier",), sizes)
        with self._lock:
            told_so_far = [
                _histogram(name, told, labels, self._histograms[name])
                for name, (told, labels) in HISTOGRAMS.items()
            ]
            slowest = self._slowest.by_kind()
            missed = [((reason,), blocks) for reason, blocks in self.missed_blocks.items()]
        yield from told_so_far
        told = "Requested blocks that gets did not load, by reason."
        yield _family(COUNTER, "flexkv_missed_blocks", told, ("reason",), missed)
        took = [((kind,), record.took_ns / 1e9) for kind, record in slowest.items()]
        told = "Time of the slowest request of the last minute."
        yield _family(GAUGE, "flexkv_slowest_request_seconds", told, ("operation",), took)
        ids = [((kind,), record.request_id) for kind, record in slowest.items()]
        told = "Id of the slowest request of the last minute; traces have the same ids."
        yield _family(GAUGE, "flexkv_slowest_request_id", told, ("operation",), ids)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, because the metrics depend on the configured tiers."""
        return ()


def _reason(record: RequestRecord) -> str:
    """Return why a get loaded less than it asked for."""
    if record.status in ("cancelled", "timeout"):
        return record.status
    return {
        "": "not_stored",
        "CapacityError": "no_room",
        "CorruptBlockError": "corrupt",
        "MissingBlockError": "not_stored",
        "DeadlineError": "late",
    }.get(record.error, "failed")


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
)  # fmt: skip
"""The metrics that the statistics have: kind, name, description, labels, and what reads them."""


def _family(kind: Kind, name: str, told: str, labels: Labels, values: Values) -> Metric:
    family = kind(name, told, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _histogram(
    name: str, told: str, labels: Labels, histograms: Mapping[Labels, Histogram]
) -> Metric:
    family = HistogramMetricFamily(name, told, labels=labels)
    for of, histogram in histograms.items():
        below, buckets = 0, []
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), histogram.counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric(of, buckets, histogram.sum_ns / 1e9)
    return family


class MetricsServer:
    """Serves the metrics of one manager over HTTP, at `/metrics`, until it is closed."""

    def __init__(
        self,
        manager: KVManager,
        port: int = 8080,
        host: str = "127.0.0.1",
        name: str | None = None,
        instance: int = 0,
    ) -> None:
        """Start to serve.

        Args:
            manager: a manager that is started.
            port: the port to listen at; 0 takes any free one.
            host: the address to listen at; "0.0.0.0" or "::" stands for all addresses of this
                machine, for scrapers elsewhere. Only the metrics are served there.
            name: as for `Metrics`.
            instance: as for `Metrics`.

        Raises:
            ConfigError: the port is in use or not allowed, or the host is not this machine's.
            ClosedError: the manager is not started.
        """
        self.metrics = Metrics(manager, name, instance)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.metrics)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError, ValueError, TypeError) as error:
            self.metrics.close()
            if isinstance(error, socket.gaierror | UnicodeError):
                why = f"is not an address of this machine: {error}"
                raise ConfigError("metrics_host", host, why) from error
            why = f"cannot listen on {host}: {error}"
            raise ConfigError("py_metrics_port", port, why) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._home = HomeProcess("the metrics server")
        forks.on_fork(self._let_go_in_child)

    def _let_go_in_child(self) -> None:
        forks.close_socket(self._server.socket)

    def close(self) -> None:
        """Stop serving. Call this before the manager is shut down.

        Raises:
            ClosedError: this is a forked child of the process that serves.
        """
        self._home.check()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._home.is_here:
            self.close()
