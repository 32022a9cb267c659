"""The index: keys, matches, inserts, evictions and whole planning, with a million blocks resident.

Limits: for keys the hash alone, for the rest the cost of a cache miss. There are no peers, because
their code does not run in this harness.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import LARGE, cache_of, kv_caches, prompt, slots_of
from flexkv import _ext
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import Operation
from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import Positions, Tier
from flexkv.engine.engine import Engine
from flexkv.index.change_hub import ChangeHub
from flexkv.index.residency import Residency
from flexkv.index.secret import derived
from flexkv.index.span_changes import NODES_A_STEP, SpanChanges
from flexkv.kvmanager import KVManager

TOKENS, PER_BLOCK = 32_768, 16
BLOCKS, SPAN = TOKENS // PER_BLOCK, 8
ROOT, HASH_SECRET = bytes(16), derived("").hash_secret
TINY = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16")


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    resident = 1 << (15 if options.quick else 20)
    rounds = 20 * options.repeats
    figures = _keys(rounds)
    figures |= _matches(resident, rounds)
    figures |= _matches_with_leaves(resident, rounds)
    figures |= _evictions(resident, rounds)
    figures |= _changes(resident, rounds)
    figures |= _memory(1 << 16 if options.quick else 20_000_000, resident)
    figures |= asyncio.run(_planning(1 << 14 if options.quick else 1 << 18, rounds))
    figures |= asyncio.run(_match_beside_writes(options))
    return figures


def _median_us(work: Callable[[], object], rounds: int) -> float:
    return statistics.median(_times_us(work, rounds))


def _times_us(work: Callable[[], object], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        work()
        took.append((time.perf_counter_ns() - begin) / 1e3)
    return took


def _keys(rounds: int) -> Figures:
    tokens = np.random.default_rng(0).integers(0, 150_000, TOKENS)
    as_list = tokens.tolist()
    return {
        "keys of 32k tokens, array, us": _median_us(
            lambda: _ext.chain_keys(tokens, PER_BLOCK, ROOT, HASH_SECRET), rounds
        ),
        "keys of 32k tokens, list, us": _median_us(
            lambda: _ext.chain_keys(as_list, PER_BLOCK, ROOT, HASH_SECRET), rounds
        ),
    }


class _Prompts:
    """Random prompts, as keys."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def keys(self, blocks: int = BLOCKS) -> bytes:
        """Return the root and the keys of a new prompt."""
        return ROOT + self._random.bytes(16 * blocks)


def _insert(index: Residency, keys: bytes, begin: int, end: int, tier: Tier = Tier.HOST) -> None:
    index.commit(tier, index.reserve(tier, keys, Positions(begin, end - begin)))


