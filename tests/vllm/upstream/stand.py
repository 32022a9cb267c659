"""vLLM's scheduler and its runner's connector hooks, over FlexKV, without a model.

Real are vLLM's `Scheduler`, both roles of the connector, the server, its tiers and the copies. Only
the forward is simulated. It writes into the KV tensors values that depend on the token and all
tokens before it. Before that it checks that the KV of the earlier tokens is there, as attention
would read it.

    step: schedule ─▶ handle_preemptions, bind ─▶ forward ─▶ wait_for_save, get_finished … ─▶ update
"""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import (
    ensure_kv_transfer_initialized,
    ensure_kv_transfer_shutdown,
)
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from flexkv.server.operator import command
from tests.v1.kv_connector.unit.utils import (
    assert_scheduler_empty,
    create_model_runner_output,
    create_request,
    create_scheduler,
    create_vllm_config,
)

from .copies import Copies
from .opt import HEAD_SIZE, HEADS, LAYERS

PER_BLOCK = 16
WITHIN_S = 60.0
MODULE = "flexkv.integration.vllm.connector"
CONNECTORS: dict[str, dict[str, Any]] = {
    "shim": {"kv_connector": "FlexKVConnectorV1"},
    "own": {"kv_connector": "FlexKVConnector", "kv_connector_module_path": MODULE},
}
TOKEN = 7
"""The token that every step samples."""
WAITING = RequestStatus.WAITING_FOR_REMOTE_KVS


class _Row(NamedTuple):
    """A request's part of a step, as it was when the step was scheduled."""

    request: Request
    count: int
    end: int
    blocks: np.ndarray[Any, np.dtype[np.int64]]
    samples: bool


