"""Tests that a trace of an engine names each thing that went wrong, and nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.engine.engine import Engine
from flexkv.kvmanager import KVManager
from flexkv.observe.records import SCHEMA_VERSION, schema
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.tiers.limits import disk_windows
from flexkv.trace.breakdown import ADMISSION, Breakdowns
from flexkv.trace.chrome import chrome
from flexkv.trace.findings import findings
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary, rates

from .conftest import MODEL as REAL_MODEL
from .conftest import PER_BLOCK, cache_config, kv_caches, slots_of

BLOCKS, DEVICE_BLOCKS = 16, 64


class Rig:
    """An engine over fake ports on the real clock that writes a trace."""

    def __init__(
        self, folder: Path, disk: FaultPlan, device_s: float = 0.0005, **changes: Any
    ) -> None:
        self.path = folder / "trace"
        host_blocks = changes.pop("num_cpu_blocks", 256)
        device = FaultPlan(7, delay_min_s=device_s / 2, delay_max_s=device_s)
        backend = FakeBackend(host_blocks, disk, empty(96), device)
        config = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=host_blocks,
            num_ssd_blocks=96,
            ssd_cache_dir="/fake",
            enable_trace=True,
            trace_file_path=str(self.path),
            **changes,
        )
        backend.windows = disk_windows(config)
        self.engine = Engine(MODEL, config, backend)

    async def request(self, operation: Operation, prompt: Any, blocks: int = BLOCKS) -> Any:
        """Run one request over the first device blocks."""
        request = self.engine.requests.intake(operation, prompt)
        slots = np.arange(blocks * TOKENS_PER_BLOCK)
        ready = self.engine.requests.with_slots(request, slots)
        assert ready is not None
        return (await self.engine.requests.perform(ready)).response


def prompt_of(number: int, blocks: int = BLOCKS) -> Any:
    """Return a prompt that shares nothing with others."""
    return np.arange(blocks * TOKENS_PER_BLOCK) + 10_000 * number


async def traced(rig: Rig, work: Callable[[Rig], Awaitable[None]]) -> Trace:
    """Run a function on an open engine, and return the trace that it left."""
    await rig.engine.open()
    rig.engine.register_kv_caches([np.zeros((DEVICE_BLOCKS, 16), np.uint8)])
    await work(rig)
    await rig.engine.close()
    return load(rig.path)


async def from_disk(rig: Rig) -> None:
    """Put some prompts, and get them from SSD."""
    for number in range(3):
        await rig.request(Operation.PUT, prompt_of(number))
    await rig.engine.flush()
    rig.engine.retention.clear(next(iter(rig.engine.residency.tiers)))
    for number in range(3):
        await rig.request(Operation.GET, prompt_of(number))


async def many_at_once(rig: Rig) -> None:
    """Make more requests than are admitted at once."""
    await asyncio.gather(*(rig.request(Operation.PUT, prompt_of(n)) for n in range(12)))


async def cancelled(rig: Rig) -> None:
    """Cancel a request in the middle."""
    work = asyncio.create_task(rig.request(Operation.PUT, prompt_of(1)))
    await asyncio.sleep(0.005)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def too_long(rig: Rig) -> None:
    """Put more than there is room for."""
    await rig.request(Operation.PUT, prompt_of(1, 40), 40)


SOUND = FaultPlan(1, delay_max_s=0.001)
CASES: dict[str, tuple[dict[str, Any], Callable[[Rig], Awaitable[None]]]] = {
    "slow_disk": ({"disk": FaultPlan(1, delay_min_s=0.15, delay_max_s=0.2)}, from_disk),
    "starved_queue": ({"disk": SOUND, "device_s": 0.15, "requests_max": 1}, many_at_once),
    "cancelled": ({"disk": SOUND, "device_s": 0.05}, cancelled),
    "corrupt": ({"disk": FaultPlan(1, delay_max_s=0.001, flip_probability=1.0)}, from_disk),
    "full_tier": ({"disk": SOUND, "num_cpu_blocks": 24}, too_long),
}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the thresholds of slowness above what a busy machine takes to run a thread."""
    for name in ("SLOW_DISK_MS", "STARVED_MS"):
        monkeypatch.setattr(f"flexkv.trace.findings.{name}", 60.0)


@pytest.mark.parametrize("kind", CASES)
async def test_what_was_wrong_is_named(kind: str, tmp_path: Path) -> None:
    """What went wrong is named in the findings, and by `flexkv trace summary`."""
    changes, work = CASES[kind]
    trace = await traced(Rig(tmp_path, **changes), work)
    found = findings(Summary(trace))
    assert {finding.kind for finding in found} == {kind}
    assert trace.begin_ns <= found[0].at_ns <= trace.end_ns
    told = CliRunner().invoke(commands, ["trace", "summary", str(tmp_path / "trace")])
    assert told.exit_code == 0
    assert kind in told.output
    assert found[0].text.split()[0] in told.output


