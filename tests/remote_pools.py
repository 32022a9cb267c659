"""A small pool with real bytes, for tests that look at stores without an engine."""

from __future__ import annotations

import select
from random import Random

import numpy as np

from flexkv.common.terms import BlockKey
from flexkv.index.keys import leaf_salt
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import join_pool
from flexkv.io.remote.seal import BlockName, seal
from flexkv.io.remote.store import Store

BLOCK_BYTES, SPAN_BLOCKS = (5000, 700), 4
"""Of the chain and of the leaves; of a span."""
DESCRIPTION = PoolDescription({"model_id": "a-model"}, BLOCK_BYTES, SPAN_BLOCKS)
POOL = Pool(DESCRIPTION)
_RANDOM = Random(11)
_KEYS = [_RANDOM.randbytes(16) for _ in range(1 + 16 * SPAN_BLOCKS)]
"""The root, and the keys of a prompt."""


def span_key(span: int) -> BlockKey:
    """Return the key of a span of the prompt."""
    return _KEYS[(span + 1) * SPAN_BLOCKS]


def leaf_key(position: int, group: int = 1) -> BlockKey:
    """Return the key of a group's leaf at a position of the prompt."""
    return (np.frombuffer(_KEYS[1 + position], np.uint64) ^ leaf_salt(group)).tobytes()


def span_content(span: int) -> bytes:
    """Return the right content of a span's object."""
    names = [
        BlockName(_KEYS[at + 1], _KEYS[at])
        for at in range(span * SPAN_BLOCKS, (span + 1) * SPAN_BLOCKS)
    ]
    return _content(names, group=0, seed=span)


def leaf_content(position: int, group: int = 1) -> bytes:
    """Return the right content of a leaf's object; leaves of all groups are equally large."""
    names = [BlockName(leaf_key(position, group), _KEYS[1 + position])]
    return _content(names, 1, 1000 + position)


def _content(names: list[BlockName], group: int, seed: int) -> bytes:
    size, arena = BLOCK_BYTES[group], Arena.open(len(names), max(BLOCK_BYTES))
    shape = len(names), size
    arena.array[:, :size] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    summer, ended = PoolChecksummer(arena, block_bytes=BLOCK_BYTES), select.poll()
    ended.register(summer.fileno(), select.POLLIN)
    summer.submit(0, np.arange(len(names)), True, group)
    ended.poll()
    summer.reap()
    content = b"".join(
        arena.array[row, :size].tobytes() + seal(name, size, int(summer.sums[row]))
        for row, name in enumerate(names)
    )
    summer.close()
    assert arena.close()
    return content


async def fill(store: Store, spans: int = 5, pool: Pool = POOL) -> None:
    """Describe a pool in a store, and store leading spans of the prompt, and a leaf."""
    await join_pool(store, pool)
    for span in range(spans):
        assert await store.put(pool.object_name(span_key(span)), [span_content(span)])
    assert await store.put(pool.object_name(leaf_key(3)), [leaf_content(3)])
