"""`flexkv trace replay`: recorded requests issued again, under any configuration, without a GPU.

A request is issued once all requests that had ended before it in the recording have ended again. So
the replay compares configurations, not the order of events. A trace has the keys of blocks but no
prompts, so blocks with equal keys get equal tokens. Cancelled requests are left out.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flexkv.actors.flight import Flight
from flexkv.cli.options import finite
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.kvmanager import KVManager
from flexkv.observe.records import HeaderRecord, RequestRecord
from flexkv.observe.tracer import KEY_BYTES
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary

LEFT_OUT = ("cancelled", "timeout")
DEVICE_BYTES_MAX = 1 << 30
"""Memory that stands in for the device's; requests wait for slots while it is full."""


class Moment(NamedTuple):
    """An event of the recording, which has to happen again before those after it."""

    at_ns: int
    kind: int
    """0: its last op ended after its answer, 1: it was answered, 2: it arrived."""
    request: RequestRecord


def replay(
    file: Annotated[Path, typer.Argument(help="A trace file.")],
    host_blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of the host tier; default: as recorded.")
    ] = None,
    ssd_blocks: Annotated[
        int | None, typer.Option(min=0, help="Blocks of the SSD tier; default: as recorded.")
    ] = None,
    ssd_dir: Annotated[
        Path | None, typer.Option(help="Directory of the SSD tier; default: a temporary one.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = "lru",
    time_scale: Annotated[
        float,
        typer.Option(
            callback=finite, help="1 = with the recorded pauses, 0 = as fast as possible."
        ),
    ] = 0.0,
    to: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for the trace of the replay, to diff and view."),
    ] = None,
) -> None:
    """Issue the recorded requests again, and compare the results with the recording."""
    console, recorded = Console(), load(file)
    if not recorded.requests or "host" not in recorded.header.capacity_blocks:
        raise ConfigError("trace", str(file), "has no requests to replay")
    if to is not None and to.exists():
        raise ConfigError(
            "output", str(to), "exists: name a new file, since a trace is appended to a file"
        )
    capacity = recorded.header.capacity_blocks
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix=".flexkv-replay-", dir=".")
        directory = stack.enter_context(temporary)
        again = to or Path(directory) / "trace"
        cache = CacheConfig(
            tokens_per_block=recorded.header.tokens_per_block,
            num_cpu_blocks=host_blocks or capacity["host"],
            num_ssd_blocks=capacity.get("disk", 0) if ssd_blocks is None else ssd_blocks,
            ssd_cache_dir=str(ssd_dir or directory),
            eviction_policy=policy,
            enable_trace=True,
            trace_file_path=str(again),
        )
        left_out = asyncio.run(Replayer(recorded, cache, time_scale).run(console))
        replayed = load(again)
    console.print(_compared(recorded, replayed))
    told = f"; {left_out} cancelled ones were left out" if left_out else ""
    issued = len(recorded.requests) - left_out
    alike = _alike(recorded, replayed)
    console.print(f"{alike} of {issued} requests ended as recorded, with the same hits{told}")


class Replayer:
    """A replay of the requests of a trace."""

    def __init__(self, trace: Trace, cache: CacheConfig, time_scale: float) -> None:
        self._trace, self._cache, self._time_scale = trace, cache, time_scale
        self._per_block = trace.header.tokens_per_block
        self._numbers: dict[bytes, int] = {}
        self._model = _model_of(trace.header)
        longest = max(request.last_block for request in trace.requests)
        fitting = DEVICE_BYTES_MAX // trace.header.block_bytes
        self._device_blocks = max(longest, min(fitting, 64 * longest), 1)
        self._free = list(range(self._device_blocks))
        self._freed = asyncio.Condition()

    async def run(self, console: Console) -> int:
        """Run the whole replay, and return how many requests were left out."""
        moments = list(_moments(self._trace))
        tasks: dict[int, asyncio.Task[Flight | None]] = {}
        begin_s, first_ns = time.monotonic(), self._trace.begin_ns
        async with KVManager(self._model, self._cache) as manager:
            manager.register_kv_caches(self._caches())
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task("replaying", total=len(moments))
                async with asyncio.TaskGroup() as group:
                    for moment in moments:
                        request = moment.request
                        if moment.kind == 2:
                            after_s = (moment.at_ns - first_ns) / 1e9 * self._time_scale
                            await asyncio.sleep(max(0.0, begin_s + after_s - time.monotonic()))
                            issued = group.create_task(self._issue(manager, request))
                            tasks[request.request_id] = issued
                            await asyncio.sleep(0)
                        else:
                            flight = await tasks[request.request_id]
                            if moment.kind == 0 and flight is not None:
                                await flight.wait_ended()
                        progress.advance(bar)
        return len(self._trace.requests) - len(tasks)

    async def _issue(self, manager: KVManager, record: RequestRecord) -> Flight | None:
        """Issue one request, which has device slots of its own until it is answered."""
        engine, operation = manager.engine, Operation[record.kind.upper()]
        tokens = self._tokens(record)
        mask = np.arange(len(tokens)) >= record.first_block * self._per_block
        namespace = record.namespace_hash or None
        selected = None if operation is Operation.PREFETCH else mask
        request = engine.requests.intake(operation, tokens, selected, namespace)
        if operation is Operation.PREFETCH:
            return await engine.requests.perform(request)
        blocks = await self._take(record.last_block - record.first_block)
        try:
            firsts = np.array(blocks, np.int64)[:, None] * self._per_block
            slots = (firsts + np.arange(self._per_block)).ravel()
            ready = engine.requests.with_slots(request, slots)
            return None if ready is None else await engine.requests.perform(ready)
        finally:
            async with self._freed:
                self._free.extend(blocks)
                self._freed.notify_all()

    async def _take(self, count: int) -> list[int]:
        if len(self._free) >= count:  # no await, so that no other request comes first
            return [self._free.pop() for _ in range(count)]
        async with self._freed:
            await self._freed.wait_for(lambda: len(self._free) >= count)
            return [self._free.pop() for _ in range(count)]

    def _tokens(self, record: RequestRecord) -> NDArray[np.int64]:
        """Return a prompt with equal blocks where the recorded prompts had equal keys."""
        keys = [record.keys[at : at + KEY_BYTES] for at in range(0, len(record.keys), KEY_BYTES)]
        tokens = np.zeros((len(keys), self._per_block), np.int64)
        # A key is too long for a token id.
        tokens[:, 0] = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        return tokens.ravel()

    def _caches(self) -> list[NDArray[np.uint8]]:
        model = self._model
        shape = (self._device_blocks, self._per_block, model.num_kv_heads, model.head_size)
        return [np.zeros(shape, np.uint8)]