@pytest.mark.parametrize("work", [from_disk, many_at_once])
async def test_where_nothing_is_wrong_nothing_is_said(
    work: Callable[[Rig], Awaitable[None]], tmp_path: Path
) -> None:
    """The same work with a sound device and room for all has no findings."""
    trace = await traced(Rig(tmp_path, SOUND), work)
    assert findings(Summary(trace)) == []


async def test_time_adds_up_to_the_whole_request(tmp_path: Path) -> None:
    """The steps of a request have no gaps, and waits for admission are steps of their own."""
    trace = await traced(Rig(tmp_path, SOUND, requests_max=2), many_at_once)
    breakdowns = Breakdowns(trace)
    waited = 0
    for request in trace.requests:
        steps = breakdowns.of(request).steps
        assert (steps[0].begin_ns, steps[-1].end_ns) == (request.arrived_ns, request.ended_ns)
        for before, after in pairwise(steps):
            assert before.end_ns == after.begin_ns
        waited += any(step.what == ADMISSION for step in steps)
    assert waited == 10


async def test_a_get_from_ssd_hangs_on_the_read_and_then_the_copy(tmp_path: Path) -> None:
    """The critical path of a get from SSD is the read and then the copy."""
    trace = await traced(Rig(tmp_path, FaultPlan(1, delay_min_s=0.03, delay_max_s=0.04)), from_disk)
    get = next(r for r in trace.requests if r.kind == "get")
    breakdown = Breakdowns(trace).of(get)
    ops = Breakdowns(trace).ops_of(get.run_id)
    assert [ops[number].route for number in breakdown.critical_ops] == ["disk→host", "host→device"]
    assert next(iter(breakdown.shares)) == "disk→host"
    assert re.search(r"9\d % disk→host \(\d", breakdown.words)


async def test_every_line_is_as_the_schema_says(tmp_path: Path) -> None:
    """The schema's document is up to date, and every line of a trace of all kinds is valid."""
    document = Path(__file__).parents[2] / "docs/trace-schema.json"
    assert json.loads(document.read_text()) == json.loads(json.dumps(schema()))
    plan = FaultPlan(1, 0.3, delay_max_s=0.001, flip_probability=0.5)

    async def work(rig: Rig) -> None:
        for number in range(8):
            await rig.request(Operation.PUT, prompt_of(number))
            await rig.request(Operation.GET, prompt_of(number))
        work = asyncio.create_task(rig.request(Operation.GET, prompt_of(1)))
        await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.wait([work])

    await traced(Rig(tmp_path, plan, device_s=0.02), work)
    validator = jsonschema.Draft202012Validator(schema())
    kinds = set()
    for line in (tmp_path / "trace").read_text().splitlines():
        validator.validate(json.loads(line))
        kinds.add(json.loads(line)["type"])
    assert kinds >= {"header", "plan", "op", "request", "event", "sample"}


