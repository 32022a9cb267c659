"""Tests of KV groups whose blocks are smaller than those of full attention.

vLLM gives the pages of all layers the same size. If a token of full attention takes less memory
than one of a window, as in Gemma 4 or MiMo-V2, blocks of full attention have more tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from flexkv.common.errors import ConfigError
from flexkv.integration.vllm.groups import groups_of
from flexkv.integration.vllm.shapes import Source

from .caches import allocated, chunked, engine, full, group, lent, planned, state, window
from .test_groups import judged

LARGE = {"block_size": 32, "num_kv_heads": 1}
"""Blocks with twice the tokens, and the same bytes."""


def test_such_a_group_becomes_several(configured: Any) -> None:
    """The first blocks in each block of the chain form one group, the second ones another."""
    found = judged(configured, group(window(), "w", "v"), group(full(**LARGE), "f"))
    assert found.sources == (Source(1), Source(0, 0, 2), Source(0, 1, 2))
    assert (found.engine_ids, found.chain) == ((0, 1), 1)
    assert found.layers == ("f", "w", "v", "w", "v")
    assert found.names == ("full_attention", "sliding_window", "sliding_window")
    assert (found.tokens_per_block, found.alignment_tokens) == (32, 32)
    spaces = found.model(1, False, "m").spaces(32)
    assert [space.tokens_per_block for space in spaces] == [32, 32, 32]
    assert spaces[0].block_bytes * 2 == spaces[1].block_bytes == spaces[2].block_bytes


@pytest.mark.support("cache", "windows with smaller blocks than full attention")
def test_its_layers_are_transferred_in_each(configured: Any) -> None:
    """The same tensors belong to several groups, which use different blocks of them."""
    worker = planned(configured, group(window(), "w"), group(full(**LARGE), "f"))
    found = groups_of(worker, engine())
    assert found is not None
    kv_caches = allocated(worker)
    tensors = lent(found, kv_caches)
    assert list(tensors) == ["f", "w", "w, group 2"]
    assert tensors["w"] is tensors["w, group 2"] is kv_caches["w"]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128, 1000])
def test_a_prefix_needs_what_the_window_reaches(tokens: int, blocks: int) -> None:
    """The groups together need the blocks that vLLM's own rule asks for, at every boundary."""
    large = full(block_size=16 * blocks)
    config = SimpleNamespace(kv_cache_groups=[group(large, "f"), group(window(tokens), "w")])
    found = groups_of(config, engine())
    assert found is not None
    spaces = found.model(1, False, "m").spaces(large.block_size)
    for prefix in range(0, 2048, large.block_size):
        wanted = set(range(max(0, prefix - tokens + 1) // 16, prefix // 16))
        parts = set[int]()
        for source, space in zip(found.sources[1:], spaces[1:], strict=True):
            first, last = space.needed(prefix)
            parts.update(range(prefix // 16)[source.first :: source.step][first:last])
        assert parts == wanted


def test_a_state_is_in_the_last_one() -> None:
    """A hit ends at the end of a block of the chain, so states inside it are never needed."""
    config = SimpleNamespace(kv_cache_groups=[group(full(block_size=64), "f"), group(state(), "s")])
    found = groups_of(config, engine())
    assert found is not None
    assert found.sources == (Source(0), Source(1, 3, 4))
    assert found.sources[1].of([[1, 2], [0, 0, 0, 7, 0, 0, 0, 9]]) == [7, 9]


def test_what_cannot_be_divided_is_refused() -> None:
    """The error names the layer and both sizes."""
    uneven = [group(full(block_size=48), "f"), group(window(block_size=32), "w")]
    with pytest.raises(ConfigError, match=r"w: its blocks have 32 tokens: .* a divisor of 48"):
        groups_of(SimpleNamespace(kv_cache_groups=uneven), engine())
    chunks = [group(full(block_size=32), "f"), group(chunked(48), "c")]
    with pytest.raises(ConfigError, match=r"c: its chunks have 48 tokens: .* a multiple of 32"):
        groups_of(SimpleNamespace(kv_cache_groups=chunks), engine())
    many = [group(full(block_size=1024), "f"), group(window(4096), "w")]
    with pytest.raises(ConfigError, match=r"kv_cache_groups=65: .*at most 32"):
        groups_of(SimpleNamespace(kv_cache_groups=many), engine())


def test_blocks_of_groups_that_are_not_transferred_are_overwritten_as_well() -> None:
    """All groups share the device's blocks, so the blocks that any group writes are reported."""
    config = SimpleNamespace(
        kv_cache_groups=[
            group(full(**LARGE), "f"), group(window(), "w"),
            group(window(), "r", enable_kv_transfer=False),
        ]
    )  # fmt: skip
    found = groups_of(config, engine())
    assert found is not None
    assert [*found.written([[1, 2], [3, 4, 5, 6], [7, 8]], 32)] == [5, 6, 7, 8]
