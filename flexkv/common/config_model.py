"""What the cache must know of the engine's model: the shapes and sizes of its KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from flexkv.common.config_keys import ConfigModel, key
from flexkv.common.config_layers import (
    HEADS_MAX,
    ITEM_BYTES,
    KINDS,
    LAYERS_MAX,
    RANKS_MAX,
    DTypeName,
    LayerGroup,
)
from flexkv.common.errors import ConfigError
from flexkv.common.layout import KVShape
from flexkv.common.space import BlockSpace, in_one_pool

_OF_PREFIXES = "full", "sliding_window"
"""The kinds that KV group 0 may have: the first of them that any group has."""
_RANKS_PART = "pipeline, data or context parallelism"


class ModelConfig(ConfigModel):
    """The shape of a model's KV cache, over all its ranks."""

    num_layers: int = Field(ge=1, le=LAYERS_MAX, description="Layers that have a KV cache.")
    num_kv_heads: int = Field(
        ge=1, le=HEADS_MAX, description="KV heads of a layer, over all TP ranks."
    )
    head_size: int = Field(ge=1, le=HEADS_MAX, description="Elements of one head.")
    dtype: DTypeName = Field(description="Element type: a torch or numpy dtype, or its name.")
    use_mla: bool = key(
        False, "Multi-head latent attention: one vector per token instead of K and V."
    )
    kv_dim: int = key(
        None,
        "Vectors per token and layer: 2 for K and V, or 1.",
        ge=1,
        le=2,
        shown_default="1 with use_mla, else 2",
    )
    tp_size: int = key(1, "Tensor-parallel ranks.", ge=1, le=RANKS_MAX)
    pp_size: int = key(
        1, "Pipeline-parallel ranks.", ge=1, le=RANKS_MAX, part=_RANKS_PART, built=(1,)
    )
    dp_size: int = key(1, "Data-parallel ranks.", ge=1, le=RANKS_MAX, part=_RANKS_PART, built=(1,))
    cp_size: int = key(
        1, "Context-parallel ranks.", ge=1, le=RANKS_MAX, part=_RANKS_PART, built=(1,)
    )
    nnodes: int = key(
        1,
        "Machines that the ranks are spread over.",
        ge=1,
        le=RANKS_MAX,
        part="support for several machines",
        built=(1,),
    )
    instance_num: int = key(1, "Engine instances that share one cache.", ge=1, le=RANKS_MAX)
    layer_groups: tuple[LayerGroup, ...] | None = key(
        None,
        "Groups of layers that differ in their KV shapes, or in what a prefix needs of them; they "
        "replace the heads and dtype above.",
    )
    model_id: str = key(
        "",
        "Name of the weights: blocks of models with different names never mix. Without a "
        "name, models of the same shape would be given each other's blocks.",
    )

    @field_validator("kv_dim", mode="before")
    @classmethod
    def _kv_dim_of_kind(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return 1 if info.data.get("use_mla") else 2
        return value

    @property
    def _groups(self) -> tuple[LayerGroup, ...]:
        """Return the layer groups, or all layers as one group."""
        whole = LayerGroup(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
        )
        return self.layer_groups or (whole,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.use_mla and self.kv_dim != 1:
            raise ConfigError("kv_dim", self.kv_dim, "must be 1 with use_mla")
        self._check_heads()
        groups = self.layer_groups
        if groups is None:
            return self
        _check_kv_groups(groups)
        if len({bool(group.layer_indices) for group in groups}) > 1:
            raise ConfigError(
                "layer_groups", groups, "give layer_indices for all groups or for none"
            )
        layers = sum(group.num_layers for group in groups)
        if layers != self.num_layers:
            why = f"the groups have {layers} layers in total, the model has {self.num_layers}"
            raise ConfigError("layer_groups", groups, why)
        indices = [index for group in groups for index in group.layer_indices]
        if indices and sorted(indices) != list(range(self.num_layers)):
            why = f"layer_indices must name each layer from 0 to {self.num_layers - 1} once"
            raise ConfigError("layer_groups", groups, why)
        return self

    def _check_heads(self) -> None:
        """Check that the TP ranks divide the heads of all layers of a KV group alike.

        Raises:
            ConfigError: they do not.
        """
        parts: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            heads = group.num_kv_heads
            if group.is_state and heads not in (1, self.tp_size):
                why = (
                    "must be 1 if each rank has the whole state, or "
                    f"tp_size={self.tp_size} if each has a slice"
                )
                raise ConfigError(f"layer_groups[{number}].num_kv_heads", heads, why)
            if not self._is_latent(group) and heads % self.tp_size and self.tp_size % heads:
                why = f"must divide the number of KV heads, {heads}, or be a multiple of it"
                raise ConfigError("tp_size", self.tp_size, why)
            first = parts.setdefault(group.kv_group, self._parts_of(group))
            if self._parts_of(group) != first:
                why = (
                    f"tp_size={self.tp_size} divides its {heads} KV heads into"
                    f" {self._parts_of(group)} parts, but those of other layers of kv_group"
                    f" {group.kv_group} into {first}: the numbers must be equal"
                )
                raise ConfigError(f"layer_groups[{number}]", group, why)

    def _is_latent(self, group: LayerGroup) -> bool:
        """Return whether all TP ranks have the same vectors, as with MLA's latent."""
        return self.use_mla and not group.is_state and (group.kv_dim or self.kv_dim) == 1

    def _parts_of(self, group: LayerGroup) -> int:
        """Return the number of parts into which the TP ranks divide the blocks of some layers.

        Ranks with the same heads (MLA's one latent, or fewer heads than ranks) share one part.
        """
        return 1 if self._is_latent(group) else min(self.tp_size, group.num_kv_heads)

    @property
    def parts(self) -> int:
        """Return the number of parts into which the TP ranks divide a block of group 0."""
        return self._parts_of(self._groups[0])

    def spaces(self, tokens_per_block: int) -> tuple[BlockSpace, ...]:
        """Return the block space of each KV group, if a block of group 0 has this many tokens.

        Raises:
            ConfigError: the blocks of two groups, or the tokens that share one vector, do not fit.
        """
        layers: dict[int, LayerGroup] = {}
        for group in self._groups:
            begin = len(layers)
            indices = group.layer_indices or range(begin, begin + group.num_layers)
            layers |= dict.fromkeys(indices, group)
        count = 1 + max(group.kv_group for group in self._groups)
        members = [
            {i: layers[i] for i in sorted(layers) if layers[i].kv_group == number}
            for number in range(count)
        ]
        for number, group in enumerate(self._groups):
            _check_tokens(group, tokens_per_block, f"layer_groups[{number}]")
        spaces = [self._space(each, tokens_per_block) for each in members]
        facts = self._facts(tokens_per_block, spaces)
        return in_one_pool(replace(spaces[0], facts=facts), *spaces[1:])

    def _space(self, layers: Mapping[int, LayerGroup], tokens_per_block: int) -> BlockSpace:
        """Return the space of a KV group with these layers, by their indices in the model."""
        group = next(iter(layers.values()))
        dtypes = tuple(self._dtype_of(each) for each in layers.values())
        tokens = group.tokens_per_block or tokens_per_block
        space = BlockSpace(
            tokens,
            tuple(self._shape_of(each, tokens) for each in layers.values()),
            dtypes,
            self.tp_size,
            self._parts_of(group),
            facts={},
            kind=KINDS[group.kind],
            window=group.window,
            layers=tuple(layers),
        )
        return replace(space, facts=_leaf_facts(space))

    def _dtype_of(self, group: LayerGroup) -> str:
        return "int8" if group.is_state else group.dtype or self.dtype

    def _shape_of(self, group: LayerGroup, tokens: int) -> KVShape:
        if group.is_state:
            return KVShape(1, 1, group.state_bytes, 1, 1)
        heads, kv_dim = group.num_kv_heads // self._parts_of(group), group.kv_dim or self.kv_dim
        item_bytes = ITEM_BYTES[self._dtype_of(group)]
        return KVShape(tokens // group.compress_ratio, heads, group.head_size, kv_dim, item_bytes)

    def _facts(self, tokens_per_block: int, spaces: Sequence[BlockSpace]) -> dict[str, int | str]:
        names = "model_id", "num_layers", "num_kv_heads", "head_size", "kv_dim", "dtype"
        facts = {name: getattr(self, name) for name in names}
        facts["tokens_per_block"] = tokens_per_block
        # Facts that hold for most models are left out: the keys of those stay what they were.
        parts = [space.parts for space in spaces]
        if parts[0] > 1:
            facts["parts"] = parts[0]
        if len(set(parts)) > 1:
            facts["parts_of_groups"] = ",".join(map(str, parts))
        if self.layer_groups:
            facts["layer_groups"] = repr(self.layer_groups)
        return facts


def _check_kv_groups(groups: Sequence[LayerGroup]) -> None:
    """Check that KV groups are numbered from 0 without a gap, and that group 0 can be the prefix.

    Raises:
        ConfigError: they are not, or layers of one KV group differ in what all must share.
    """
    numbers = {group.kv_group for group in groups}
    if numbers != set(range(len(numbers))):
        told = ", ".join(map(str, sorted(numbers)))
        why = f"KV groups must be numbered from 0 without a gap, but these are given: {told}"
        raise ConfigError("layer_groups", groups, why)
    firsts: dict[int, LayerGroup] = {}
    for number, group in enumerate(groups):
        first = firsts.setdefault(group.kv_group, group)
        for name in ("kind", "window", "tokens_per_block"):
            field, value = f"layer_groups[{number}].{name}", getattr(group, name)
            if value != getattr(first, name):
                why = f"must be {getattr(first, name)!r}, as for other layers of its kv_group"
                raise ConfigError(field, value, f"{why}, {group.kv_group}")
        kinds = {each.kind for each in groups}
        able = next((kind for kind in _OF_PREFIXES if kind in kinds), None)
        if group.kv_group == 0 and group.kind != able:
            why = f"must be {able!r} for kv_group 0: its blocks are those of the prefix"
            if able is None:
                why = "a model with neither full attention nor a window is not supported"
            raise ConfigError(f"layer_groups[{number}].kind", group.kind, why)


def _check_tokens(group: LayerGroup, tokens_per_block: int, field: str) -> None:
    """Check that the blocks of some layers fit those of the prefix.

    Raises:
        ConfigError: they do not.
    """
    tokens = group.tokens_per_block or tokens_per_block
    if tokens % tokens_per_block:
        why = f"must be a multiple of the cache's tokens_per_block={tokens_per_block}"
        raise ConfigError(f"{field}.tokens_per_block", tokens, why)
    if tokens != tokens_per_block and group.kv_group == 0:
        why = f"must be the cache's tokens_per_block={tokens_per_block} for kv_group 0"
        raise ConfigError(f"{field}.tokens_per_block", tokens, why)
    if tokens % group.compress_ratio:
        why = f"must be a multiple of compress_ratio={group.compress_ratio}"
        raise ConfigError("tokens_per_block", tokens, why)


def _leaf_facts(space: BlockSpace) -> dict[str, int | str]:
    """Return the facts of a group's space on which its bytes depend, beside those of group 0."""
    return {
        "kind": space.kind.label,
        "window": space.window,
        "tokens_per_block": space.tokens_per_block,
        "layers": ",".join(map(str, space.layers)),
        "parts": space.parts,
    }