async def test_a_trace_begins_and_ends_while_the_engine_runs(tmp_path: Path) -> None:
    """A trace can start and stop on a running engine, one at a time; then its file is whole."""
    path = tmp_path / "later"
    async with KVManager(REAL_MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(np.arange(8 * PER_BLOCK), slots_of(range(8)))
        with manager.trace(path):
            with pytest.raises(ConfigError, match="is already being recorded"):
                manager.trace_start(str(path))
            await manager.get(np.arange(8 * PER_BLOCK), slots_of(range(20, 28)))
        await manager.get(np.arange(8 * PER_BLOCK), slots_of(range(30, 38)))
        trace = load(path)
        assert [request.kind for request in trace.requests] == ["get"]
        assert [op.route for op in trace.ops] == ["host→device"]
        assert trace.header.tokens_per_block == PER_BLOCK
        assert len(trace.requests[0].keys) == 8 * 6
        assert manager.trace_stop() is None


async def test_a_trace_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """A trace cut short is read up to there; other versions and other files are refused by name."""
    rig = Rig(tmp_path, SOUND)
    await traced(rig, from_disk)
    whole = rig.path.read_bytes()
    rig.path.write_bytes(whole[:-30])
    trace = load(rig.path)
    assert (trace.dropped, len(trace.requests) + len(trace.ops) > 10) == (1, True)
    for wrong, why in (
        (b"", "no header"),
        (b"hello\n", "no header"),
        (_of_another_version(whole), "version 99"),
    ):
        rig.path.write_bytes(wrong)
        with pytest.raises(ConfigError, match=why):
            load(rig.path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nothing")
    rig.path.write_bytes(_of_another_version(whole) + whole)
    assert (load(rig.path).runs, load(rig.path).requests) == (2, trace.requests)


def _of_another_version(whole: bytes) -> bytes:
    ours = f'"schema_version":{SCHEMA_VERSION}'.encode()
    assert ours in whole
    return whole.replace(ours, b'"schema_version":99')


async def test_files_that_were_rotated_away_are_told(tmp_path: Path) -> None:
    """A finding reports files that were rotated away; no two engines write one trace."""
    rig = Rig(tmp_path, SOUND, trace_max_file_size_mb=0.004, trace_max_files=1)

    async def with_another(rig: Rig) -> None:
        for _ in range(4):
            await from_disk(rig)
        with pytest.raises(ConfigError, match="another engine is writing its trace there"):
            await Rig(tmp_path, SOUND).engine.open()

    trace = await traced(rig, with_another)
    assert trace.begins_late
    assert [found.kind for found in findings(Summary(trace))] == ["rotated_away"]


async def test_evictions_are_told_with_the_request_that_needed_room(tmp_path: Path) -> None:
    """Evictions name the tier and the request that needed room, and sum up as in the samples."""
    rig = Rig(tmp_path, SOUND, num_cpu_blocks=40)

    async def more_than_fits(rig: Rig) -> None:
        for number in range(8):
            await rig.request(Operation.PUT, prompt_of(number))

    trace = await traced(rig, more_than_fits)
    evicted = [event for event in trace.events if event.kind == "evicted"]
    assert {event.tier for event in evicted} >= {"host"}
    assert {event.request_id for event in evicted} <= {r.request_id for r in trace.requests}
    told = sum(int(event.detail.split()[0]) for event in evicted if event.tier == "host")
    assert 0 < told <= Summary(trace).evicted["host"]


async def test_prompts_are_recorded_only_where_that_is_asked_for(tmp_path: Path) -> None:
    """Tokens are recorded only if that is asked for; so is a request that no device could serve."""
    rig = Rig(tmp_path, SOUND, trace_tokens=True)
    await rig.engine.open()
    request = rig.engine.requests.intake(Operation.GET, prompt_of(3))
    assert rig.engine.requests.with_slots(request, np.arange(BLOCKS * TOKENS_PER_BLOCK)) is None
    rig.engine.requests.unready(request)
    rig.engine.tracing.stop()
    trace = load(rig.path)
    assert [r.status for r in trace.requests] == ["unready"]
    assert trace.tokens == {request.request_id: tuple(prompt_of(3).tolist())}
    rig.engine.tracing.start(str(tmp_path / "silent"), False)
    rig.engine.requests.intake(Operation.GET, prompt_of(3))
    await rig.engine.close()
    assert load(tmp_path / "silent").tokens == {}


async def test_two_runs_are_compared_and_exported(tmp_path: Path) -> None:
    """`trace diff` names findings of only one run, and the export to Perfetto is well-formed."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, plan in zip(folders, (SOUND, CASES["slow_disk"][0]["disk"]), strict=True):
        folder.mkdir()
        await traced(Rig(folder, plan), from_disk)
    one, two = (str(folder / "trace") for folder in folders)
    told = CliRunner().invoke(commands, ["trace", "diff", one, two])
    assert "get p99, ms" in told.output
    assert "slow_disk" in told.output
    told = CliRunner().invoke(commands, ["trace", "export", two, "-o", str(tmp_path / "x.json")])
    assert told.exit_code == 0
    for verb in ("view", "export"):
        told = CliRunner().invoke(commands, ["trace", verb, two, "-o", "/nowhere/x"])
        assert "output='/nowhere/x': cannot be written: No such file" in str(told.exception)
    events = json.loads(chrome(load(Path(two))))["traceEvents"]
    assert events == json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    spans = [(e["ph"], e["cat"], e["id"]) for e in events if e["ph"] in "be"]
    begun = {(cat, number) for phase, cat, number in spans if phase == "b"}
    ended = {(cat, number) for phase, cat, number in spans if phase == "e"}
    assert begun == ended
    assert len(spans) == 2 * len(begun)


async def test_rates_spread_bytes_over_the_time_they_took(tmp_path: Path) -> None:
    """Rates, summed over their windows, give the bytes that were moved."""
    trace = await traced(Rig(tmp_path, SOUND), from_disk)
    ops = [op for op in trace.ops if op.outcome == "done"]
    _, per_s = rates(ops, 1_000_000)
    assert per_s.sum() * 0.001 == pytest.approx(sum(op.bytes for op in ops))
