"""An engine without a model that has several KV groups, planned and allocated by vLLM's own code.

Its forward writes and checks what layers of each kind would: attention reads the tokens that its
window or chunk reaches, a state is read from the block of the last step and written to that of this
one, a compressor's ring keeps the tokens of one state that is not complete, and a window that is
replayed after a hit is computed again. All groups overlay one allocation, so a block of another
group in the wrong place is noticed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_cache_hit_alignment_tokens,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.utils import allocate_kv_cache

from flexkv.integration.vllm.stats import Counts

try:  # vLLM 0.33
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

from .stand import CONNECTORS, PER_BLOCK, TOKEN, Stand, _Row, _values

SHAPE: dict[str, Any] = {
    "block_size": PER_BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float16,
}  # fmt: skip
PAGE = PER_BLOCK * 2 * 16 * 2
WINDOW, CHUNK = 48, 64
RATIO = 4
"""Tokens that a compressor's ring collects for one state."""


def _full(**more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{**SHAPE, **more})


def _window(**more: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(**{**SHAPE, "sliding_window": WINDOW, **more})


def _chunked() -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=CHUNK)


def _state() -> MambaSpec:
    return MambaSpec(
        block_size=PER_BLOCK, shapes=((4,), (3, 4)), dtypes=(torch.float16, torch.float16),
        page_size_padded=PAGE, mamba_cache_mode="align",
    )  # fmt: skip