def _model_of(header: HeaderRecord) -> ModelConfig:
    """Return a model with blocks of the recorded size: one layer, one vector a token."""
    size, rest = divmod(header.block_bytes, header.tokens_per_block)
    if rest:
        why = f"tokens_per_block must divide the bytes of a block, {header.block_bytes}"
        raise ConfigError("trace", header.tokens_per_block, why)
    return ModelConfig(
        num_layers=1, num_kv_heads=1, head_size=size, dtype="uint8", kv_dim=1, model_id="replay"
    )


def _moments(trace: Trace) -> Iterator[Moment]:
    """Yield the events of all requests in the order of time."""
    last_ns: dict[int, int] = {}
    for op in trace.ops:
        last_ns[op.run_id] = max(op.ended_ns, last_ns.get(op.run_id, 0))
    found = []
    for request in trace.requests:
        if request.status in LEFT_OUT:
            continue
        found.append(Moment(request.arrived_ns, 2, request))
        found.append(Moment(max(request.ended_ns, request.arrived_ns + 1), 1, request))
        if last_ns.get(request.run_id, 0) > request.ended_ns:
            found.append(Moment(last_ns[request.run_id], 0, request))
    yield from sorted(found, key=_in_order)


def _in_order(moment: Moment) -> tuple[int, int, int]:
    return moment.at_ns, moment.kind, moment.request.request_id


def _alike(recorded: Trace, replayed: Trace) -> int:
    """Return how many requests ended as recorded, with the same hits in every tier."""
    pairs = zip(_issued(recorded), _issued(replayed), strict=False)
    return sum(
        (old.kind, old.status, old.moved_blocks, old.hit_blocks)
        == (new.kind, new.status, new.moved_blocks, new.hit_blocks)
        for old, new in pairs
    )


def _issued(trace: Trace) -> list[RequestRecord]:
    """Return the requests that a replay issues, in the order of their issue."""
    kept = [r for r in trace.requests if r.status not in LEFT_OUT]
    return sorted(kept, key=lambda request: request.request_id)


def _compared(recorded: Trace, replayed: Trace) -> Table:
    table = Table("figure", "recorded", "replayed")
    old, new = Summary(recorded), Summary(replayed)
    table.add_row("seconds", f"{recorded.seconds:.2f}", f"{replayed.seconds:.2f}")
    table.add_row("requests", str(len(recorded.requests)), str(len(replayed.requests)))
    for kind in sorted(old.kinds.keys() | new.kinds.keys()):
        for name, at in (("p50", 0), ("p99", 2)):
            row = [f"{s.kinds[kind].ms[at]:.3f}" if kind in s.kinds else "" for s in (old, new)]
            table.add_row(f"{kind} {name}, ms", *row)
    for tier in sorted(old.hits.keys() | new.hits.keys()):
        row = [f"{100 * each.hits.get(tier, 0.0):.2f}" for each in (old, new)]
        table.add_row(f"hits in {tier}, %", *row)
    for route in sorted(old.routes.keys() | new.routes.keys()):
        row = [str(s.routes[route].blocks) if route in s.routes else "0" for s in (old, new)]
        table.add_row(f"{route}, blocks", *row)
    return table
