"""Turns the trace of an engine on and off while the engine runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexkv.common.config import MB, CacheConfig, CacheSizes
from flexkv.common.errors import ConfigError
from flexkv.engine.statistics import Sources
from flexkv.observe.observer import Observer
from flexkv.observe.recorder import Recorder, header
from flexkv.observe.records import HeaderRecord, SampleRecord, TokensRecord
from flexkv.observe.tracer import Sink, Tracer


class Tracing:
    """The trace of one engine."""

    def __init__(
        self, cache: CacheConfig, sizes: CacheSizes, observer: Observer, of: Sources
    ) -> None:
        self._cache, self._block_bytes = cache, sizes.block_bytes
        self._observer, self._of = observer, of
        self._recorder: Recorder | None = None
        self._with_tokens = False

    @property
    def path(self) -> str | None:
        """Return the path of the file that is being written; None while no trace is on."""
        return None if self._recorder is None else self._recorder.path

    def start(self, path: str | None = None, with_tokens: bool | None = None) -> None:
        """Record to a file from now on, by default to `trace_file_path`.

        `with_tokens` says whether to record prompts in clear; by default as `trace_tokens` says.

        Raises:
            ConfigError: a trace is on already, or the file cannot be written.
        """
        if self._recorder is not None:
            raise ConfigError("trace", self.path, "is already being recorded: stop it first")
        cache = self._cache
        self._recorder = Recorder(
            path or cache.trace_file_path,
            int(cache.trace_max_file_size_mb * MB),
            cache.trace_max_files,
            cache.trace_flush_interval_ms,
            self._header,
        )
        self._with_tokens = cache.trace_tokens if with_tokens is None else with_tokens
        self.tell(self._recorder)
        self._recorder.record(self._sample(self._observer.now_ns()))

    def stop(self) -> str | None:
        """Write what is queued, and stop; return the file's path, or None if no trace was on."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        recorder.record(self._sample(self._observer.now_ns()))
        self.tell_no_more(recorder)
        recorder.close()
        return recorder.path

    def asked(self, request_id: int, token_ids: Any) -> None:
        """Record a request's prompt, if the trace has prompts in clear."""
        if self._recorder is not None and self._with_tokens:
            tokens = tuple(np.asarray(token_ids).tolist())
            self._recorder.record(TokensRecord(request_id, tokens))

    def tell(self, sink: Sink) -> None:
        """Pass records of everything that happens from now on to a sink."""
        tracer = self._observer.tracer
        if tracer is not None:
            tracer.sinks.append(sink)
            return
        for actor in self._of.actors.values():
            actor.note_begins(True)
        of = self._of
        self._observer.tracer = Tracer(
            [sink], self._block_bytes, of.actors, of.residency, self._sample, self._peer_of
        )

    def _peer_of(self, holder: int) -> str:
        cluster = self._of.cluster
        return str(holder) if cluster is None else cluster.address_of(holder)

    def tell_no_more(self, sink: Sink) -> None:
        """Stop passing records to a sink."""
        tracer = self._observer.tracer
        if tracer is None or sink not in tracer.sinks:
            return
        tracer.sinks.remove(sink)
        if not tracer.sinks:
            self._observer.tracer = None
            for actor in self._of.actors.values():
                actor.note_begins(False)

    @property
    def is_on(self) -> bool:
        """Return whether any sink gets records."""
        return self._observer.tracer is not None

    def _header(self) -> HeaderRecord:
        residency = self._of.residency
        return header(
            tokens_per_block=self._cache.tokens_per_block,
            block_bytes=self._block_bytes[0],
            group_block_bytes=tuple(self._block_bytes),
            capacity_blocks={t.label: residency.counts(t).capacity for t in residency.tiers},
            backing={tier.label: name for tier, name in self._of.backing.items()},
        )

    def _sample(self, now_ns: int) -> SampleRecord:
        of = self._of
        tiers = {}
        for tier in of.residency.tiers:
            counts = of.residency.counts(tier)
            tiers[tier.label] = counts.capacity - counts.free, counts.pinned, counts.evicted
        actors = {
            actor.name: (actor.depth, actor.in_flight_bytes[True], actor.in_flight_bytes[False])
            for actor in of.actors.values()
        }
        behind = {tier: of.behind.counts(tier) for tier in of.behind.tiers}
        return SampleRecord(
            now_ns,
            tiers,
            actors,
            of.scheduler.flights,
            of.admission.waiting + of.behind.waiting_requests,
            {tier.label: (each.owed_blocks, each.writing_blocks) for tier, each in behind.items()},
        )
