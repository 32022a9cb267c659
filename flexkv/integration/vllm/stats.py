"""The connector's counts for vLLM: per interval in its log, as totals in its Prometheus metrics."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from flexkv.observe.logs import get_logger

log = get_logger(__name__)

COUNTS: dict[str, str] = {
    "matches": "Prompts that were looked up.",
    "late_matches": "Matches put off to the next step: no answer yet, or too many open.",
    "hits": "Prompts of which blocks could be loaded.",
    "offered_blocks": "Blocks found beyond those that the engine had itself.",
    "declined_blocks": "Blocks found, but not loaded because computing them is faster.",
    "late_loads": "Prompts put off to the next step: other loads need the device's blocks.",
    "crowded_out_blocks": "Blocks found, but computed: their load waited too long for the device.",
    "fetches": "Prompts for which far blocks were fetched into host memory.",
    "fetch_waits": "Prompts that waited for far blocks.",
    "fetch_wait_ms": "Milliseconds that prompts waited for far blocks, in total.",
    "fetched_blocks": "Far blocks that arrived before their prompt stopped waiting.",
    "late_fetched_blocks": "Far blocks that arrived later.",
    "missing_far_blocks": "Far blocks that were asked for, but did not arrive.",
    "declined_far_blocks": "Far blocks not fetched: computing is faster, or too many under way.",
    "loads": "Loads that ended.",
    "loaded_blocks": "Blocks that were loaded.",
    "failed_blocks": "Blocks that could not be loaded, and are computed again.",
    "puts": "Puts that ended.",
    "stored_blocks": "Blocks that puts stored.",
    "failed_puts": "Puts that failed or were cancelled.",
}
"""Everything that is counted, with a description."""


class FlexKVStats(KVConnectorStats):
    """Counts of one interval, by name."""

    data: dict[str, Any]

    def count(self, name: str, by: int = 1) -> None:
        """Increase a count."""
        assert name in COUNTS, name
        self.data[name] = self.data.get(name, 0) + by

    def reset(self) -> None:
        """Set all counts to zero, for a new interval."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> FlexKVStats:
        """Add the counts of another rank or of a later step to these, and return these."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the values of one log line: the counts and the hit rate."""
        told: dict[str, int | float] = dict(self.data)
        if matches := self.data.get("matches"):
            told["hit_rate"] = round(self.data.get("hits", 0) / matches, 3)
        return told

    def is_empty(self) -> bool:
        """Return whether nothing was counted."""
        return not self.data


class Counts:
    """Counts of the scheduler's side, for vLLM and for a regular log line."""

    def __init__(self, log_every: int) -> None:
        """Create empty counts, which are logged after each `log_every` requests."""
        self._stats, self._recent = FlexKVStats(), FlexKVStats()
        self._log_every, self._finished = log_every, 0

    def count(self, name: str, by: int = 1) -> None:
        """Increase a count."""
        for stats in (self._stats, self._recent):
            stats.count(name, by)

    def request_ended(self) -> None:
        """Count the end of a request; log the counts after each `log_every`."""
        self._finished += 1
        if not self._finished % self._log_every:
            log.info("recent_requests", requests=self._log_every, **self._recent.reduce())
            self._recent.reset()

    def take(self) -> FlexKVStats | None:
        """Return the counts since the last call; None when there are none."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, FlexKVStats()
        return stats


class FlexKVPromMetrics(KVConnectorPromMetrics):
    """The same counts on vLLM's own endpoint: `flexkv_connector_*_total`, by engine."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }
            for name, told in COUNTS.items()
            for counter in [
                self._counter_cls(
                    name=f"flexkv_connector_{name}", documentation=told, labelnames=labelnames
                )
            ]
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counts."""
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