class Stand:
    """One engine without a model."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        connector: dict[str, Any],
        num_blocks: int = 64,
        cache: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        """Start the engine, and wait until its device is lent.

        Args:
            folder: for the server's socket and its SSD tier.
            monkeypatch: ends with the test.
            connector: vLLM's configuration of the connector.
            num_blocks: of the device; one of them is never used.
            cache: keys of FlexKV's `cache_config`.
            config: more for vLLM's `create_vllm_config`; and `behind`, the steps that are under way
                when the next is scheduled, and `drafts`, whether the runner makes drafts after each
                forward, and only then tells the connector that the step is done. `scheduling` has
                fields of vLLM's `SchedulerConfig`.
        """
        scheduling = config.pop("scheduling", {})
        self._behind, self._drafts = config.pop("behind", 0), config.pop("drafts", False)
        self._under_way: deque[tuple[Any, list[_Row]]] = deque()
        self.unchecked = False
        """Whether a forward may read wrong values."""
        self.weights = 0
        """The version of the model's weights, which determines what a forward writes."""
        self.address = f"ipc://{folder}/socket"
        tiers = {"num_cpu_blocks": 64, "num_ssd_blocks": 256, "ssd_cache_dir": str(folder)}
        # Long, so that a slow machine is no fault.
        settings = {
            "server_recv_port": self.address, "server_answer_ms": int(WITHIN_S / 4 * 1e3),
            "match_wait_ms": config.pop("match_wait_ms", WITHIN_S / 4 * 1e3),
            "log_level": "warning", "cache_config": {**tiers, **(cache or {})},
        }  # fmt: skip
        (folder / "flexkv.json").write_text(json.dumps(settings))
        monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(folder / "flexkv.json"))
        # The connector uses only this of the tensor-parallel group.
        group = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value, src=0: value)
        monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
        self.copies = Copies(monkeypatch)
        wanted = {"max_num_batched_tokens": 1024, "max_model_len": 1024, **connector, **config}
        self.config = create_vllm_config(kv_role="kv_both", block_size=PER_BLOCK, **wanted)
        self.config.scheduler_config.async_scheduling = self._behind > 0
        for name, value in scheduling.items():
            setattr(self.config.scheduler_config, name, value)
        self.kv_caches, caches = self._allocated(num_blocks)
        self.scheduler = create_scheduler(self.config, num_blocks, **self._of_caches(caches))
        try:
            ensure_kv_transfer_initialized(self.config, caches)
            self.worker = get_kv_transfer_group()
            self.worker.register_kv_caches(self.kv_caches)
            self.until(self.side._ready)
        except BaseException:
            self.close()
            raise

    def _allocated(self, num_blocks: int) -> tuple[dict[str, torch.Tensor], Any]:
        """Return the KV tensors by layer, and vLLM's `KVCacheConfig`."""
        shape = (num_blocks, HEADS, PER_BLOCK, 2 * HEAD_SIZE)
        tensors = [torch.zeros(shape, dtype=torch.float16) for _ in range(LAYERS)]
        by_layer = {f"layer.{i}": tensor for i, tensor in enumerate(tensors)}
        spec = FullAttentionSpec(
            block_size=PER_BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float16
        )
        return by_layer, KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(list(by_layer), spec)])

    def _of_caches(self, caches: Any) -> dict[str, Any]:
        """Return further arguments of vLLM's `create_scheduler`."""
        return {"kv_cache_config": caches}

    @property
    def side(self) -> Any:
        """Return FlexKV's own scheduler side, wherever vLLM keeps it."""
        found = self.scheduler.connector
        for child in getattr(found, "sub_connectors", ()):
            found = child if "FlexKV" in type(child).__name__ else found
        return getattr(found, "_flexkv_connector", found).scheduler

    @property
    def free_blocks(self) -> int:
        """Return how many blocks of the device are free."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def is_idle(self) -> bool:
        """Return whether no requests and no steps are left."""
        return not self.scheduler.has_requests() and not self._under_way

    def close(self) -> None:
        """Release held copies, and end the connectors and the scheduler."""
        self.copies.release()
        ensure_kv_transfer_shutdown()
        self.scheduler.shutdown()

    # -- requests -------------------------------------------------------------------------------

    def add(self, request_id: int, num_tokens: int, **more: Any) -> Request:
        """Add a request; requests of the same id and length have the same prompt."""
        more.setdefault("max_tokens", 1)
        name = more.pop("name", f"id-{request_id}")
        request = create_request(request_id, num_tokens, block_size=PER_BLOCK, **more)
        request.request_id = name
        self.scheduler.add_request(request)
        return request

    def store(self, request_id: int, num_tokens: int, **more: Any) -> None:
        """Compute and store a prompt, then drop it from the device's own cache."""
        self.add(request_id, num_tokens, name=f"first-{request_id}", **more)
        self.run()
        assert self.scheduler.reset_prefix_cache()

    def blocks_of(self, request: Request) -> list[int]:
        """Return the device blocks of a request, in order."""
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return list(blocks)

    def is_hashed(self, block: int) -> bool:
        """Return whether the device's own cache would share a block."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.blocks[block].block_hash is not None

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> SimpleNamespace:
        """Do one step; return what was scheduled, what the worker reported, and the outputs.

        With `behind` steps under way the oldest one is completed; at first there is none yet.
        """
        if not self._under_way or self.scheduler.has_requests():
            output = self.scheduler.schedule()
            rows = [self._row(name, count) for name, count in output.num_scheduled_tokens.items()]
            self._under_way.append((output, rows))
            if len(self._under_way) <= self._behind and self.scheduler.has_requests():
                return SimpleNamespace(output=output, told=KVConnectorOutput(), given=_nothing())
        output, rows = self._under_way.popleft()
        result = self._execute(output, rows)
        outputs = self.scheduler.update_from_output(output, result)
        told = result.kv_connector_output or KVConnectorOutput()
        return SimpleNamespace(
            output=output, told=told, given=outputs[0] if outputs else _nothing()
        )

    def _row(self, name: str, count: int) -> _Row:
        request = self.scheduler.requests[name]
        end = request.num_computed_tokens
        blocks = np.array(self.blocks_of(request))
        return _Row(request, count, end, blocks, samples=end >= request.num_tokens)

    def _execute(self, output: Any, rows: list[_Row]) -> Any:
        """Do what the runner does in a step."""
        runner = KVConnectorModelRunnerMixin
        self.worker.handle_preemptions(output.kv_connector_metadata)
        if not rows:
            return runner.kv_connector_no_forward(output, self.config)
        with (
            set_forward_context(None, self.config),
            runner._get_kv_connector_output(output, defer_finalize=self._drafts) as told,
        ):
            for row in rows:
                self._forward(row)
        if self._drafts:
            runner.finalize_kv_connector()
        result = create_model_runner_output([row.request for row in rows], token_id=TOKEN)
        for at, row in enumerate(rows):
            if not row.samples:
                result.sampled_token_ids[at] = []  # the prompt has more chunks
        result.kv_connector_output = told
        return result

    def _forward(self, row: _Row) -> None:
        """Compute some tokens of a request, after checking the KV of those before them."""
        tokens = list(row.request.all_token_ids[: row.end])
        values = _values([self.weights, *tokens, *[TOKEN] * (row.end - len(tokens))])[1:]
        at = np.arange(row.end)
        where = torch.from_numpy(row.blocks[at // PER_BLOCK]), torch.from_numpy(at % PER_BLOCK)
        new = slice(row.end - row.count, row.end)
        for number, layer in enumerate(self.kv_caches.values()):
            bits = layer.view(torch.int16)
            wanted = (torch.from_numpy(values) + number)[:, None, None]
            found = bits[where[0], :, where[1]]
            wrong = (found != wanted).flatten(1).any(1)[: new.start]
            assert self.unchecked or not wrong.any(), (
                f"{row.request.request_id}: tokens {wrong.nonzero().flatten()}"
            )
            bits[where[0][new], :, where[1][new]] = wanted[new].expand_as(found[new])

    def until(self, what: Callable[[], Any], step: bool = False) -> Any:
        """Wait until a function's result is true, stepping if asked to, and return that."""
        until_s = time.monotonic() + WITHIN_S
        while not (found := what()):
            assert time.monotonic() < until_s, "it did not come about"
            if step:
                self.step()
            time.sleep(0.001)
        return found

    def run(self) -> list[Any]:
        """Step until nothing is left to do; return all outputs."""
        given: list[Any] = []
        self.until(lambda: (given.extend(self.step().given.outputs), self.is_idle)[1])
        return given

    def check_freed(self) -> None:
        """Check that neither vLLM's scheduler nor our side keeps anything."""
        self.step()
        assert_scheduler_empty(self.scheduler)
        assert self.side._states == {}
        assert not self.side.transfers.blocks.readers.any()

    def check_empty(self) -> None:
        """Check that neither scheduler, our side nor the server keeps anything."""
        self.check_freed()
        self.until(lambda: self.statistics()["claims"] == 0)
        assert self.statistics()["runs_in_flight"] == 0

    def statistics(self) -> dict[str, Any]:
        """Return the server's statistics."""
        told: dict[str, Any] = command(self.address, "status")["statistics"]
        return told


def _nothing() -> SimpleNamespace:
    return SimpleNamespace(outputs=[], scheduler_stats=None)


def _values(tokens: Any) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return for each token a hash of it and all tokens before it."""
    values, digest = np.empty(len(tokens), np.int16), 0
    for at, token in enumerate(tokens):
        digest = zlib.crc32(int(token).to_bytes(8, "little", signed=True), digest)
        values[at] = digest & 0x3FFF
    return values
