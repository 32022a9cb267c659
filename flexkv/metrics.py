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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flexkv.common.errors import ClosedError, ConfigError, FlexKVError
from flexkv.figures import COUNTER, FIGURES, GAUGE, Kind, Labels, Values
from flexkv.kvmanager import KVManager
from flexkv.observe.records import OpRecord, Record, RequestRecord
from flexkv.process import forks
from flexkv.process.forks import HomeProcess

BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10,
)  # fmt: skip
"""The upper bounds of the histograms' buckets."""
SLOWEST_NS = 60_000_000_000
"""The least time for which the slowest request is remembered."""
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in BOUNDS_S)

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
