"""Trace files: complete, rotated, and never in the way of the engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec import structs
from structlog.testing import capture_logs

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.kvmanager import KVManager
from flexkv.observe.recorder import BATCH_RECORDS, Recorder, header
from flexkv.observe.records import (
    DropRecord,
    EventRecord,
    HeaderRecord,
    OpRecord,
    PlannedOp,
    PlanRecord,
    Record,
    RequestRecord,
)
from flexkv.trace.breakdown import Breakdowns
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary
from flexkv.trace.view import page

DECODER = msgspec.json.Decoder(Record)


def op(number: int) -> OpRecord:
    """Return an op's record."""
    return OpRecord(number, number, 0, "device", "host→device", 1, 4096, 10, 15, 20, "done")


def read(path: Path) -> list[Record]:
    """Return the records of a file."""
    return [DECODER.decode(line) for line in path.read_bytes().splitlines()]


def test_every_record_is_written_behind_a_header(tmp_path: Path) -> None:
    """Close writes all queued records, behind a header."""
    path = tmp_path / "trace"
    recorder = Recorder(str(path), 1 << 20, 2, 1000)
    for number in range(100):
        recorder.record(op(number))
    recorder.close()
    recorder.close()
    header, *records = read(path)
    assert isinstance(header, HeaderRecord)
    assert records == [op(number) for number in range(100)]


def refused(path: Path) -> str:
    """Return why a trace cannot be written at a path."""
    with pytest.raises(ConfigError) as caught:
        Recorder(str(path), 1 << 20, 2, 1000)
    assert caught.value.field == "trace_file_path"
    return caught.value.why


def test_a_trace_is_written_to_files_of_ours_only(tmp_path: Path) -> None:
    """A trace is not written to another user's file or link, nor to a file writable by others."""
    path, other = tmp_path / "trace", tmp_path / "other"
    path.touch()
    path.chmod(0o666)
    assert "others may write to it" in refused(path)
    path.unlink()
    path.symlink_to(other)
    Recorder(str(path), 1 << 20, 2, 1000).close()
    assert len(read(other)) == 1, "a link of ours is followed"
    if os.geteuid() == 0:
        os.chown(path, 4321, -1, follow_symlinks=False)
        assert "is a symbolic link that another user made" in refused(path)
        os.chown(other, 4321, -1)
        assert "belongs to another user" in refused(other)
    assert len(read(other)) == 1


def test_a_rotated_trace_follows_no_link(tmp_path: Path) -> None:
    """A link at the name of the next trace file is removed, not written through."""
    path, other = tmp_path / "trace", tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "trace.new").symlink_to(other)
    recorder = Recorder(str(path), 1000, 2, 1000)
    for number in range(100):
        recorder.record(op(number))
    recorder.close()
    assert other.read_text() == "precious"
    assert (tmp_path / "trace.1").exists()


@pytest.mark.parametrize("max_files", [1, 3])
def test_files_are_rotated_by_size_and_count(tmp_path: Path, max_files: int) -> None:
    """Trace files are rotated by size, and no more are kept than configured."""
    path = tmp_path / "trace"
    recorder = Recorder(str(path), 1000, max_files, 1000)
    for number in range(100 * BATCH_RECORDS):
        recorder.record(op(number))
    recorder.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == max_files
    assert all(isinstance(read(file)[0], HeaderRecord) for file in files)
    assert all(file.stat().st_size < 1400 + 300 * BATCH_RECORDS for file in files)


