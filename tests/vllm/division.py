"""An attention backend that divides vLLM's blocks, as those of GPUs do; the CPU's own does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIVIDED: list[str] = []
"""The layers that were lent with an axis of splits."""


def divide(tokens: int) -> None:
    """Make the attention backend of this process need kernel blocks of this many tokens.

    In models with states, vLLM's runner for the CPU zeroes new blocks, but takes their ids for
    those of kernel blocks. It is made to zero the right ones.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from flexkv.integration.vllm import worker

    def zero(self: Any, block_ids: list[int]) -> None:
        context = self.compilation_config.static_forward_context
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, FullAttentionSpec):
                for name in group.layer_names:
                    blocks = context[name].kv_cache.unflatten(
                        0, (self.kv_cache_config.num_blocks, -1)
                    )
                    blocks[block_ids] = 0

    CPUModelRunner._zero_block_ids = zero

    sizes = staticmethod(lambda kv_cache_spec=None: [tokens])
    CPUAttentionBackend.get_supported_kernel_block_sizes = sizes
    viewed = worker.tensors_of

    def noted(kv_caches: Mapping[str, Any], *args: Any) -> Mapping[str, Any]:
        views = viewed(kv_caches, *args)
        DIVIDED[:] = [
            name for name, view in views.items() if view.dim() > kv_caches.get(name, view).dim()
        ]
        return views

    worker.tensors_of = noted
