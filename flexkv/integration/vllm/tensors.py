"""The KV tensors that a worker lends, with vLLM's blocks on an axis of their own.

An attention backend may need smaller blocks than vLLM's: *kernel blocks*. The tensors of such
layers then count kernel blocks; the same number of them in a row makes each of vLLM's blocks:

    kernel blocks of a tensor    0   1   2   3   4   5   6   7 …
    vLLM's blocks               └──── 0 ────┘   └──── 1 ────┘

Such a tensor is viewed as [blocks, splits, …]. How many splits there are follows from the tokens of
its blocks, and from their number if vLLM reports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexkv.common.config_model import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import KVShape, divisions
from flexkv.integration.vllm.groups import EngineGroups


def tensors_of(
    kv_caches: Mapping[str, Any],
    model: ModelConfig,
    tokens_per_block: int,
    groups: EngineGroups | None,
) -> Mapping[str, Any]:
    """Return the KV tensors of the layers that are transferred, in the order of the model's layers.

    Layers that share the cache of another layer have no tensor of their own. Opaque layers become
    int8[blocks, 1, tokens, bytes], with splits behind the blocks if they have any. A layer in
    several of FlexKV's groups occurs several times: from the second time on, the number of the
    group follows its name.

    Args:
        kv_caches: the engine's tensors, by layer.
        model: FlexKV's configuration of the model.
        tokens_per_block: the tokens of a block of group 0.
        groups: the KV groups; None if vLLM does not report them.

    Raises:
        ConfigError: a layer has no tensor, or its tensor does not have vLLM's blocks.
    """
    num_blocks = 0 if groups is None else groups.num_blocks
    layers = [(name, 0, False) for name in kv_caches]
    if groups is not None and model.layer_groups is not None:
        layers = [
            (name, span.shape.kv_group, span.is_opaque)
            for span in groups.spans
            for name in span.layers
        ]
    blocks = {
        number: shape
        for space in model.spaces(tokens_per_block)
        for number, shape in zip(space.layers, space.shapes, strict=True)
    }
    found: dict[str, Any] = {}
    for number, (name, group, is_opaque) in enumerate(layers):
        if (tensor := kv_caches.get(name)) is None:
            raise ConfigError("kv_caches", sorted(kv_caches), f"must have layer {name}")
        if (block := blocks.get(number)) is None:  # the number of layers is checked later
            return kv_caches
        view = _bytes_of if is_opaque else _by_blocks
        place = f"{name}, group {group}" if name in found else name
        found[place] = view(tensor, block, num_blocks, f"kv_caches[{name!r}]")
    return found


def _by_blocks(tensor: Any, block: KVShape, num_blocks: int, field: str) -> Any:
    """Return a view of a tensor in which one axis counts vLLM's blocks."""
    shape = tuple(getattr(tensor, "shape", ()))
    found = divisions(shape, block, num_blocks)
    if not found and divisions(shape, block):
        raise _refusal(field, shape, num_blocks)
    splits = {each.splits for each in found}
    if len(found) > 1 or splits <= {1}:  # unknown and ambiguous shapes are refused later
        return tensor
    ((axis, count),) = found
    return tensor.unflatten(axis, (-1, count))


def _bytes_of(tensor: Any, block: KVShape, num_blocks: int, field: str) -> Any:
    """Return the blocks of an opaque layer as bytes.

    The meaning of the bytes is unknown. But if heads come before tokens, the strides say so (the
    order is "dim tokens"): such blocks are not shared with those that have tokens first.
    """
    import torch

    count, tokens, size = tensor.shape[0], block.tokens, block.head_size
    stride = tensor.stride(0) * tensor.element_size()
    splits, left = divmod(count, num_blocks or count)
    if left or splits < 1 or tokens % splits:
        raise _refusal(field, tuple(tensor.shape), num_blocks)
    if splits > 1 and stride * splits != tokens * size:
        why = f"has kernel blocks that are {stride} bytes apart; they must fill blocks of "
        raise ConfigError(field, tuple(tensor.shape), f"FlexKV: {why}{tokens * size} bytes")
    tokens //= splits
    own = (size, 1) if _has_tokens_first(tensor) else (1, tokens)
    sizes, strides = (count, 1, tokens, size), (stride, stride, *own)
    raw = torch.empty(0, dtype=torch.int8, device=tensor.device).set_(tensor.untyped_storage())
    view = raw.as_strided(sizes, strides, tensor.storage_offset() * tensor.element_size())
    return view.unflatten(0, (-1, splits)) if splits > 1 else view


def _has_tokens_first(tensor: Any) -> bool:
    """Return whether the bytes of a token are adjacent in a [blocks, heads, tokens, …] tensor."""
    if tensor.dim() < 4 or 1 in tensor.shape[1:3]:
        return True
    return bool(tensor.stride(1) < tensor.stride(2))


def _refusal(field: str, shape: tuple[int, ...], num_blocks: int) -> ConfigError:
    why = f"must have the {num_blocks} blocks of vLLM, or the same number of kernel blocks for each"
    return ConfigError(field, shape, f"FlexKV: {why} of them; states cannot be divided")