def test_a_full_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue drops records without waiting, and the file ends with their count."""
    monkeypatch.setattr("flexkv.observe.recorder.QUEUE_RECORDS_MAX", 0)
    recorder = Recorder(str(tmp_path / "trace"), 1 << 20, 2, 1000)
    recorder.record(op(1))
    recorder.record(op(2))
    recorder.close()
    assert DropRecord(2) in read(tmp_path / "trace")


def test_a_full_disk_ends_the_trace_and_nothing_else() -> None:
    """A full disk ends the trace with one log line; recording and close still return."""
    with capture_logs() as logs:
        recorder = Recorder("/dev/full", 1 << 20, 2, 1)
        for number in range(10_000):
            recorder.record(op(number))
        recorder.close()
    assert [entry["event"] for entry in logs] == ["trace_ended"]


def test_a_path_that_cannot_be_written_is_named() -> None:
    """A path that cannot be written is a ConfigError that names the key."""
    with pytest.raises(ConfigError, match="trace_file_path"):
        Recorder("/proc/nowhere/trace", 1 << 20, 2, 1000)


def test_an_engine_records_every_request_and_op(tmp_path: Path) -> None:
    """An engine records each request and op, linked by the request's id, without the namespace."""
    path = tmp_path / "trace"

    async def run() -> None:
        model = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16")
        cache = CacheConfig(
            tokens_per_block=4, num_cpu_blocks=8, enable_trace=True, trace_file_path=str(path)
        )
        async with KVManager(model, cache) as manager:
            manager.register_kv_caches([np.zeros((2, 8, 4, 1, 8), np.float16)])
            await manager.put(np.arange(8), np.arange(8), namespace="tenant")
            await manager.get(np.arange(8), np.arange(8), namespace="tenant")

    asyncio.run(run())
    records = read(path)
    requests = [r for r in records if isinstance(r, RequestRecord)]
    ops = [r for r in records if isinstance(r, OpRecord)]
    assert [(r.kind, r.status, r.moved_blocks) for r in requests] == [
        ("put", "success", 2),
        ("get", "success", 2),
    ]
    assert [(o.request_id, o.route) for o in ops] == [
        (requests[0].request_id, "device→host"),
        (requests[1].request_id, "host→device"),
    ]
    assert all(o.issued_ns <= o.ended_ns and o.begun_ns <= o.ended_ns for o in ops)
    assert "tenant" not in path.read_text()


def test_a_line_that_a_crash_has_cut_takes_nothing_along(tmp_path: Path) -> None:
    """A line cut by a crash costs only itself, since the next run's header begins a new line.

    Only the owner of the file may read it.
    """
    path = tmp_path / "trace"
    for number in range(2):
        recorder = Recorder(str(path), 1 << 20, 2, 1000)
        recorder.record(op(number))
        recorder.close()
        if not number:
            path.write_bytes(path.read_bytes()[:-20])
    trace = load(path)
    assert (trace.runs, trace.ops, trace.dropped) == (2, [op(1)], 0)
    assert path.stat().st_mode & 0o077 == 0


def test_an_error_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    """An error text with bytes that are not UTF-8, as in a path, is written escaped."""
    path = tmp_path / "trace"
    recorder = Recorder(str(path), 1 << 20, 2, 1000)
    recorder.record(EventRecord(1, "tier_down", detail="/mnt/\udcff"))
    recorder.record(op(1))
    recorder.close()
    _, event, after = read(path)
    assert isinstance(event, EventRecord)
    assert (event.detail, after) == ("/mnt/\\udcff", op(1))


def test_plans_that_go_round_are_followed_once() -> None:
    """A plan with a cycle, as in a forged file, does not cause an endless loop."""
    request = RequestRecord(1, 1, "get", 16, 0, 1, "", b"", 10, 11, 30, "success", {"host": 1}, 1)
    trace = Trace(header())
    ops = PlannedOp("host→device", 1, (1,)), PlannedOp("disk→host", 1, (0,))
    plan = PlanRecord(1, 1, 11, ops)
    first = OpRecord(1, 1, 0, "device", "host→device", 1, 16, 12, 13, 20, "done")
    for record in (plan, first, structs.replace(first, op_id=1), request):
        trace.take(record)
    assert Breakdowns(trace).of(request).critical_ops in ((0, 1), (1, 0))


def test_nothing_in_a_trace_is_markup_of_its_page() -> None:
    """Text of a trace is escaped in the page, so that it is never markup."""
    pytest.importorskip("plotly")
    trace = Trace(header())
    trace.take(EventRecord(1, "tier_down", "disk", detail="<!--<script></script>"))
    content = page(Summary(trace)).partition('type="application/json">')[2]
    assert "<!--" not in content.partition("</script>")[0]
    assert "\\u003c!--\\u003cscript" in content