def _ring() -> CircularBufferSpec:
    return CircularBufferSpec(**{**SHAPE, "block_size": PER_BLOCK // 2, "num_kv_heads": 4})


def _replayed() -> SlidingWindowMLASpec:
    shape = {**SHAPE, "num_kv_heads": 1, "head_size": 32}
    return SlidingWindowMLASpec(**shape, sliding_window=WINDOW, bounded_replay=True)


def _mla_with_indexer() -> UniformTypeKVCacheSpecs:
    shape = {**SHAPE, "num_kv_heads": 1}
    specs = {
        "mla": MLAAttentionSpec(**{**shape, "head_size": 24}),
        "indexer": MLAAttentionSpec(**{**shape, "head_size": 8, "dtype": torch.uint8}),
    }
    return UniformTypeKVCacheSpecs(block_size=PER_BLOCK, kv_cache_specs=specs)


def _group(spec: Any, *layers: str) -> KVCacheGroupSpec:
    return KVCacheGroupSpec(list(layers), spec)


MODELS: dict[str, list[KVCacheGroupSpec]] = {
    "windows": [_group(_window(), "w0", "w1"), _group(_window(), "w2", "w3"),
                _group(_full(), "f0", "f1")],
    "chunks": [_group(_chunked(), "c0"), _group(_full(), "f0")],
    "states": [_group(_state(), "s0", "s1"), _group(_full(), "f0", "f1")],
    "states_and_windows": [_group(_state(), "s0"), _group(_window(), "w0"),
                           _group(_full(), "f0")],
    "larger_windows": [_group(_full(num_kv_heads=4), "f0"),
                       _group(_window(block_size=2 * PER_BLOCK), "w0")],
    "smaller_windows": [_group(_full(block_size=2 * PER_BLOCK, num_kv_heads=1), "f0"),
                        _group(_window(), "w0"), _group(_window(), "w1")],
    "smallest_windows": [_group(_window(), "w0"),
                       _group(_full(block_size=4 * PER_BLOCK, head_size=4, num_kv_heads=1), "f0")],
    "indexer": [_group(_mla_with_indexer(), "mla", "indexer")],
    "ring": [_group(_ring(), "r0"), _group(_full(), "f0", "f1")],
    "replayed": [_group(_replayed(), "b0"), _group(_ring(), "r0"), _group(_window(), "w0"),
                 _group(_full(), "f0")],
    "window_alone": [_group(_window(), "w0", "w1")],
    "windows_alone": [_group(_window(sliding_window=20), "w0"), _group(_window(), "w1")],
    "states_beside_windows": [_group(_state(), "s0"), _group(_window(), "w0")],
    "two_full": [_group(_full(), "f0"), _group(_full(head_size=4, num_kv_heads=4), "g0")],
}  # fmt: skip
"""KV groups like those of models that people serve."""


class HybridStand(Stand):
    """An engine without a model that has several KV groups."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, **more: Any
    ) -> None:
        """Start it; arguments as for `Stand`, and a name of `MODELS`."""
        self._groups = MODELS[model]
        self._retained = more.pop("retained", 0)
        self._use_eagle = more.pop("use_eagle", False)
        more.setdefault("kv_load_failure_policy", "recompute")
        self._counted: Counter[str] = Counter()
        self.wrong: list[str] = []
        """What was read wrongly while `unchecked`."""
        count = Counts.count

        def counted(counts: Counts, name: str, by: int = 1) -> None:
            self._counted[name] += by
            count(counts, name, by)

        monkeypatch.setattr(Counts, "count", counted)
        super().__init__(folder, monkeypatch, CONNECTORS["own"], **more)

    def _allocated(self, num_blocks: int) -> tuple[dict[str, torch.Tensor], Any]:
        cache = self.config.cache_config
        cache.num_gpu_blocks_override, cache.mamba_cache_mode = num_blocks, "align"
        cache.prefix_cache_retention_interval = self._retained
        pages = {_page(group) for group in self._groups}
        cache.kv_cache_layout = "LBHNC" if len(pages) == 1 else "BLHNC"
        caches = get_kv_cache_config_from_groups(self.config, self._groups, 1 << 28)
        caches.kv_cache_layout = cache.kv_cache_layout
        sizes = resolve_kv_cache_block_sizes(caches, self.config)
        alignment = resolve_cache_hit_alignment_tokens(caches, self.config, *sizes)
        caches.hash_block_size, caches.cache_hit_alignment_tokens = sizes[1], alignment
        self.unit = sizes[0]
        layout = KVCacheLayout[cache.kv_cache_layout]
        tensors = allocate_kv_cache(caches, torch.device("cpu"), layout)
        self._group_of = {
            name: number for number, group in enumerate(self._groups) for name in group.layer_names
        }
        return tensors, caches

    def _of_caches(self, caches: Any) -> dict[str, Any]:
        self.config.cache_config.block_size = self.unit  # the scheduler's, as for real engines
        return {
            "kv_cache_config": generate_scheduler_kv_cache_config([caches]),
            "hash_block_size": caches.hash_block_size,
        }

    @property
    def chain_tokens(self) -> int:
        """Return the tokens of a block of the group that is FlexKV's chain."""
        return int(self.side.engine_groups.tokens_per_block)

    # -- requests -------------------------------------------------------------------------------

    def ask(self, name: str, tokens: list[int], max_tokens: int = 1) -> Request:
        """Add a request for a prompt."""
        init_none_hash(sha256)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sampling.update_from_generation_config({}, -1)
        request = Request(
            request_id=name, prompt_token_ids=list(tokens), sampling_params=sampling,
            pooling_params=None, mm_features=None,
            block_hasher=get_request_block_hasher(PER_BLOCK, sha256),
        )  # fmt: skip
        self.scheduler.add_request(request)
        return request

    def answer(self, name: str, tokens: list[int], max_tokens: int = 1) -> list[int]:
        """Run one request, let the device forget it, and return the conversation."""
        self.ask(name, tokens, max_tokens)
        self.run()
        assert self.scheduler.reset_prefix_cache()
        return [*tokens, *[TOKEN] * max_tokens]

    def abort(self, request: Request) -> None:
        """End a request, if it has not ended."""
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def counts(self) -> Counter[str]:
        """Return what the connector has counted since the last call."""
        counted, self._counted = self._counted, Counter()
        return counted

    def check_freed(self) -> None:
        """Check that neither vLLM's scheduler nor our side keeps anything."""
        self.scheduler.kv_cache_manager.block_pool.null_block.ref_cnt = 0  # vLLM counts it down
        super().check_freed()

    def tables(self, request: Request) -> list[list[int]]:
        """Return the device blocks of a request, by vLLM's groups."""
        manager = self.scheduler.kv_cache_manager
        return [list(ids) for ids in manager.get_block_ids(request.request_id)]

    def blocks_of(self, request: Request) -> list[int]:
        """Return the device blocks of a request in the group of the prefix chain."""
        return self.tables(request)[self.side.engine_groups.engine_ids[0]]

    def _row(self, name: str, count: int) -> _Row:
        request = self.scheduler.requests[name]
        end = request.num_computed_tokens
        tables: Any = [np.array(table, np.int64) for table in self.tables(request)]
        return _Row(request, count, end, tables, samples=end >= request.num_tokens)

    # -- the forward ----------------------------------------------------------------------------

    def _forward(self, row: _Row) -> None:
        tokens = list(row.request.all_token_ids[: row.end])
        values = _values([self.weights, *tokens, *[TOKEN] * (row.end - len(tokens))])[1:]
        for name, tensor in self.kv_caches.items():
            number = self._group_of[name]
            spec = self._groups[number].kv_cache_spec
            spec = getattr(spec, "kv_cache_specs", {name: spec})[name]
            mark = values ^ (zlib.crc32(name.encode()) & 0x1FFF)
            table = row.blocks[number]
            if isinstance(spec, MambaSpec):
                self._run_state(row, name, tensor, mark, table)
            elif isinstance(spec, CircularBufferSpec):
                self._fill_ring(row, name, tensor, mark, table)
            else:
                self._attend(row, name, tensor, mark, table, spec)

    def _is_wrong(self, what: str) -> None:
        """Record that the forward has read a wrong value; fail unless that is expected."""
        assert self.unchecked, what
        self.wrong.append(what)

    def _run_state(self, row: _Row, name: str, tensor: Any, mark: Any, table: Any) -> None:
        """Read the state before the step's tokens, and write the one after them."""
        bits, start = tensor.view(torch.int16), row.end - row.count
        where = f"{row.request.request_id}, layer {name}"
        if start:
            found = bits[int(table[(start - 1) // PER_BLOCK])].flatten()
            if bool((found != int(mark[start - 1])).any()):
                self._is_wrong(f"{where}: state after {start} tokens")
        block = int(table[(row.end - 1) // PER_BLOCK])
        assert block > 0, f"{where}: no block for the state after {row.end} tokens"
        bits[block] = int(mark[row.end - 1])

    def _fill_ring(self, row: _Row, name: str, tensor: Any, mark: Any, table: Any) -> None:
        """Check the tokens in the ring that are not compressed yet, and write the step's tokens."""
        bits, start, (block,) = tensor.view(torch.int16), row.end - row.count, table.tolist()
        for at in range(start // RATIO * RATIO, row.end):
            slot = bits[block, :, at % tensor.shape[2]]
            if at >= start:
                slot[:] = int(mark[at])
            elif bool((slot != int(mark[at])).any()):
                self._is_wrong(f"{row.request.request_id}, layer {name}: token {at} of the ring")

    def _attend(self, row: _Row, name: str, tensor: Any, mark: Any, table: Any, spec: Any) -> None:
        """Read the tokens that the step's tokens attend to, and write the step's own."""
        start, size = row.end - row.count, spec.block_size
        first, replayed = 0, row.request.replay_start
        if replayed and not getattr(spec, "bounded_replay", False):
            start = min(max(start, replayed + WINDOW), row.end)  # the cached KV stays as it is
        if isinstance(spec, SlidingWindowSpec):
            first = max(0, start - spec.sliding_window + 1)
        elif isinstance(spec, ChunkedLocalAttentionSpec):
            first = start // spec.attention_chunk_size * spec.attention_chunk_size
        if getattr(spec, "bounded_replay", False):
            first = max(first, replayed)
        if tensor.element_size() == 2:
            bits, wanted = tensor.view(torch.int16), torch.from_numpy(mark.astype(np.int16))
        else:
            bits, wanted = tensor, torch.from_numpy((mark & 0x7F).astype(np.uint8))
        at = np.arange(row.end)
        blocks, slots = torch.from_numpy(table[at // size]), torch.from_numpy(at % size)
        old, new = slice(first, start), slice(start, row.end)
        wrong = (bits[blocks[old], :, slots[old]] != wanted[old, None, None]).flatten(1).any(1)
        if bool(wrong.any()):
            where = f"{row.request.request_id}, layer {name}"
            self._is_wrong(f"{where}: tokens {wrong.nonzero().flatten() + first}")
        assert bool((blocks[new] > 0).all()), f"{row.request.request_id}: no blocks for {name}"
        shape = bits[blocks[new], :, slots[new]].shape
        bits[blocks[new], :, slots[new]] = wanted[new, None, None].expand(shape)


def _page(group: KVCacheGroupSpec) -> int:
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec})
    pages = {spec.page_size_bytes for spec in specs.values()}
    return pages.pop() if len(pages) == 1 else -1
