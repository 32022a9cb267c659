"""Connectors that stand in for FlexKV's: to prove what vLLM does, and that a harness has teeth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
)

from benchmarks.nothing import Nothing
from tests.vllm.sabotage import corrupt

STATE, FULL = "Mamba", "FullAttention"
Key = tuple[bytes, int]


@dataclass
class Step(KVConnectorMetadata):
    """What the worker's side does in one step."""

    loads: list[tuple[str, Key, int]] = field(default_factory=list)
    """A request's id, a key, and the device block that it is loaded to."""
    stores: list[tuple[Key, int]] = field(default_factory=list)


class Crude(Nothing):
    """A connector that keeps every block of every group for ever, in a dict of this process.

    `kv_connector_extra_config` may have `corrupt_group` and `failed_group`, numbers of vLLM's
    groups, `corrupt_layers`, a part of the names of layers, and `fail_every`: every n-th load of
    blocks of the failed group fails.
    """

    kept: ClassVar[dict[Key, list[Any]]] = {}
    """The bytes of each layer of the group, by key. Both roles' instances share it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._corrupt, self._failing = extra.get("corrupt_group"), extra.get("failed_group")
        self._corrupt_layers = extra.get("corrupt_layers", "nothing")
        self._fail_every, self._failures = extra.get("fail_every", 1), 0
        self._unit = kv_cache_config.hash_block_size
        self._alignment = kv_cache_config.cache_hit_alignment_tokens
        self._groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._layers = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self._requests: dict[str, Any] = {}
        self._planned: dict[str, tuple[int, int]] = {}
        self._loads: list[tuple[str, Key, int]] = []
        self._tried: set[str] = set()
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    # -- the worker's side ----------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Keep the tensors."""
        self._tensors = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load at once; the loads are reported as asynchronous ones."""
        loads = self._get_connector_metadata().loads
        hit = {name for name, (_, group), _ in loads if group == self._failing}
        for name in sorted(hit):
            self._failures += 1
            if self._failures % self._fail_every == 0:
                self._failed.add(name)
        for name, key, block in loads:
            self._ended.add(name)
            if name not in self._failed or key[1] != self._failing:
                for layer, data in zip(self._layers[key[1]], self.kept[key], strict=True):
                    self._tensors[layer][block].copy_(data)
                    if key[1] == self._corrupt or self._corrupt_layers in layer:
                        corrupt(self._tensors[layer], [block])

    def wait_for_save(self) -> None:
        """Copy what the step has computed."""
        for key, block in self._get_connector_metadata().stores:
            if key not in self.kept:
                self.kept[key] = [self._tensors[n][block].clone() for n in self._layers[key[1]]]

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return which loads have ended, and which of them have failed."""
        ended, failed, self._ended, self._failed = self._ended, self._failed, set(), set()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    # -- the scheduler's side -------------------------------------------------------------------

    def _key(self, request: Any, group: int, number: int) -> Key | None:
        """Return the key of a group's block of a request: the last of its hashes."""
        last = (number + 1) * (self._groups[group].block_size // self._unit) - 1
        hashes = request.block_hashes
        return (bytes(hashes[last]), group) if last < len(hashes) else None

    def _needed(self, group: int, tokens: int, local: int) -> range:
        """Return the blocks of a group that a hit needs beside those that the device has."""
        spec = self._groups[group]
        block, last = spec.block_size, tokens // spec.block_size
        kind = type(spec).__name__.removesuffix("Spec")
        if kind == STATE:
            return range(last - 1, last)
        first = {
            "SlidingWindow": lambda: max(0, tokens - spec.sliding_window + 1),
            "ChunkedLocalAttention": lambda: (
                tokens // spec.attention_chunk_size * spec.attention_chunk_size
            ),
        }.get(kind, lambda: 0)()
        return range(max(first, local) // block, last)

    def get_num_new_matched_tokens(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Return the longest hit, which never covers the whole prompt."""
        if request.request_id in self._tried:
            return 0, False
        tokens = (request.num_tokens - 1) // self._alignment * self._alignment
        while tokens > local and not all(
            self._key(request, group, number) in self.kept
            for group in range(len(self._groups))
            for number in self._needed(group, tokens, local)
        ):
            tokens -= self._alignment
        if tokens <= local:
            return 0, False
        self._planned[request.request_id] = tokens, local
        return tokens - local, True

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        """Plan the loads of a request."""
        name = request.request_id
        self._requests[name] = request
        if not external:
            return
        self._tried.add(name)
        tokens, local = self._planned.pop(name)
        for group in range(len(self._groups)):
            for number in self._needed(group, tokens, local):
                block, key = blocks.blocks[group][number], self._key(request, group, number)
                assert key is not None
                if not block.is_null:
                    self._loads.append((name, key, block.block_id))

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """Return the loads, and the stores of blocks that the step fills."""
        step, self._loads = Step(self._loads), []
        told = scheduler_output.kv_connector_block_state
        cached = scheduler_output.scheduled_cached_reqs
        computed = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, scheduled in scheduler_output.num_scheduled_tokens.items():
            request, ids = self._requests.get(name), told.get_block_ids(name)
            for group, spec in enumerate(self._groups):
                if request is None or type(spec).__name__.startswith(STATE):
                    continue
                after = (computed[name] + scheduled) // spec.block_size
                for number in range(computed[name] // spec.block_size, after):
                    key = self._key(request, group, number)
                    if ids[group][number] and key is not None:
                        step.stores.append((key, ids[group][number]))
        for name, states in told.boundary_state_offloads.items():
            for group, block, tokens in states:
                number = tokens // self._groups[group].block_size - 1
                key = self._key(self._requests[name], group, number)
                if key is not None:
                    step.stores.append((key, block))
        return step

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request."""
        self._requests.pop(request.request_id, None)
        self._tried.discard(request.request_id)
        return False, None
