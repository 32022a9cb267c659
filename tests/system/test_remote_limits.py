"""Whole engines keep their pool within its budget and its TTL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flexkv.common.config import MB
from flexkv.common.terms import Tier

from .test_remote import SPAN, WHOLE, Node, listed

SPANS = WHOLE // SPAN
"""Spans of a prompt."""
TTL_S = 3600.0


def keys(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the keys of a remote tier in a directory, which is listed again and again."""
    return {"remote_cache_path": f"file://{folder}", "remote_list_per_s": 1000, **changes}


def files(folder: Path) -> list[Path]:
    """Return the files of all spans, the oldest first."""
    found = (each for each in folder.glob("*/??/*") if each.parent.name != "gc")
    return sorted(found, key=lambda each: each.stat().st_mtime)


def age(some: list[Path], seconds: float) -> None:
    """Make spans older."""
    for each in some:
        modified_s = each.stat().st_mtime - seconds
        os.utime(each, (modified_s, modified_s))


async def test_expired_spans_are_deleted_and_forgotten(tmp_path: Path) -> None:
    """What is older than the TTL is deleted while its shard is listed, and known no more."""
    async with Node(keys(tmp_path, remote_ttl_s=TTL_S)) as node:
        await node.until(listed)
        await node.put(1)
        await node.put(2)
        old, young = files(tmp_path)[:SPANS], files(tmp_path)[SPANS:]
        assert len(young) == SPANS
        age(old, 2 * TTL_S)
        await node.until(lambda store: store.collection.removed.expired == SPANS)
        assert set(files(tmp_path)) == set(young)
        assert node.store.known_spans == SPANS
        assert node.store.collection.is_collector


async def test_a_load_keeps_old_spans(tmp_path: Path) -> None:
    """What is older than half of the TTL is as new as if it were just written, once it is read."""
    async with Node(keys(tmp_path, remote_ttl_s=TTL_S)) as node:
        await node.put(1)
        age(files(tmp_path), 0.6 * TTL_S)
        before_s = [each.stat().st_mtime for each in files(tmp_path)]
        rounds = node.store.listed_rounds
        await node.until(lambda store: store.listed_rounds > rounds + 1)
        node.manager.clear(Tier.HOST)
        assert await node.get(1) == WHOLE
        await node.until(lambda store: store.touches.touched == SPANS)
        after_s = [each.stat().st_mtime for each in files(tmp_path)]
        assert min(after_s) > max(before_s) + 0.5 * TTL_S
        assert node.store.collection.removed.expired == 0


async def test_the_pool_stays_within_its_budget(tmp_path: Path) -> None:
    """The oldest spans go while the pool has more than its budget, and the youngest stay."""
    budget = 4
    async with Node(keys(tmp_path)) as node:
        for seed in range(4):
            age(files(tmp_path), 100.0)
            await node.put(seed)
    left = files(tmp_path)[-budget // 2 :]
    async with Node(keys(tmp_path, num_remote_blocks=budget * SPAN)) as node:
        await node.until(lambda store: store.collection.removed.evicted >= 4 * SPANS - budget)
        assert 0 < node.store.known_spans <= budget
        assert set(left) <= set(files(tmp_path))
        assert await node.get(3) == WHOLE


async def test_the_rate_of_writes_is_in_bytes(tmp_path: Path) -> None:
    """`remote_write_mb_per_s` becomes the blocks a second that have so many bytes."""
    async with Node(keys(tmp_path, remote_write_mb_per_s=1.5)) as node:
        engine = node.manager.engine
        per_s = engine._core.behind._limits.far[Tier.REMOTE].blocks_per_s
        assert per_s is not None
        assert per_s * engine.sizes.block_stride_bytes == 1.5 * MB
