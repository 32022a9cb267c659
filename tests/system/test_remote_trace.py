"""What a trace tells of the remote tier: of real engines over a shared directory."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.observe.records import EventRecord, HeaderRecord
from flexkv.trace.breakdown import Breakdowns
from flexkv.trace.chrome import chrome
from flexkv.trace.findings import findings
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary
from flexkv.trace.view import data

from .test_remote import BLOCKS, SPAN, WHOLE, Node, listed, prompt

PROMPTS = 4
IN, OUT = "remote→host", "host→remote"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the thresholds of slowness above what a busy machine takes to run a thread."""
    for name in ("SLOW_STORE_MS", "STARVED_MS"):
        monkeypatch.setattr(f"flexkv.trace.findings.{name}", 60_000.0)


async def stored(folder: Path) -> Trace:
    """Store prompts in the shared directory, so slowly that spans wait, and return the trace."""
    remote = {"remote_cache_path": f"file://{folder}/shared", "remote_write_mb_per_s": 2.0}
    async with Node(remote) as node:
        with node.manager.trace(folder / "out"):
            for seed in range(PROMPTS):
                await node.put(seed)
    return load(folder / "out")


async def loaded(
    folder: Path, work: Callable[[Node], Awaitable[None]], before: Callable[[], None] = lambda: None
) -> Trace:
    """Work with another engine, after something happened to the store it has listed."""
    remote = {"remote_cache_path": f"file://{folder}/shared"}
    async with Node(remote, remote_list_per_s=0) as node:
        await node.until(listed)
        before()
        with node.manager.trace(folder / "in"):
            await work(node)
    return load(folder / "in")


async def get_all(node: Node) -> None:
    """Get every prompt."""
    for seed in range(PROMPTS):
        await node.get(seed)


async def get_and_prefetch(node: Node) -> None:
    """Get one prompt, and prefetch another."""
    assert await node.get(0) == WHOLE
    await node.manager.prefetch(prompt(1, BLOCKS))


def objects(folder: Path) -> list[Path]:
    """Return the files of spans."""
    found = [
        each for each in (folder / "shared").rglob("*") if re.fullmatch("[0-9a-f]{32}", each.name)
    ]
    return [each for each in found if each.is_file()]


async def test_both_ways_are_in_the_trace(tmp_path: Path) -> None:
    """Ships and fetches have records, figures, lanes and flows of their own; nothing was wrong."""
    out, into = await stored(tmp_path), await loaded(tmp_path, get_and_prefetch)
    ships = [op for op in out.ops if op.route == OUT]
    assert {(op.actor, op.block_count, op.outcome) for op in ships} == {("remote", SPAN, "done")}
    assert len(ships) == PROMPTS * WHOLE // SPAN
    assert max(sum(sample.owed["remote"]) for sample in out.samples) > 0
    summary = Summary(into)
    assert summary.routes[IN].blocks == 2 * WHOLE
    assert summary.hits["remote"] == WHOLE / BLOCKS
    assert findings(summary) == findings(Summary(out)) == []
    shown, sankey = data(summary), data(summary)["sankey"]
    assert IN in shown["routes"]
    at = sankey["route"].index(IN)
    ends = (sankey["labels"][sankey[side][at]] for side in ("source", "target"))
    assert tuple(ends) == ("remote, loaded", "host, loaded")
    assert "remote (directory)" in shown["facts"]
    assert "remote" in {each["name"] for each in shown["queues"]}
    assert "waiting for remote" in {each["what"] for each in shown["steps"]}
    assert IN.encode() in chrome(into)
    sankey = data(Summary(out))["sankey"]
    assert {"host, stored", "remote, stored"} <= set(sankey["labels"])


async def test_a_breakdown_says_how_long_a_request_waited_for_the_store(tmp_path: Path) -> None:
    """The critical path of a get is the fetch and then the copy; the fetch has a name of its own.

    A prefetch waits for the store, too, and `flexkv trace summary` says so of both.
    """
    await stored(tmp_path)
    trace = await loaded(tmp_path, get_and_prefetch)
    breakdowns = Breakdowns(trace)
    get, prefetch = trace.requests
    steps = breakdowns.of(get).steps
    assert [step.what for step in steps if step.op_id >= 0 and "queued" not in step.what] == [
        "waiting for remote", "host→device",
    ]  # fmt: skip
    fetch = next(op for op in trace.ops if op.run_id == get.run_id and op.route == IN)
    assert breakdowns.of(get).shares["waiting for remote"] == fetch.ended_ns - fetch.begun_ns
    assert breakdowns.of(prefetch).shares["waiting for remote"] > 0
    told = CliRunner().invoke(commands, ["trace", "summary", str(tmp_path / "in")])
    assert told.exit_code == 0
    assert "nothing was wrong" in told.output
    assert told.output.count("waiting for remote") >= 2


async def test_hints_that_are_often_wrong_are_a_finding(tmp_path: Path) -> None:
    """Spans that were deleted since the listing are misses, and named once there are some."""
    await stored(tmp_path)

    def delete() -> None:
        for each in objects(tmp_path):
            each.unlink()

    trace = await loaded(tmp_path, get_all, delete)
    assert {op.outcome for op in trace.ops} == {"MissingBlockError"}
    (found,) = findings(Summary(trace))
    assert (found.kind, found.times) == ("wrong_hints", PROMPTS)
    assert "remote_list_per_s" in found.text
    trace.ops = trace.ops[:2]
    assert findings(Summary(trace)) == []


async def test_wrong_bytes_blame_the_store_and_not_the_drive(tmp_path: Path) -> None:
    """Objects with other bytes than were stored are a finding that names the store."""
    await stored(tmp_path)

    def spoil() -> None:
        for each in objects(tmp_path):
            content = bytearray(each.read_bytes())
            content[100] ^= 1
            each.chmod(0o600)
            each.write_bytes(content)

    trace = await loaded(tmp_path, get_all, spoil)
    (found,) = findings(Summary(trace))
    assert (found.kind, found.times) == ("corrupt", PROMPTS)
    assert "the remote store" in found.text
    assert "drive" not in found.text


async def test_a_slow_store_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is slow if fetches take long and are a large share of the time; both must hold."""
    await stored(tmp_path)
    summary = Summary(await loaded(tmp_path, get_and_prefetch))
    monkeypatch.setattr("flexkv.trace.findings.SLOW_STORE_MS", 0.0)
    monkeypatch.setattr("flexkv.trace.findings.SLOW_STORE_SHARE", 0.0)
    (found,) = findings(summary)
    assert (found.kind, found.times) == ("slow_store", 2)
    assert found.text.startswith(f"{IN} is slow")
    monkeypatch.setattr("flexkv.trace.findings.SLOW_STORE_SHARE", 1.0)
    assert findings(summary) == []


@pytest.mark.parametrize(
    ("tier", "key"),
    [
        ("remote", "remote_write_mb_per_s"),
        ("remote", "remote_write_window_mb"),
        ("disk", "write_behind_wait_s"),
    ],
)
def test_spans_given_up_name_what_bounds_their_tier(tier: str, key: str) -> None:
    """Blocks that were never written are a finding, which names the tier's own key."""
    trace = Trace(HeaderRecord(3, "", 0, 0))
    trace.take(EventRecord(5, "given_up", tier, detail="16 blocks; so far: evicted 16"))
    (found,) = findings(Summary(trace))
    assert found.kind == "given_up"
    assert f"{tier} tier" in found.text
    assert key in found.text
