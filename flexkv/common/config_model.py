"""What the cache must know of the engine's model: the shapes and sizes of its KV."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from flexkv.common.config_keys import ConfigModel, PlainValues, key
from flexkv.common.errors import ConfigError
from flexkv.common.layout import KVShape
from flexkv.common.space import BlockSpace, in_one_pool

ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element, by the name of its type in torch and numpy."""

SHORT_NAMES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def dtype_name(dtype: object) -> str:
    """Return the name of a torch dtype, a numpy dtype or a string, such as "bfloat16".

    Neither library is imported: a torch dtype prints as `torch.<name>`, a numpy dtype as `<name>`,
    and a numpy scalar class has that name.
    """
    text = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    name = text.removeprefix("torch.")
    name = SHORT_NAMES.get(name, name)
    if name not in ITEM_BYTES:
        raise ValueError(f"unknown element type; must be one of {', '.join(ITEM_BYTES)}")
    return name


DTypeName = Annotated[str, BeforeValidator(dtype_name)]
_RANKS_PART = "pipeline, data or context parallelism"
LAYERS_MAX, HEADS_MAX, RANKS_MAX = 1 << 14, 1 << 16, 1 << 16
"""More layers, heads (or elements of a head), ranks or instances than any model or machine has."""


class LayerGroup(PlainValues):
    """Layers of one model that have one KV shape, which its other layers do not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(ge=1, le=LAYERS_MAX)
    num_kv_heads: int = Field(ge=1, le=HEADS_MAX)
    head_size: int = Field(ge=1, le=HEADS_MAX)
    layer_indices: tuple[Annotated[int, Field(ge=0, lt=LAYERS_MAX, strict=True)], ...] = ()
    dtype: DTypeName | None = None
    compress_ratio: int = Field(1, ge=1, le=HEADS_MAX)

    @model_validator(mode="after")
    def _indices_fit(self) -> Self:
        indices = self.layer_indices
        if indices and len(set(indices)) != self.num_layers:
            raise ValueError(
                f"layer_indices must name num_layers={self.num_layers} different layers"
            )
        return self


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
        None, "Groups of layers whose KV shapes differ; they replace the heads and dtype above."
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
            compress_ratio=1,
        )
        return self.layer_groups or (whole,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.use_mla and self.kv_dim != 1:
            raise ConfigError("kv_dim", self.kv_dim, "must be 1 with use_mla")
        for group in self._groups:
            heads = group.num_kv_heads
            if not self.use_mla and heads % self.tp_size and self.tp_size % heads:
                why = f"must divide the number of KV heads, {heads}, or be a multiple of it"
                raise ConfigError("tp_size", self.tp_size, why)
            if not self.use_mla and min(self.tp_size, heads) != self.parts:
                why = (
                    f"tp_size={self.tp_size} divides its {heads} KV heads into"
                    f" {min(self.tp_size, heads)} parts, but those of another group into"
                    f" {self.parts}: the numbers must be equal"
                )
                raise ConfigError("layer_groups", group, why)
        groups = self.layer_groups
        if groups is None:
            return self
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

    @property
    def parts(self) -> int:
        """Return the number of parts into which the TP ranks divide a block.

        Ranks with the same heads (MLA's one latent, or fewer heads than ranks) share one part.
        """
        if self.use_mla:
            return 1
        return min(self.tp_size, *(group.num_kv_heads for group in self._groups))

    def spaces(self, tokens_per_block: int) -> tuple[BlockSpace, ...]:
        """Return what a block of this many tokens is, for each KV group: today, of the only one.

        Raises:
            ConfigError: a group's compress_ratio does not divide the tokens of a block.
        """
        layers: dict[int, tuple[KVShape, str]] = {}
        for group in self._groups:
            tokens, rest = divmod(tokens_per_block, group.compress_ratio)
            if rest:
                why = f"must be a multiple of compress_ratio={group.compress_ratio}"
                raise ConfigError("tokens_per_block", tokens_per_block, why)
            heads, dtype = group.num_kv_heads // self.parts, group.dtype or self.dtype
            shape = KVShape(tokens, heads, group.head_size, self.kv_dim, ITEM_BYTES[dtype])
            begin = len(layers)
            indices = group.layer_indices or range(begin, begin + group.num_layers)
            layers |= dict.fromkeys(indices, (shape, dtype))
        shapes, dtypes = zip(*(layers[index] for index in range(self.num_layers)), strict=True)
        facts = self._facts(tokens_per_block)
        space = BlockSpace(tokens_per_block, shapes, dtypes, self.tp_size, self.parts, facts)
        return in_one_pool(space)

    def _facts(self, tokens_per_block: int) -> dict[str, int | str]:
        names = "model_id", "num_layers", "num_kv_heads", "head_size", "kv_dim", "dtype"
        facts = {name: getattr(self, name) for name in names}
        facts["tokens_per_block"] = tokens_per_block
        # Facts that hold for most models are left out: the keys of those stay what they were.
        if self.parts > 1:
            facts["parts"] = self.parts
        if self.layer_groups:
            facts["layer_groups"] = repr(self.layer_groups)
        return facts