def _matches(resident: int, rounds: int) -> Figures:
    """Time matches of long prompts and of 64-turn conversations that were stored turn by turn."""
    index, prompts = Residency({Tier.HOST: resident}), _Prompts(1)
    conversations = [prompts.keys() for _ in range(max(1, resident // BLOCKS // 4))]
    turn = BLOCKS // 64
    for begin in range(0, BLOCKS, turn):
        for keys in conversations:
            _insert(index, keys, begin, begin + turn)
    longs = [prompts.keys() for _ in range(resident // BLOCKS - len(conversations))]
    begin_s = time.perf_counter()
    for keys in longs:
        _insert(index, keys, 0, BLOCKS)
    inserted_us = (time.perf_counter() - begin_s) * 1e6 / max(1, len(longs) * BLOCKS)
    figures: Figures = {"insert, us a block": inserted_us}
    for name, all_keys in (("long", longs), ("64-turn", conversations)):
        half = all_keys[0][: 16 * (BLOCKS // 2 + 1)] + prompts.keys(BLOCKS // 2)[16:]
        for what, keys in (("full", all_keys[0]), ("half", half), ("no", prompts.keys())):
            figures[f"match of 32k, {name}, {what} hit, us"] = _median_us(
                lambda keys=keys: index.find(keys),
                rounds,  # type: ignore[misc]
            )
        each = iter(all_keys * (rounds // len(all_keys) + 1))
        figures[f"match of 32k, {name}, full hit, every time another, us"] = _median_us(
            lambda each=each: index.find(next(each)),
            rounds,  # type: ignore[misc]
        )
    return figures


LEAVES = (
    GroupRule(1, Kind.WINDOW, 128, 1, PER_BLOCK),
    GroupRule(2, Kind.WINDOW, 1024, 1, PER_BLOCK),
    GroupRule(3, Kind.WINDOW, 1024, 1, PER_BLOCK),
    GroupRule(4, Kind.CHUNK, 8192, 1, PER_BLOCK),
    GroupRule(5, Kind.STATE, 0, 2, 2 * PER_BLOCK),
)
"""Five KV groups beside the chain."""


def _matches_with_leaves(resident: int, rounds: int) -> Figures:
    """Time matches of long prompts, in turns without leaves and with those of five groups."""
    took: dict[str, list[float]] = {}
    for use in (False, True):
        indexes = {}
        for name, rules in (("plain", ()), ("five groups", LEAVES)):
            index, prompts = Residency({Tier.HOST: resident}, rules=rules), _Prompts(6)
            indexes[name] = index, [prompts.keys() for _ in range(max(1, resident // BLOCKS // 8))]
            for keys in indexes[name][1]:
                _insert(index, keys, 0, BLOCKS)
                for rule in rules:
                    _insert_leaves(index, keys, rule)
        for number in range(rounds):
            for name, (index, all_keys) in indexes.items():
                keys = all_keys[number % len(all_keys)]
                (us,) = _times_us(lambda: index.find(keys, use=use), 1)  # noqa: B023
                took.setdefault(f"{'use' if use else 'match'} of 32k, {name}", []).append(us)
    figures: Figures = {f"{name}, us": statistics.median(us) for name, us in took.items()}
    for what in ("match", "use"):
        pairs = zip(took[f"{what} of 32k, five groups"], took[f"{what} of 32k, plain"], strict=True)
        ratio = statistics.median(with_leaves / plain for with_leaves, plain in pairs)
        figures[f"{what} of 32k, five groups / plain"] = ratio
    return figures


def _insert_leaves(index: Residency, keys: bytes, rule: GroupRule) -> None:
    """Store the leaves that the whole prompt needs."""
    needed = np.arange(*_ext.needed(rule.kind, rule.window, rule.block_tokens, TOKENS))
    if len(needed):
        places = (needed + 1) * rule.ratio - 1
        at = Positions(int(places[0]), len(places), places)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, keys, at, group=rule.group))


def _evictions(resident: int, rounds: int) -> Figures:
    """Time evictions of 64 blocks with few leaves and with many, and puts into a full tier."""
    figures: Figures = {}
    for leaves in (1_000, 100_000, 1_000_000):
        blocks = min(resident, max(leaves, rounds * 64))
        index, prompts = Residency({Tier.HOST: resident}), _Prompts(2)
        per_prompt = max(1, blocks // leaves)
        for _ in range(blocks // per_prompt):
            _insert(index, prompts.keys(per_prompt), 0, per_prompt)
        count = blocks // per_prompt
        figures[f"evict 64 blocks, {count} leaves, us"] = _median_us(
            lambda index=index: index.evict(Tier.HOST, 64),  # type: ignore[misc]
            min(rounds, blocks // 64),
        )
    index, prompts = Residency({Tier.HOST: resident}), _Prompts(3)
    for _ in range(resident // BLOCKS):
        _insert(index, prompts.keys(), 0, BLOCKS)
    new = [prompts.keys() for _ in range(rounds)]

    def put(keys: bytes) -> None:
        assert not index.find(keys).last
        _insert(index, keys, 0, BLOCKS)

    figures["steady put of 2,048 blocks, us"] = statistics.median(_each_us(put, new))
    return figures


def _changes(resident: int, rounds: int) -> Figures:
    """Time puts into a full tier, watched or not in turns, what they tell of spans, and a walk."""
    index, prompts = Residency({Tier.HOST: resident}), _Prompts(7)
    for _ in range(resident // BLOCKS):
        _insert(index, prompts.keys(), 0, BLOCKS)
    hub = ChangeHub(index)
    took: dict[str, list[float]] = {}

    def time_us(name: str, work: Callable[[], object]) -> None:
        took.setdefault(name, []).extend(_times_us(work, 1))

    for _ in range(rounds):
        keys, watched = prompts.keys(), prompts.keys()
        time_us("put, unwatched", lambda: _insert(index, keys, 0, BLOCKS))  # noqa: B023
        spans = SpanChanges(hub, SPAN, 1 << 16)
        time_us("put, watched", lambda: _insert(index, watched, 0, BLOCKS))  # noqa: B023
        time_us("changes of spans by such a put", spans.take)
        spans.close()
    walk = SpanChanges(hub, SPAN, 1 << 16).walk()
    for _ in range(resident // NODES_A_STEP):
        time_us("a step of a walk over all spans", lambda: next(walk))
    pairs = zip(took["put, watched"], took["put, unwatched"], strict=True)
    figures: Figures = {f"{name}, us": statistics.median(us) for name, us in took.items()}
    figures["put, watched / unwatched"] = statistics.median(after / plain for after, plain in pairs)
    return figures


def _each_us(work: Callable[[bytes], None], items: Iterable[bytes]) -> list[float]:
    took = []
    for item in items:
        begin = time.perf_counter_ns()
        work(item)
        took.append((time.perf_counter_ns() - begin) / 1e3)
    return took


_MEMORY = """
import sys, resource, statistics, time
from benchmarks.index import BLOCKS, ROOT, _Prompts, _insert
from flexkv.common.terms import Tier
from flexkv.index.residency import Residency
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
blocks = int(sys.argv[1])
prompts = _Prompts(4)
prompts.keys()
before = resident()
index = Residency({Tier.DISK: blocks})
kept = []
for number in range(blocks // BLOCKS):
    keys = prompts.keys()
    _insert(index, keys, 0, BLOCKS, Tier.DISK)
    if number % max(1, blocks // BLOCKS // 64) == 0:
        kept.append(keys)
grown = resident() - before - len(kept) * len(kept[0])
took = []
for _ in range(20):
    for keys in kept:
        begin = time.perf_counter()
        assert index.find(keys).last == BLOCKS
        took.append((time.perf_counter() - begin) * 1e6)
print(grown / (len(range(blocks // BLOCKS)) * BLOCKS), statistics.median(took))
"""


def _memory(blocks: int, few: int) -> Figures:
    """Measure a table in its own process: bytes a block, and matches against a smaller table's."""
    told = {}
    for count in (blocks, few):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(count)],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        told[count] = [float(value) for value in done.stdout.split()]
    return {
        f"bytes a block, {blocks} blocks in one tier": told[blocks][0],
        f"match of 32k at {blocks} blocks, us": told[blocks][1],
        f"match of 32k at {blocks} blocks / at {few}": told[blocks][1] / told[few][1],
    }


async def _planning(host_blocks: int, rounds: int) -> Figures:
    """Time keys, match, leases and plan of a request, as in the façade; claims end untimed."""
    figures: Figures = {}
    cache = CacheConfig(tokens_per_block=PER_BLOCK, num_cpu_blocks=host_blocks)
    async with KVManager(TINY, cache) as manager:
        manager.register_kv_caches(kv_caches(TINY, BLOCKS))
        engine = manager.engine
        random = np.random.default_rng(5)
        for blocks in (64, BLOCKS):
            slots = slots_of(range(blocks))
            tokens = random.integers(0, 150_000, blocks * PER_BLOCK)
            await manager.put(tokens, slots)
            name = f"{blocks * PER_BLOCK // 1024}k"
            new = (random.integers(0, 150_000, blocks * PER_BLOCK) for _ in range(rounds))
            figures[f"plan a get of {name} tokens, us"] = _plan_us(
                engine, Operation.GET, (tokens for _ in range(rounds)), slots
            )
            figures[f"mgr.match of {name} tokens, us"] = _median_us(
                lambda tokens=tokens: manager.match(tokens),
                rounds,  # type: ignore[misc]
            )
            figures[f"plan a put of {name} tokens, us"] = _plan_us(
                engine, Operation.PUT, new, slots
            )
    return figures


def _plan_us(
    engine: Engine, operation: Operation, prompts: Iterable[object], slots: object
) -> float:
    planner, took = engine.scheduler._planner, []
    for run_id, tokens in enumerate(prompts, 1 << 30):
        begin = time.perf_counter_ns()
        request = engine.requests.with_slots(engine.requests.intake(operation, tokens), slots)
        assert request is not None
        plan = planner.plan(request, run_id).plan
        took.append((time.perf_counter_ns() - begin) / 1e3)
        for op in plan.template.ops:
            engine.residency.claims.settle(plan.op_id(op), True)
    return statistics.median(took)


async def _match_beside_writes(options: Options) -> Figures:
    """Time matches of a 32k prompt during the write-behind of two puts of 1.5 GiB each."""
    blocks = 32 if options.quick else 768
    cache = cache_of(blocks + 8, options.directory / "index-bench", num_ssd_blocks=4 * blocks,
                     write_behind_max_gb=blocks / 512)  # fmt: skip
    (options.directory / "index-bench").mkdir()
    took: list[float] = []
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(kv_caches(LARGE, blocks))
        tokens = np.concatenate([prompt(0, blocks), np.arange(TOKENS - blocks * PER_BLOCK)])
        for number in range(2):
            await manager.put(prompt(number, blocks), slots_of(range(blocks)))
            flush = asyncio.create_task(manager.flush())
            while not flush.done():
                took += _times_us(lambda: manager.match(tokens), 4)
                await asyncio.sleep(0)
    for file in (options.directory / "index-bench").iterdir():
        file.unlink()
    (options.directory / "index-bench").rmdir()
    return {
        "mgr.match of 32k tokens beside writes, p50 us": percentile(took, 50),
        "mgr.match of 32k tokens beside writes, p99 us": percentile(took, 99),
        "mgr.match beside writes, samples": float(len(took)),
    }
