"""Loading of traces: a file and its rotated predecessors, as far as they were written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path

import msgspec

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, MalformedError
from flexkv.observe.records import (
    SCHEMA_VERSION,
    DropRecord,
    EventRecord,
    HeaderRecord,
    OpRecord,
    PlanRecord,
    Record,
    RequestRecord,
    SampleRecord,
    TokensRecord,
)
from flexkv.trace.lines import lines_of


@dataclass
class Trace:
    """The records of one run, each kind in the order in which it was written."""

    header: HeaderRecord
    plans: dict[int, PlanRecord] = field(default_factory=dict)
    """By run id."""
    ops: list[OpRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    samples: list[SampleRecord] = field(default_factory=list)
    dropped: int = 0
    """Records that the writer lost, and lines that could not be read."""
    runs: int = 1
    """Runs in the files; only the last of them is loaded."""
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Prompts by request id, if the trace has them."""

    def take(self, record: Record) -> None:
        """Add a record."""
        match record:
            case PlanRecord():
                self.plans[record.run_id] = record
            case OpRecord():
                self.ops.append(record)
            case RequestRecord():
                self.requests.append(record)
            case EventRecord():
                self.events.append(record)
            case SampleRecord():
                self.samples.append(record)
            case TokensRecord():
                self.tokens[record.request_id] = record.token_ids
            case DropRecord():
                self.dropped += record.count
            case HeaderRecord():
                raise AssertionError("a header begins a trace")

    @property
    def begins_late(self) -> bool:
        """Return whether the first files of the run are gone."""
        return self.header.part > 0

    @property
    def begin_ns(self) -> int:
        """Return when the first recorded request arrived or op was issued."""
        firsts = [r.arrived_ns for r in self.requests] + [o.issued_ns for o in self.ops]
        return min(firsts, default=self.header.monotonic_ns)

    @property
    def end_ns(self) -> int:
        """Return when the last recorded request or op ended."""
        lasts = [r.ended_ns for r in self.requests] + [o.ended_ns for o in self.ops]
        return max(lasts, default=self.header.monotonic_ns)

    @property
    def seconds(self) -> float:
        """Return the seconds from `begin_ns` to `end_ns`."""
        return (self.end_ns - self.begin_ns) / 1e9


def load(path: Path) -> Trace:
    """Return the last run in a trace file and its rotated predecessors (`path.1`, `path.2`, …).

    A line that cannot be decoded, such as one cut short by a crash, is counted and skipped.

    Raises:
        ConfigError: there is no such file, it is no trace, or its last run has another version.
    """
    trace: Trace | None = None
    unread = runs = 0
    other_version: int | None = None
    for line in _lines(path):
        try:
            record = decoded(_DECODER, line)
        except MalformedError:
            unread += 1
            continue
        if not isinstance(record, HeaderRecord):
            if trace is not None:
                trace.take(record)
            continue
        if record.schema_version != SCHEMA_VERSION:
            other_version, trace, runs = record.schema_version, None, runs + 1
            continue
        if trace is None or not _goes_on(trace.header, record):
            trace, runs, unread = Trace(record), runs + 1, 0
    if trace is None and other_version is not None:
        why = f"has schema version {other_version}; this program reads {SCHEMA_VERSION}"
        raise ConfigError("trace", str(path), why)
    if trace is None:
        raise ConfigError("trace", str(path), "is not a FlexKV trace: it has no header")
    trace.dropped += unread
    trace.runs = runs
    return trace


_DECODER = msgspec.json.Decoder(Record)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of the files, those of the oldest first."""
    rotated = takewhile(os.path.exists, (Path(f"{path}.{n}") for n in count(1)))
    for each in (*reversed(list(rotated)), path):
        yield from lines_of(each, "trace")


def _goes_on(before: HeaderRecord, header: HeaderRecord) -> bool:
    """Return whether a header begins the next file of the same run."""
    return before.run == header.run
