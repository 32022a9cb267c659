"""The implementation to which vLLM's built-in `FlexKVConnectorV1` delegates.

    vllm serve … --kv-transfer-config '{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both"}'

The shim passes on no metadata, and forwards only some hooks; `flexkv.integration.vllm.connector`
is the connector with all of them. Both use this class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from flexkv.integration.vllm.identity import computation_of
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import Setup, setup_of
from flexkv.integration.vllm.worker import WorkerSide
from flexkv.observe.logs import configure_logging, get_logger

log = get_logger(__name__)


class FlexKVConnectorV1Impl:
    """One role of the connector, as the shim calls it."""

    has_layer_hooks = False
    """Whether vLLM calls `wait_for_layer_load` in every forward; through the shim it does not."""

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        """Create one role, by vLLM's configuration and FlexKV's: see `setup_of`.

        Raises:
            ConfigError: FlexKV cannot serve such an engine, or its server cannot be launched.
        """
        self._caches = kv_cache_config
        self._vllm_config, self._computation = vllm_config, _computation_of(vllm_config)
        setup = self._setup()
        configure_logging(setup.settings.log_level, setup.settings.logging_prefix)
        self._enabled = setup.settings.enable_flexkv
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        self._step = StepMetadata()
        if not self._enabled:
            return
        if role is KVConnectorRole.SCHEDULER:
            _warn_of_failures(vllm_config.kv_transfer_config)
            self.scheduler = SchedulerSide(setup)
        else:
            self.worker = WorkerSide(setup, _tp_rank())

    def _setup(self) -> Setup:
        setup = setup_of(self._vllm_config, self._computation, self._caches)
        is_possible, reason = self.has_layer_hooks, "only FlexKV's own connector can: see vllm.md"
        if setup.groups is not None and setup.groups.fail_whole:
            is_possible, reason = False, "the model has several KV groups"
        is_wanted = setup.settings.enable_layerwise_transfer
        if is_wanted and not is_possible:
            log.warning("loads_not_by_layer", reason=reason)
        return setup._replace(loads_by_layer=is_wanted and is_possible)

    def shutdown(self) -> None:
        """Disconnect; the scheduler's side also ends the server that it has launched."""
        if self.scheduler is not None:
            self.scheduler.close()
        if self.worker is not None:
            self.worker.close()

    # -- worker ---------------------------------------------------------------------------------

    def bound_step(self) -> StepMetadata:
        """Return the step's metadata, which the shim does not pass on."""
        metadata = get_kv_transfer_group()._get_connector_metadata()
        # vLLM's `MultiConnector` has one for each of its connectors.
        each = getattr(metadata, "metadata", (metadata,))
        (step,) = [one for one in each if isinstance(one, StepMetadata)]
        return step

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Lend the KV tensors. The model is loaded by now, so its weights are on this machine."""
        if self.worker is not None:
            self.worker.setup = self._setup()
            self.worker.beside_others = isinstance(get_kv_transfer_group(), MultiConnector)
            self.worker.register_kv_caches(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to wait for the step's loads by layer; others began when they were scheduled."""
        if self.worker is not None and self.worker.setup.loads_by_layer:
            self.worker.layer_loads.begin(self.bound_step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for a layer of the step's loads by layer; other loads are over by now."""
        if self.worker is not None:
            self.worker.layer_loads.wait(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: all layers of a block are stored at once, when the step is done."""

    def wait_for_save(self) -> None:
        """Report that the step has written what its puts read."""
        if self.worker is not None:
            self.worker.wait_for_save(self.bound_step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests that are done with sending, and with receiving."""
        if self.worker is None:
            return None, None
        return self.worker.get_finished(self.bound_step())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the device blocks that should have been loaded and were not."""
        if self.worker is None:
            return set()
        return self.bound_step().failed_blocks | self.worker.layer_loads.failed_blocks

    # -- scheduler ------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many more tokens can be loaded, and whether that is slow; None: ask again."""
        if self.scheduler is None:
            return 0, False
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Begin a request's load, if it has one."""
        if self.scheduler is not None:
            self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return what the workers do in this step."""
        if self.scheduler is None:
            return StepMetadata()
        return self.scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Drop the puts of requests with blocks that could not be loaded, by any connector."""
        if self.scheduler is not None and connector_output.invalid_block_ids:
            self.scheduler.transfers.drop_puts_of(connector_output.invalid_block_ids)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return whether vLLM must keep the request's blocks for now, and no parameters."""
        return self.scheduler is not None and self.scheduler.request_finished(request), None

    def take_events(self) -> Iterable[Any]:
        """Return the KV events since the last call. vLLM calls this when a step is done."""
        return () if self.scheduler is None else self.scheduler.step_ended()

    def get_kv_connector_stats(self) -> Any:
        """Return None: the shim can neither log nor export statistics."""
        return None


def _warn_of_failures(transfer: Any) -> None:
    """Warn if vLLM ends requests whose blocks cannot be loaded, which is its default policy.

    Earlier versions of vLLM have no such policy.
    """
    if getattr(transfer, "kv_load_failure_policy", "recompute") == "fail":
        log.warning(
            "loads_may_fail_requests",
            kv_load_failure_policy="fail",
            reason="a request ends with an error if one of its blocks cannot be loaded",
            remedy='set "kv_load_failure_policy": "recompute": its blocks are computed again',
        )


_computations: dict[int, tuple[Any, str]] = {}
"""By `id` of each `hf_config`: that object, kept alive, and `computation_of` before the loading."""


def _computation_of(vllm_config: Any) -> str:
    key = vllm_config.model_config.hf_config
    if id(key) not in _computations:
        _computations[id(key)] = key, computation_of(vllm_config)
    return _computations[id(key)][1]


def _tp_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
